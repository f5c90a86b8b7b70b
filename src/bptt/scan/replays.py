"""What the forward computed: where a first-order backward replays steps from, and what every replay must give again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .pytrees import beside, differentiable, fresh, reset
from .replay import Replay, Visit, differs
from .segments import Segment

__all__ = ["ForwardValues", "StepReplays"]


@dataclass(frozen=True)
class ForwardValues:
    """What the forward pass gave, and every replay must give again.

    T: steps. final: the last carry. ys: `[T, ...]`. resets: `[T, B]` or `[T, 1]`.
    """

    T: int
    final: Sequence[Tensor]
    ys: Sequence[Tensor]
    resets: Tensor | None

    def check(self, replay: Replay, visit: Visit, t: int, segment: Segment | None) -> None:
        """Raise RuntimeError where a visit of step t does not give what the forward gave.

        Tensors of integers and bools take no part in a gradient, and are not compared. segment: where t lies; None in
        double backward, where each step is recorded from the one before.
        """
        n, last = len(self.final), t == self.T - 1
        after = [] if segment is None else [c[t + 1 - segment.start] for c in segment.carry if not last]
        got = list(visit.outputs)
        expected = [*(self.final if last else after), *(y[t] for y in self.ys)]
        same = len(got) == n + len(self.ys)
        if same and not last:  # what was kept had been reset
            got[:n] = reset(got[:n], self.resets, t + 1) if after else []
        if same and all(_close(g, e, replay.rounding) for g, e in zip(got, expected, strict=True) if differentiable(e)):
            return
        raise differs(t)

    def check_merged(self, visit: Visit, times: list[int], segment: Segment, rounding: float = 0.0) -> bool:
        """Whether a merged visit of these steps, all of one segment, gives what the forward gave."""
        n, T = len(self.final), self.T
        later, final = [min(t + 1, T - 1) for t in times], [i for i, t in enumerate(times) if t == T - 1]
        expected = [kept[[t - segment.start for t in later]] for kept in segment.carry]
        for rows, c in zip(expected, self.final, strict=True):
            rows[final] = c
        expected += [y[times] for y in self.ys]
        got = [t.detach() for t in visit.outputs]
        if [g.shape for g in got] != [e.flatten(0, 1).shape for e in expected]:
            return False
        got = [g.unflatten(0, e.shape[:2]) for g, e in zip(got, expected, strict=True)]
        if self.resets is not None:
            zeroed = self.resets[later]
            zeroed[final] = False
            got[:n] = [c.masked_fill(beside(zeroed, c), 0) for c in got[:n]]
        return all(_close(g, e, rounding) for g, e in zip(got, expected, strict=True))


@dataclass
class StepReplays:
    """Steps as a first-order backward replays them: each visit is a graph of its own, cut off on all sides.

    xs: `[T, ...]`. captured: leaves in the place of the captured tensors. wanted: whether each of xs and of captured is
    to receive a gradient. segment: the steps that can be visited now, the last at first. earlier: the segments before,
    from the last to the first. checked: a visit has passed `Replay.check`.
    """

    replay: Replay
    values: ForwardValues
    xs: Sequence[Tensor]
    captured: Sequence[Tensor]
    wanted: Sequence[bool]
    segment: Segment
    earlier: Iterator[Segment]
    checked: bool = False

    def each_segment(self) -> Iterator[tuple[int, int]]:
        """(first step, step behind the last) of the segments, from the last to the first, each while it can be visited.

        One is in memory at a time.
        """
        yield self.segment.start, self.segment.stop
        while self.segment.start > 0:
            self.segment = replace(self.segment, carry=())  # let go before the next is computed
            self.segment = next(self.earlier)
            yield self.segment.start, self.segment.stop

    def visit(self, t: int) -> Visit:
        """Step t of the segment. Raises RuntimeError where it does not give what the forward gave."""
        carry = [c[t - self.segment.start] for c in self.segment.carry]
        visit = self._visit(t, carry, [x[t] for x in self.xs], self.wanted)
        self.values.check(self.replay, visit, t, self.segment)
        return visit

    def shared(self, t: int) -> Callable[[object], Visit]:
        """The same visit of step t for every block."""
        visit = self.visit(t)
        return lambda _: visit

    def visit_merged(self, times: list[int], wanted: Sequence[bool] | None = None) -> Visit:
        """Several steps of the segment as one of `[len(times) * B, ...]` rows: they draw no numbers.

        wanted: in the place of the replays' own. Whether it gives what the forward gave is for the caller to ask.
        """
        carry = [c[[t - self.segment.start for t in times]].flatten(0, 1) for c in self.segment.carry]
        return self._visit(times[0], carry, [x[times].flatten(0, 1) for x in self.xs], wanted or self.wanted)

    def fits(self, visit: Visit, times: list[int], rounding: float = 0.0) -> bool:
        """See `ForwardValues.check_merged`."""
        return self.values.check_merged(visit, times, self.segment, rounding)

    def _visit(self, t: int, carry: list[Tensor], xs: list[Tensor], wanted: Sequence[bool]) -> Visit:
        wanted = [*[True] * len(carry), *wanted]
        entries = [fresh(given, w) for given, w in zip([*carry, *xs], wanted, strict=False)]
        visit = self.replay.visit(t, [*entries, *self.captured])
        visit.wanted = [i for i in visit.wanted if wanted[i]]
        if not self.checked:
            self.replay.check(visit)
            self.checked = True
        return visit


def _close(got: Tensor, expected: Tensor, rounding: float) -> bool:
    """Equal but for rounding: a product over more rows may add up in another order."""
    got = got.detach()
    if got.shape != expected.shape or got.dtype != expected.dtype or got.device != expected.device:
        return False
    if torch.equal(got, expected):
        return True
    if not differentiable(got):
        return False
    tolerance = max(torch.finfo(got.dtype).eps, rounding) ** 0.5
    return torch.allclose(got, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
