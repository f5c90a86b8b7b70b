"""A scan of the user's own, for `bptt compare --scan MODULE:FUNCTION`."""

from __future__ import annotations

from ..flow import Scanned
from ..train import InputError
from ..train.imported import imported

__all__ = ["load"]


def load(text: str) -> Scanned:
    """What the function of a module returns, the present folder's modules included.

    Raises InputError for what cannot be imported, and for what is no scan.
    """
    found = imported("scan", text)
    made = found() if callable(found) else found
    if not isinstance(made, Scanned):
        raise InputError(f"scan must name a function that returns bptt.flow.scanned(...): {text} gave {made!r}")
    return made
