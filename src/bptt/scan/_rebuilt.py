"""Carries that were not kept: run again, a segment at a time, from the checkpoint before them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ._replay import Replay
from ._tape import reset

__all__ = ["Leaf", "Rebuilt"]


@dataclass
class Rebuilt:
    """The carry that enters each step, of which only every `every`-th was kept.

    kept: for each leaf `[segments, ...]`. xs, captured: what a step is run again with. resets: `[T, B]` or `[T, 1]`.
    One segment's carries are in memory at a time: the walk visits steps from the last to the first.
    """

    replay: Replay
    kept: Sequence[Tensor]
    every: int
    T: int
    xs: Sequence[Tensor]
    captured: Sequence[Tensor]
    resets: Tensor | None
    _segment: int = -1
    _carries: list[list[Tensor]] = field(default_factory=list)

    def leaves(self) -> list[Leaf]:
        """One for each tensor of the carry, to be indexed by step."""
        return [Leaf(self, i) for i in range(len(self.kept))]

    def at(self, t: int) -> list[Tensor]:
        """The carry that enters step t."""
        segment, behind = divmod(t, self.every)
        if behind == 0:
            return [c[segment] for c in self.kept]
        if segment != self._segment:
            self._run(segment)
        return self._carries[behind]

    def _run(self, segment: int) -> None:
        first = segment * self.every
        carries = [[c[segment] for c in self.kept]]
        for t in range(first, min(first + self.every, self.T) - 1):
            visit = self.replay.visit(t, carries[-1], [x[t] for x in self.xs], self.captured)
            after = [o.detach() for o in visit.outputs[: len(self.kept)]]
            carries.append(reset(after, self.resets, t + 1))
        self._segment, self._carries = segment, carries


@dataclass(frozen=True)
class Leaf:
    """One tensor of the carry, by step."""

    rebuilt: Rebuilt
    i: int

    def __getitem__(self, t: int) -> Tensor:
        return self.rebuilt.at(t)[self.i]
