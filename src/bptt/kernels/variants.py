"""The instruction sets that the compiled kernels were built for."""

from __future__ import annotations

from . import _walks

__all__ = ["chosen_variant", "variants"]


def variants() -> list[str]:
    """The instruction sets this machine runs, of those the build has; the widest first, which is the one used."""
    return [name for name, runs in _walks.variants() if runs]


def chosen_variant(variant: str | None) -> tuple[str, int]:
    """(the name, the number) of a variant; of the best one for None. Raises ValueError for one that does not run."""
    wanted = variants()[0] if variant is None else variant
    if wanted not in variants():
        raise ValueError(f"variant must be one of {', '.join(map(repr, variants()))}: got {variant!r}")
    return wanted, [name for name, _ in _walks.variants()].index(wanted)
