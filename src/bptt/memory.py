"""Memory policies as pure data: what the forward pass keeps for the backward pass.

What is kept is called the tape: stage 1 (forward) writes it, so that stage 3 (the adjoint) need not compute it again. A
memory policy changes how much memory and time a call takes. It never changes a value.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import ceil, isqrt, sqrt
from operator import index
from typing import Literal, get_args

__all__ = ["AUTO_BYTES", "Checkpoints", "Cut", "Memory", "Tapes", "keeps_gates", "parse"]

Tapes = Literal["auto", "gates", "states"]

AUTO_BYTES = 256 * 2**20
"""256 MiB: where the gates of one call would take more, `"auto"` keeps only the states."""


@dataclass(frozen=True)
class Cut:
    """A division of a sequence into segments.

    steps: the length of a segment; the last one may be shorter. slots: how many states are stored at the same time.
    """

    steps: int
    slots: int


@dataclass(frozen=True)
class Checkpoints:
    """A memory policy that keeps the state every so many steps and no other tape.

    The backward pass runs one segment at a time again, from the state before it, and keeps only that segment's tape.

    steps: the length of a segment. bytes: the size that the whole tape may have, that is, the checkpoints and the tape
    of one segment together. The sequence is then divided into as few segments as fit, and each of them is run once
    more; where no such division fits, a binomial schedule runs some segments more often. At most one of the two can be
    given. With neither, a segment has about sqrt(T / alpha) steps, where alpha is the size of a step's tape divided by
    that of a state: of all divisions that run each segment once more, this one needs the least memory. (An RNN,
    GRU or LSTM makes its segments so long that the tape of one takes about 1 MiB at least.)

    Inputs, outputs and their gradients are not part of the tape. `str` gives the text form, which layers take as well.
    `torch.load` reads a policy with `weights_only=True`.

    Raises TypeError for what is not a whole number, ValueError for a number below 1 and where both are given.

    >>> str(Checkpoints()), str(Checkpoints(steps=100)), str(Checkpoints(bytes=10**6))
    ('checkpoints', 'checkpoints:steps=100', 'checkpoints:bytes=1000000')

    Source: one level, Chen et al. 2016 (arXiv 1604.06174); Gruslys et al. 2016 (arXiv 1606.03401); binomial, see
    `schedules`.
    """

    steps: int | None = None
    bytes: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "bytes"):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not hasattr(value, "__index__"):
                raise TypeError(f"{name} must be a whole number: got {value!r} ({type(value).__name__})")
            if index(value) < 1:
                raise ValueError(f"{name} must be at least 1: got {value}")
            object.__setattr__(self, name, index(value))
        if self.steps is not None and self.bytes is not None:
            raise ValueError(f"give steps or bytes, not both: got steps={self.steps} and bytes={self.bytes}")

    def cut(self, T: int, state: int, tape: int, besides: int = 0, later: int | None = None) -> Cut:
        """The division of T steps into segments.

        state: bytes of a checkpoint. tape: bytes that one step adds to the tape of a segment. besides: bytes that are
        kept in any case. later: see `slots`.

        Raises ValueError where the budget is smaller than the tape of one step and what is kept in any case.

        >>> Checkpoints().cut(10_000, state=2, tape=6), Checkpoints(bytes=100).cut(10_000, state=2, tape=6)
        (Cut(steps=58, slots=172), Cut(steps=8, slots=13))
        """
        if self.steps is not None:
            return _one_level(T, self.steps)
        if self.bytes is None:
            return _one_level(T, max(1, ceil(sqrt(T * state / tape))))
        free = self.bytes - besides
        if free < tape:
            also = " and the outputs between the layers" if besides else ""
            raise ValueError(f"bytes must hold the tape of a step{also}, {tape + besides:,} bytes: got {self.bytes:,}")
        if free >= T * tape:
            return Cut(T, 0)
        square = (free + state) ** 2 - 4 * state * tape * T  # one level: tape s + state (T / s - 1) <= bytes
        if square >= 0:
            longest = _one_level(T, max(1, (free + state + isqrt(square)) // (2 * tape)))
            if longest.steps * tape + longest.slots * state <= free:
                return longest
        steps = max(1, free // (2 * tape))
        return Cut(steps, self.slots(ceil(T / steps), steps, state, tape, besides, later))

    def slots(
        self, segments: int, longest: int, state: int, tape: int, besides: int = 0, later: int | None = None
    ) -> int:
        """How many states may be stored at the same time.

        segments: how many segments there are. longest: the steps of the longest one. later: bytes of a state that is
        stored during the backward pass, default `state`. Where there are fewer slots than segments, such states come
        on top of those that the forward pass stored, which stay in memory to the end.

        >>> Checkpoints(steps=5).slots(20, 5, state=2, tape=6), Checkpoints(bytes=50).slots(20, 5, state=2, tape=6)
        (19, 5)
        """
        if self.bytes is None:
            return segments - 1
        room = max(0, self.bytes - besides - longest * tape)
        return segments - 1 if room >= (segments - 1) * state else room // (state + (later or state))

    def __str__(self) -> str:
        given = [f"{name}={value}" for name in ("steps", "bytes") if (value := getattr(self, name)) is not None]
        return ":".join(["checkpoints", *given])


Memory = Tapes | Checkpoints


def parse(memory: str | Checkpoints) -> Memory:
    """Read the memory policy that a text form names. A policy is returned as it is; anything else raises ValueError.

    >>> parse("states"), parse("checkpoints:steps=50")
    ('states', Checkpoints(steps=50, bytes=None))
    """
    if isinstance(memory, Checkpoints):
        return memory
    names = ", ".join(map(repr, get_args(Tapes)))
    expected = f"memory must be one of {names}, 'checkpoints', 'checkpoints:steps=S' or 'checkpoints:bytes=N'"
    if isinstance(memory, str) and memory in get_args(Tapes):
        return memory  # type: ignore[return-value]  # narrowed by the check above
    match = re.fullmatch(r"checkpoints(?::(steps|bytes)=([0-9]+))?", memory) if isinstance(memory, str) else None
    if match is None:
        raise ValueError(f"{expected}: got {memory!r}")
    return Checkpoints(**{match[1]: int(match[2])}) if match[1] else Checkpoints()


def keeps_gates(memory: Memory, gate_bytes: int) -> bool:
    """Whether the gates are kept in a call whose gates take `gate_bytes`. Those of a segment always are.

    >>> keeps_gates("auto", 1000), keeps_gates("auto", 2**40), keeps_gates("states", 0)
    (True, False, False)
    """
    return memory == "gates" or (memory == "auto" and gate_bytes <= AUTO_BYTES)


def _one_level(T: int, steps: int) -> Cut:
    steps = min(steps, T)
    return Cut(steps, ceil(T / steps) - 1)
