"""Carries that were not kept: run again, a segment at a time, from the checkpoint before them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ..schedules import first_part
from ._replay import Replay
from ._tape import reset

__all__ = ["Leaf", "Rebuilt"]


@dataclass
class Rebuilt:
    """The carry that enters each step, of which only some were kept.

    stored: the carries at the first steps of segments, by segment; 0 among them. every: steps of a segment. slots: how
    many may be stored besides that of segment 0. xs, captured: what a step is run again with. resets: `[T, B]` or
    `[T, 1]`. One segment's carries are in memory at a time: the walk visits steps from the last to the first, and a
    segment's first carry is found again as the binomial schedule does.
    """

    replay: Replay
    stored: dict[int, list[Tensor]]
    every: int
    slots: int
    T: int
    xs: Sequence[Tensor]
    captured: Sequence[Tensor]
    resets: Tensor | None
    _segment: int = -1
    _carries: list[list[Tensor]] = field(default_factory=list)
    _behind: list[Tensor] = field(default_factory=list)  # the first carry of the segment behind

    def leaves(self) -> list[Leaf]:
        """One for each tensor of the carry, to be indexed by step."""
        return [Leaf(self, i) for i in range(len(self.stored[0]))]

    def at(self, t: int) -> list[Tensor]:
        """The carry that enters step t."""
        segment, offset = divmod(t, self.every)
        if segment == self._segment + 1 and offset == 0 and self._behind:
            return self._behind
        if segment != self._segment:
            self._behind = self._carries[0] if segment == self._segment - 1 else []
            self._segment, self._carries = segment, self._run(self._first(segment), segment)
        return self._carries[offset]

    def _first(self, segment: int) -> list[Tensor]:
        """The carry that enters a segment, from the last one stored before it, storing others on the way."""
        self.stored = {i: carry for i, carry in self.stored.items() if i <= segment}
        at = max(self.stored)
        carry = self.stored[at]
        while at < segment:
            free = self.slots - (len(self.stored) - 1)
            m = at + first_part(segment + 1 - at, free) if free > 0 else segment
            for i in range(at, m):
                carry = self._after(self._run(carry, i)[-1], (i + 1) * self.every - 1)
            at = m
            if free > 0:
                self.stored[at] = carry
        return carry

    def _run(self, carry: list[Tensor], segment: int) -> list[list[Tensor]]:
        """The carries that enter the steps of a segment."""
        first, carries = segment * self.every, [carry]
        for t in range(first, min(first + self.every, self.T) - 1):
            carries.append(self._after(carries[-1], t))
        return carries

    def _after(self, carry: list[Tensor], t: int) -> list[Tensor]:
        """The carry that enters step t+1."""
        visit = self.replay.visit(t, carry, [x[t] for x in self.xs], self.captured)
        return reset([o.detach() for o in visit.outputs[: len(carry)]], self.resets, t + 1)


@dataclass(frozen=True)
class Leaf:
    """One tensor of the carry, by step."""

    rebuilt: Rebuilt
    i: int

    def __getitem__(self, t: int) -> Tensor:
        return self.rebuilt.at(t)[self.i]
