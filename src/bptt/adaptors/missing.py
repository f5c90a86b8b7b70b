"""The error for a framework that is not installed."""

from __future__ import annotations

__all__ = ["missing"]


def missing(adaptor: str, packages: tuple[str, ...], error: ModuleNotFoundError) -> ImportError:
    """The ImportError that names the extra of an adaptor, or `error` itself where another module is what is missing.

    packages: the top-level modules of the framework.

    >>> raise missing("lightning", ("lightning",), ModuleNotFoundError(name="lightning.pytorch"))
    Traceback (most recent call last):
    ImportError: bptt.adaptors.lightning needs lightning: pip install 'bptt[lightning]'
    """
    top = (error.name or "").partition(".")[0]
    if top not in packages:
        return error
    extra = adaptor.replace("_", "-")
    return ImportError(f"bptt.adaptors.{adaptor} needs {top}: pip install 'bptt[{extra}]'", name=error.name)
