"""Several ways to the same tensors: checked against the truth first, then timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np

from ..equations.chain import Array

__all__ = ["TOLERANCE", "Call", "Check", "Contest", "largest_error"]

TOLERANCE = 1e-5
"""Largest error that counts as right: max |answer - truth| / max |truth| of any tensor, float32 against float64."""

Call = Callable[[], Sequence[Any]]
"""One whole computation; what it returns can be made NumPy arrays."""


@dataclass(frozen=True)
class Check:
    """A call's answer held against the truth: its largest error, the tensor that has it, and how long the call took."""

    error: float
    tensor: str
    seconds: float


@dataclass(frozen=True)
class Contest:
    """Calls that must return the same tensors; the first is the one that the others are compared with.

    names: of the tensors. truth: float64. may_refuse: the calls that may raise RuntimeError or ValueError when they are
    run first; `missing` then has the reason.
    """

    names: tuple[str, ...]
    calls: Mapping[str, Call]
    truth: Sequence[Array]
    may_refuse: frozenset[str] = frozenset()
    missing: dict[str, str] = field(default_factory=dict)

    def errors(self) -> dict[str, tuple[float, str]]:
        """For each call its largest error, and the name of the tensor that has it. Runs every call once."""
        return {name: (check.error, check.tensor) for name, check in self.checked().items()}

    def checked(self) -> dict[str, Check]:
        """Every call run once, and checked: the first run of each, where the contest is new. Not those that refuse."""
        checks = {}
        for name, call in self.calls.items():
            start = perf_counter()
            try:
                answer = call()
            except (RuntimeError, ValueError) as error:
                if name not in self.may_refuse:
                    raise
                self.missing[name] = next(iter(str(error).splitlines()), type(error).__name__)
                continue
            seconds = perf_counter() - start
            checks[name] = Check(*largest_error(answer, self.truth, self.names), seconds)
        return checks


def largest_error(answer: Sequence[Any], truth: Sequence[Array], names: Sequence[str]) -> tuple[float, str]:
    """The largest of max |answer - truth| / max |truth| over the tensors, and the name of that tensor.

    Infinite where that is not a number, or where a shape differs.

    >>> largest_error([[1.0, 2.0], [3.0]], [np.array([1.0, 2.0]), np.array([4.0])], ["x", "w"])
    (0.25, 'w')
    """
    worst = (0.0, names[0])
    for value, true, name in zip(answer, truth, names, strict=True):
        array = np.asarray(value, dtype=np.float64)
        error = float(np.abs(array - true).max() / (np.abs(true).max() or 1)) if array.shape == true.shape else np.inf
        worst = max(worst, (error if np.isfinite(error) else np.inf, name), key=lambda pair: pair[0])
    return worst
