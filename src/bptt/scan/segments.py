"""The steps of a call in its backward pass: which carries were kept, and the replays from them, segment by segment.

Carries that were not kept are recomputed, and every replay must give what the forward pass gave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..engine import reversals
from ..memory import Checkpoints, parse
from ..policies import EVERYTHING
from ..schedules import Schedule, binomial
from .pytrees import beside, differentiable, fresh, put, reset
from .replay import Replay, Visit, differs

__all__ = ["KeptCarries", "ScanCall", "Segment", "StepReplays", "close"]


@dataclass(frozen=True)
class KeptCarries:
    """The carries that a forward pass keeps: those at the segment starts that a schedule stores; of one segment, all.

    starts: the first step of each segment, and T.
    """

    starts: tuple[int, ...]
    schedule: Schedule

    @classmethod
    def of(cls, memory: str | Checkpoints, T: int, carry: Sequence[Tensor]) -> KeptCarries:
        """The carries that a memory keeps of T such carries. Raises ValueError for an unknown one, or too few bytes."""
        policy, whole = parse(memory), cls((0, T), binomial(1, 0))
        if not isinstance(policy, Checkpoints):
            return whole
        size = max(1, sum(c.numel() * c.element_size() for c in carry))
        cut = policy.cut(T, size, size)
        if cut.steps == T or cut.slots == T - 1:
            return whole
        steps = max(cut.steps, 2)  # a segment of one step has nothing to recompute: every carry would have to be kept
        # The first segment is the short one: the last has the two steps that tell whether rows are independent.
        starts = tuple([T - a for a in reversed(EVERYTHING.segment_starts(T, steps))])
        segments = len(starts) - 1
        return cls(starts, binomial(segments, policy.slots(segments, steps, size, size)))

    @property
    def whole(self) -> bool:
        """Whether all carries are kept."""
        return len(self.starts) == 2

    @property
    def before(self) -> Sequence[int]:
        """The steps before which a carry is kept, in order; the one before step 0 is among the inputs of the call."""
        return range(self.starts[-1]) if self.whole else [self.starts[i] for i in self.schedule.stored_forward]


@dataclass(frozen=True)
class Segment:
    """The carries `[n, ...]`, after resets, that enter steps start to stop-1, and step stop where there is one."""

    start: int
    stop: int
    carry: Sequence[Tensor]


@dataclass(frozen=True)
class ScanCall:
    """A call of scan as its backward pass sees it: its inputs, its outputs, and the replay of its steps.

    carry: the first carry. captured: the tensors in the place of the captured ones. final: the last carry. xs, ys:
    `[T, ...]`. resets: `[T, B]` or `[T, 1]`.
    """

    replay: Replay
    carry: Sequence[Tensor]
    xs: Sequence[Tensor]
    captured: Sequence[Tensor]
    final: Sequence[Tensor]
    ys: Sequence[Tensor]
    resets: Tensor | None

    @property
    def T(self) -> int:
        """The number of steps."""
        return len(self.replay.carry)

    def after(self, t: int, carry: list[Tensor]) -> list[Tensor]:
        """The carry that enters step t+1, recomputed from the one that enters step t."""
        after = self.replay.again(t, [*carry, *(x[t] for x in self.xs), *self.captured])
        if [(c.shape, c.dtype) for c in after] != [(c.shape, c.dtype) for c in carry]:
            raise differs(t)
        return reset(after, self.resets, t + 1)

    def check(self, visit: Visit, t: int, segment: Segment | None) -> None:
        """Raise RuntimeError where a visit of step t does not give what the forward pass gave.

        Tensors of integers and bools take no part in a gradient, and are not compared. segment: where t lies; None in
        double backward, where each step is recorded from the one before.
        """
        n, last = len(self.final), t == self.T - 1
        after = [] if segment is None else [c[t + 1 - segment.start] for c in segment.carry if not last]
        got = list(visit.outputs)
        expected = [*(self.final if last else after), *(y[t] for y in self.ys)]
        same = len(got) == n + len(self.ys)
        if same and not last:  # the expected carry is one after resets
            got[:n] = reset(got[:n], self.resets, t + 1) if after else []
        rounding = self.replay.rounding
        if same and all(close(g, e, rounding) for g, e in zip(got, expected, strict=True) if differentiable(e)):
            return
        raise differs(t)


@dataclass
class StepReplays:
    """The replays of a first-order backward pass: each visit is a graph of its own, cut off on all sides.

    call: with leaves in the place of the captured tensors. wanted: whether each of xs and of captured is to receive a
    gradient. segment: the one whose steps can be visited now, first the last one. earlier: the segments before it, from
    the last to the first. checked: a visit has passed `Replay.check`.
    """

    call: ScanCall
    wanted: Sequence[bool]
    segment: Segment
    earlier: Iterator[Segment]
    checked: bool = False

    @classmethod
    def of(cls, call: ScanCall, wanted: Sequence[bool], kept: KeptCarries, tape: Sequence[Tensor]) -> StepReplays:
        """The replays from the carries that a call kept `[n, ...]`."""
        segments = _segments(call, kept, tape)
        return cls(call, wanted, next(segments), segments)

    def each_segment(self) -> Iterator[tuple[int, int]]:
        """(first step, step after the last) of the segments, from the last to the first, each while it can be visited.

        One is in memory at a time.
        """
        yield self.segment.start, self.segment.stop
        while self.segment.start > 0:
            self.segment = replace(self.segment, carry=())  # released before the next is computed
            self.segment = next(self.earlier)
            yield self.segment.start, self.segment.stop

    def visit(self, t: int) -> Visit:
        """Step t of the segment. Raises RuntimeError where it does not give what the forward gave."""
        carry = [c[t - self.segment.start] for c in self.segment.carry]
        visit = self._visit(t, carry, [x[t] for x in self.call.xs], self.wanted)
        self.call.check(visit, t, self.segment)
        return visit

    def shared(self, t: int) -> Callable[[object], Visit]:
        """The same visit of step t for every block."""
        visit = self.visit(t)
        return lambda _: visit

    def visit_merged(self, times: list[int], wanted: Sequence[bool] | None = None) -> Visit:
        """Several steps of the segment as one of `[len(times) * B, ...]` rows: they draw no numbers.

        wanted: replaces the replays' own. The caller must ask whether the visit `fits`.
        """
        carry = [c[[t - self.segment.start for t in times]].flatten(0, 1) for c in self.segment.carry]
        return self._visit(times[0], carry, [x[times].flatten(0, 1) for x in self.call.xs], wanted or self.wanted)

    def fits(self, visit: Visit, times: list[int], rounding: float = 0.0) -> bool:
        """Whether a merged visit of these steps gives what the forward pass gave."""
        call, n, T = self.call, len(self.call.final), self.call.T
        later, final = [min(t + 1, T - 1) for t in times], [i for i, t in enumerate(times) if t == T - 1]
        expected = [c[[t - self.segment.start for t in later]] for c in self.segment.carry]
        for rows, c in zip(expected, call.final, strict=True):
            rows[final] = c
        expected += [y[times] for y in call.ys]
        got = [t.detach() for t in visit.outputs]
        if [g.shape for g in got] != [e.flatten(0, 1).shape for e in expected]:
            return False
        got = [g.unflatten(0, e.shape[:2]) for g, e in zip(got, expected, strict=True)]
        if call.resets is not None:
            zeroed = call.resets[later]
            zeroed[final] = False
            got[:n] = [c.masked_fill(beside(zeroed, c), 0) for c in got[:n]]
        return all(close(g, e, rounding) for g, e in zip(got, expected, strict=True))

    def _visit(self, t: int, carry: list[Tensor], xs: list[Tensor], wanted: Sequence[bool]) -> Visit:
        wanted = [*[True] * len(carry), *wanted]
        entries = [fresh(given, w) for given, w in zip([*carry, *xs], wanted, strict=False)]
        visit = self.call.replay.visit(t, [*entries, *self.call.captured])
        visit.wanted = [i for i in visit.wanted if wanted[i]]
        if not self.checked:
            self.call.replay.check(visit)
            self.checked = True
        return visit


def _segments(call: ScanCall, kept: KeptCarries, tape: Sequence[Tensor]) -> Iterator[Segment]:
    """The segments from the last to the first. One is in memory at a time, if the caller releases it too."""
    starts, schedule = kept.starts, kept.schedule
    first = [c.detach() for c in reset(call.carry, call.resets, 0)]
    next_carry: list[Tensor] = []  # the carry that enters the segment after this one

    def row(n: int) -> list[Tensor]:
        return [c[n] for c in tape]

    def advance(a: int, b: int, carry: list[Tensor]) -> list[Tensor]:
        for t in range(a, b):
            carry = call.after(t, carry)
        return carry

    def owned(carry: list[Tensor]) -> list[Tensor]:
        return [c.clone() for c in carry]  # a step may give views of something larger

    stored = {i: partial(row, n) for n, i in enumerate(schedule.stored_forward)}
    for a, b, carry in reversals(starts, schedule.backward, first, stored, advance, owned):
        yield Segment(a, b, tape if kept.whole else _entering(call, a, b, carry, next_carry))
        next_carry = carry


def _entering(call: ScanCall, a: int, b: int, carry: list[Tensor], next_carry: list[Tensor]) -> list[Tensor]:
    """The carries that enter the steps a to b-1, from the first, and step b, where there is one."""
    found = [c.new_empty((b - a + bool(next_carry), *c.shape)) for c in carry]
    for t in range(a, b):
        put(found, t - a, carry)
        if t < b - 1:
            carry = call.after(t, carry)
    put(found, -1, next_carry)
    return found


def close(got: Tensor, expected: Tensor, rounding: float = 0.0) -> bool:
    """Whether two tensors are equal up to rounding: a product over more rows may add up in another order."""
    got = got.detach()
    if got.shape != expected.shape or got.dtype != expected.dtype or got.device != expected.device:
        return False
    if torch.equal(got, expected):
        return True
    if not differentiable(got):
        return False
    tolerance = max(torch.finfo(got.dtype).eps, rounding) ** 0.5
    return torch.allclose(got, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
