"""Checks of the arguments of policies."""

from __future__ import annotations

import operator
from numbers import Real

__all__ = ["count", "real"]


def count(name: str, value: int) -> int:
    """`value` as a whole number of steps, at least 1."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be a whole number of steps: got {value!r} ({type(value).__name__})")
    steps = operator.index(value)
    if steps < 1:
        raise ValueError(f"{name} must be at least 1 step: got {value}")
    return steps


def real(name: str, value: float) -> float:
    """`value` as a float."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number: got {value!r} ({type(value).__name__})")
    return float(value)
