"""What an option may be: its check, in words and as a predicate, its default, and the tasks that it is for.

Nothing here imports torch: what a configuration can be refused for without it, it is refused for without.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "CELL",
    "CELLS",
    "FILE",
    "FRACTION",
    "KERNEL",
    "KERNELS",
    "LANES",
    "NOT_NEGATIVE",
    "POOLS",
    "RATE",
    "SEED",
    "SIDE",
    "SPLIT",
    "TEXT",
    "THREADS",
    "Check",
    "at_least",
    "one_of",
    "option",
]


@dataclass(frozen=True)
class Check:
    """What a value must be, in words and as a predicate. most: the largest number it may be. choices: all there are."""

    expected: str
    holds: Callable[[Any], bool]
    most: float = math.inf
    choices: tuple[str, ...] = ()


CELLS = ("rnn", "gru", "lstm")
"""Those of `bptt.nn.LAYERS`, for help and messages without torch."""
KERNELS = ("cpu", "fused", "eager")
"""Those of `bptt.kernels`, likewise."""
LANES = 8
"""Lanes that are measured where no number is asked for: enough for a mean, few enough to be quick."""


def _known(names: tuple[str, ...], module: str, table: str) -> tuple[str, ...]:
    """The names of a table of the package, where its module is loaded; nobody can have added to it before."""
    loaded = sys.modules.get(f"bptt.{module}")
    return tuple(getattr(loaded, table, names))


def one_of(*names: str) -> Check:
    """One of some names."""
    return Check(f"one of {', '.join(names)}", lambda value: value in names, choices=names)


def at_least(least: int, most: int = 2**63 - 1) -> Check:
    """A whole number."""
    return Check(f"a whole number of at least {least}", lambda value: value >= least, most)


SIDE = 2**31 - 1  # of a side of a tensor
RATE = Check(  # float32 ends at 3.4e38, and Adam divides the rate by 0.1 in its first step
    "a finite number above 0", lambda value: 0 < value < math.inf, most=1e37
)
NOT_NEGATIVE = Check("a finite number of at least 0", lambda value: 0 <= value < math.inf)
FRACTION = Check("a number of at least 0 and below 1", lambda value: 0 <= value < 1)
CELL = Check(f"one of {', '.join(CELLS)}", lambda value: value in _known(CELLS, "nn", "LAYERS"), choices=CELLS)
TEXT = Check("text", lambda value: True)  # what it may say is checked where it is read
KERNEL = Check(
    f"one of auto, {', '.join(KERNELS)}",
    lambda value: value == "auto" or value in _known(KERNELS, "kernels", "KERNELS"),
    choices=("auto", *KERNELS),
)
SPLIT = Check(
    "lines, paragraphs, files or jsonl:FIELD",
    lambda value: value in ("lines", "paragraphs", "files") or (value.startswith("jsonl:") and len(value) > 6),
)
FILE = Check("a file name", lambda value: bool(value) and "\0" not in value)
POOLS = ("last", "mean")
"""Which of a sequence's states a classifier reads: the last one, or the mean of all."""
SEED = Check("a whole number in [0, 2**63)", lambda value: 0 <= value < 2**63)
_MOST = 1024  # with very many more, OpenMP does not report that it cannot start them: it crashes
THREADS = Check(f"a whole number in [0, {_MOST}]", lambda value: 0 <= value <= _MOST)


def option(default: Any, check: Check, meaning: str, *tasks: str) -> Any:
    """A field of `Config`. tasks: those that the option is for, by name; none: all.

    One that is for some tasks is None under the others, and refused there where it is given.
    """
    about = {"check": check, "meaning": meaning, "default": default, "tasks": tasks}
    return field(default=None if tasks else default, metadata=about)
