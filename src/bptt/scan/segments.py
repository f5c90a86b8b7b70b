"""Carries that were not kept: run again, a segment at a time, from the checkpoint before them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..memory import Checkpoints, parse
from ..schedules import Schedule, binomial
from .leaves import reset
from .replay import Replay
from .replays import Segment, differs

__all__ = ["KeptCarries", "RecomputedCarries"]


@dataclass(frozen=True)
class KeptCarries:
    """Which carries a forward pass keeps: those before the segments that a schedule stores; without one, all.

    starts: the first step of each segment, and T.
    """

    starts: tuple[int, ...]
    schedule: Schedule | None = None

    @classmethod
    def of(cls, memory: str | Checkpoints, T: int, carry: Sequence[Tensor]) -> KeptCarries:
        """What a memory keeps of T such carries. Raises ValueError for a memory that is none, or too few bytes."""
        policy = parse(memory)
        if policy == "gates":
            raise ValueError("memory must be 'auto', 'states' or Checkpoints: a step of one's own has no gates")
        if not isinstance(policy, Checkpoints):
            return cls((0, T))
        size = max(1, sum(c.numel() * c.element_size() for c in carry))
        cut = policy.cut(T, size, size)
        if cut.steps == T or cut.slots == T - 1:
            return cls((0, T))
        steps = max(cut.steps, 2)  # a segment of one step has nothing to recompute: every carry would have to be kept
        # The first segment is the short one: the last has the two steps that tell whether rows are independent.
        starts = (0, *range((T - 1) % steps + 1, T + 1, steps))
        segments = len(starts) - 1
        return cls(starts, binomial(segments, policy.slots(segments, steps, size, size)))

    @property
    def before(self) -> Sequence[int]:
        """The steps before which a carry is kept, in order; that before step 0 is among the inputs of the call."""
        if self.schedule is None:
            return range(self.starts[-1])
        return [self.starts[i] for i in self.schedule.stored_forward]


@dataclass(frozen=True)
class RecomputedCarries:
    """The carries of a call that kept some.

    first: the carry that enters step 0. stored: by segment, the others that were kept. xs, captured: what a step is run
    again with. resets: `[T, B]` or `[T, 1]`.
    """

    replay: Replay
    starts: Sequence[int]
    schedule: Schedule
    first: list[Tensor]
    stored: Mapping[int, list[Tensor]]
    xs: Sequence[Tensor]
    captured: Sequence[Tensor]
    resets: Tensor | None

    def segments(self) -> Iterator[Segment]:
        """The segments from the last to the first. One is in memory at a time, if the caller lets go of it too."""
        kept = {0: self.first, **self.stored}
        at, carry = len(self.starts), self.first  # the carry at hand: none yet
        behind: list[Tensor] = []  # the carry that enters the segment behind
        for action in self.schedule.backward:
            i = action.first
            if action.kind == "S":
                kept[i] = carry = [c.clone() for c in carry]  # a step may give views of something larger
            elif action.kind == "D":
                del kept[i]
            else:
                carry = carry if at == i else kept[i]
                if action.kind == "A":
                    at = action.last
                    for t in range(self.starts[i], self.starts[at]):
                        carry = self._after(carry, t)
                else:
                    yield Segment(self.starts[i], self.starts[i + 1], self._entering(i, carry, behind))
                    at, behind = i, carry

    def _entering(self, i: int, carry: list[Tensor], behind: list[Tensor]) -> list[Tensor]:
        """The carries that enter the steps of segment i, and, where there is one, the step behind it."""
        a, b = self.starts[i : i + 2]
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
        after = self.replay.again(t, carry, [x[t] for x in self.xs], self.captured)
        if [(c.shape, c.dtype) for c in after] != [(c.shape, c.dtype) for c in carry]:
            raise differs(t)
        return reset(after, self.resets, t + 1)
