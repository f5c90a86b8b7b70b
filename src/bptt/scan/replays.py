"""What the forward computed: where a first-order backward replays steps from, and what every replay must give again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .leaves import beside, differentiable, fresh, reset
from .replay import Replay
from .visit import Visit

__all__ = ["ForwardValues", "Segment", "StepReplays", "differs"]


@dataclass(frozen=True)
class Segment:
    """The carries, resets applied, that enter steps start to stop-1, and step stop where there is one: `[n, ...]`."""

    start: int
    stop: int
    carry: Sequence[Tensor]


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
    """Where a first-order backward replays steps from: each visit is a graph of its own, cut off on all sides.

    xs: `[T, ...]`. captured: leaves in the place of the captured tensors. wanted: whether each of xs and of captured is
    to receive a gradient. segment: the steps that can be visited now, the last at first. segments: those before,
    from the last to the first. checked: a visit has passed `Replay.check`.
    """

    replay: Replay
    values: ForwardValues
    xs: Sequence[Tensor]
    captured: Sequence[Tensor]
    wanted: Sequence[bool]
    segment: Segment
    segments: Iterator[Segment]
    checked: bool = False

    @property
    def T(self) -> int:
        return self.values.T

    def back(self) -> None:
        """Go on to the segment before."""
        self.segment = replace(self.segment, carry=())  # let go before the next is built: one is in memory at a time
        self.segment = next(self.segments)

    def visit(self, t: int) -> Visit:
        """Step t, of this segment or of one before."""
        while t < self.segment.start:
            self.back()
        visit = self._visit(t, [c[t - self.segment.start] for c in self.segment.carry], [x[t] for x in self.xs])
        self.values.check(self.replay, visit, t, self.segment)
        return visit

    def visit_merged(self, times: list[int]) -> Visit:
        """Several steps of this segment as one of `[len(times) * B, ...]` rows: they draw no numbers.

        Whether it gives what the forward gave is for the caller to ask.
        """
        carry = [c[[t - self.segment.start for t in times]].flatten(0, 1) for c in self.segment.carry]
        return self._visit(times[0], carry, [x[times].flatten(0, 1) for x in self.xs])

    def fits(self, visit: Visit, times: list[int], rounding: float = 0.0) -> bool:
        """See `ForwardValues.check_merged`."""
        return self.values.check_merged(visit, times, self.segment, rounding)

    def _visit(self, t: int, carry: list[Tensor], xs: list[Tensor]) -> Visit:
        carry = [fresh(c, True) for c in carry]
        x = [fresh(x, wanted) for x, wanted in zip(xs, self.wanted, strict=False)]
        visit = self.replay.visit(t, carry, x, self.captured)
        visit.wanted = [i for i in visit.wanted if i < len(carry) or self.wanted[i - len(carry)]]
        if not self.checked:
            self.replay.check(visit)
            self.checked = True
        return visit


def differs(t: int) -> RuntimeError:
    """The error for a step that gives another result in backward."""
    return RuntimeError(
        f"step, run again in backward, gave another result at step {t}: it must depend on carry, x and captured "
        "tensors alone (captured state it changes, random numbers from another generator than torch's default, or "
        "a module switched between train and eval?)"
    )


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
