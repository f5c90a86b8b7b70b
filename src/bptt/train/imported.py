"""A name of the user's own modules, as an option gives it: MODULE:NAME, the present folder's modules included."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from .errors import InputError

__all__ = ["found_module", "imported"]


def found_module(option: str, text: str) -> None:
    """Raise InputError where the first part of the module is nowhere. It imports nothing."""
    module = text.partition(":")[0].partition(".")[0]
    with _here():
        try:
            found = module in sys.modules or importlib.util.find_spec(module) is not None
        except (ImportError, ValueError):
            found = False
    if not found:
        raise _missing(option, text, module)


def imported(option: str, text: str) -> Any:
    """What MODULE:NAME names. option: for messages.

    Raises InputError for a module that is missing or cannot be imported, and for a name that it lacks.
    """
    module, _, path = text.partition(":")
    found_module(option, text)
    with _here():
        try:
            found: Any = importlib.import_module(module)
        except (Exception, SystemExit) as error:  # whatever somebody's module raises
            if isinstance(error, ModuleNotFoundError) and error.name and f"{module}.".startswith(f"{error.name}."):
                raise _missing(option, text, error.name) from None
            said = " ".join(str(error).split())
            raise InputError(
                f"{option} {text}: importing {module} raised {type(error).__name__}" + (f": {said}" if said else "")
            ) from error
    for name in path.split("."):
        if not hasattr(found, name):
            near = get_close_matches(name, dir(found), n=1)
            where = getattr(found, "__name__", module)
            raise InputError(
                f"{option} {text}: {where} has no {name}" + (f" (did you mean {near[0]}?)" if near else "")
            )
        found = getattr(found, name)
    return found


def _missing(option: str, text: str, module: str) -> InputError:
    return InputError(f"{option} {text}: there is no module {module}, neither in {Path.cwd()} nor where Python looks")


@contextmanager
def _here() -> Iterator[None]:
    """Inside `with`, modules of the present folder are found too, as `python -m` finds them."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(here)
