"""Checks of arguments that are numbers."""

from __future__ import annotations

import operator
from numbers import Real

__all__ = ["count", "real"]


def count(name: str, value: int, of: str = "") -> int:
    """`value` as a whole number of at least 1. of: what is counted, for the errors."""
    try:
        found = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        found = None
    if found is None:
        number = f"a whole number of {of}s" if of else "a whole number"
        raise TypeError(f"{name} must be {number}: got {value!r} ({type(value).__name__})")
    if found < 1:
        raise ValueError(f"{name} must be at least 1{of and f' {of}'}: got {value}")
    return found


def real(name: str, value: float) -> float:
    """`value` as a float."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number: got {value!r} ({type(value).__name__})")
    return float(value)
