"""Which carries a call keeps, and its segments on the way back: carries that were not kept are computed again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from ..engine.rerun import reversals
from ..memory import Checkpoints, parse
from ..schedules import Schedule, binomial
from .pytrees import reset
from .replay import Replay, differs

__all__ = ["KeptCarries", "RecomputedCarries", "Segment"]


@dataclass(frozen=True)
class KeptCarries:
    """Which carries a forward pass keeps: those before the segments that a schedule stores; of a single segment, all.

    starts: the first step of each segment, and T.
    """

    starts: tuple[int, ...]
    schedule: Schedule

    @classmethod
    def of(cls, memory: str | Checkpoints, T: int, carry: Sequence[Tensor]) -> KeptCarries:
        """What a memory keeps of T such carries. Raises ValueError for a memory that is none, or too few bytes."""
        policy, whole = parse(memory), cls((0, T), binomial(1, 0))
        if policy == "gates":
            raise ValueError("memory must be 'auto', 'states' or Checkpoints: a step of one's own has no gates")
        if not isinstance(policy, Checkpoints):
            return whole
        size = max(1, sum(c.numel() * c.element_size() for c in carry))
        cut = policy.cut(T, size, size)
        if cut.steps == T or cut.slots == T - 1:
            return whole
        steps = max(cut.steps, 2)  # a segment of one step has nothing to recompute: every carry would have to be kept
        # The first segment is the short one: the last has the two steps that tell whether rows are independent.
        starts = (0, *range((T - 1) % steps + 1, T + 1, steps))
        segments = len(starts) - 1
        return cls(starts, binomial(segments, policy.slots(segments, steps, size, size)))

    @property
    def whole(self) -> bool:
        """Whether all carries are kept."""
        return len(self.starts) == 2

    @property
    def before(self) -> Sequence[int]:
        """The steps before which a carry is kept, in order; that before step 0 is among the inputs of the call."""
        return range(self.starts[-1]) if self.whole else [self.starts[i] for i in self.schedule.stored_forward]


@dataclass(frozen=True)
class Segment:
    """The carries, resets applied, that enter steps start to stop-1, and step stop where there is one: `[n, ...]`."""

    start: int
    stop: int
    carry: Sequence[Tensor]


@dataclass(frozen=True)
class RecomputedCarries:
    """The carries of a call, from those that it kept.

    carry: the first. tape: those that were kept `[n, ...]`. xs, captured: what a step is run again with. resets:
    `[T, B]` or `[T, 1]`.
    """

    kept: KeptCarries
    replay: Replay
    carry: Sequence[Tensor]
    tape: Sequence[Tensor]
    xs: Sequence[Tensor]
    captured: Sequence[Tensor]
    resets: Tensor | None

    def segments(self) -> Iterator[Segment]:
        """The segments from the last to the first. One is in memory at a time, if the caller lets go of it too."""
        starts, schedule = self.kept.starts, self.kept.schedule
        first = [c.detach() for c in reset(self.carry, self.resets, 0)]
        stored = {i: partial(self._stored, n) for n, i in enumerate(schedule.stored_forward)}
        behind: list[Tensor] = []  # the carry that enters the segment behind
        for i, carry in reversals(schedule.backward, first, stored, self._advance, _owned):
            a, b = starts[i : i + 2]
            yield Segment(a, b, self.tape if self.kept.whole else self._entering(a, b, carry, behind))
            behind = carry

    def _stored(self, n: int) -> list[Tensor]:
        return [c[n] for c in self.tape]

    def _advance(self, i: int, carry: list[Tensor]) -> list[Tensor]:
        """The carry behind segment i."""
        for t in range(*self.kept.starts[i : i + 2]):
            carry = self._after(carry, t)
        return carry

    def _entering(self, a: int, b: int, carry: list[Tensor], behind: list[Tensor]) -> list[Tensor]:
        """The carries that enter the steps a to b-1, from the first, and step b, where there is one."""
        found = [c.new_empty((b - a + bool(behind), *c.shape)) for c in carry]
        for t in range(a, b):
            for rows, c in zip(found, carry, strict=True):
                rows[t - a] = c
            if t < b - 1:
                carry = self._after(carry, t)
        for rows, c in zip(found, behind, strict=False):
            rows[-1] = c
        return found

    def _after(self, carry: list[Tensor], t: int) -> list[Tensor]:
        """The carry that enters step t+1."""
        after = self.replay.again(t, [*carry, *(x[t] for x in self.xs), *self.captured])
        if [(c.shape, c.dtype) for c in after] != [(c.shape, c.dtype) for c in carry]:
            raise differs(t)
        return reset(after, self.resets, t + 1)


def _owned(carry: list[Tensor]) -> list[Tensor]:
    """For the way back to keep: a step may give views of something larger."""
    return [c.clone() for c in carry]
