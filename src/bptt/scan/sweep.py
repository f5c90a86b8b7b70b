"""Two ways to sweep blocks through a segment of replayed steps: one step after the other, or side by side as rows.

A column (see `kernels.frames`) is a block with all lanes: its adjoint has the shape of the carry's leaf, whatever that
is, and adjoints are `[N, ...]`. None stands for zeros.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from ..engine import Tensors, block_sweep, given
from ..kernels import Blocks, Frames
from .graph import after_edge
from .pytrees import added, beside, differentiable
from .replay import Visit
from .segments import StepReplays

__all__ = ["EXHAUSTED", "MISFITS", "CoupledRows", "MergedRows", "PerLeaf", "RowsDiffer", "independent"]

PerLeaf = list[Tensor | None]
"""A gradient for each leaf, or an adjoint."""

MISFITS = (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, AssertionError)
"""The errors that a step for B rows may raise when it is given more rows; those in `EXHAUSTED` are excepted."""

EXHAUSTED = (torch.OutOfMemoryError, RecursionError)
"""The errors of a machine that has run out of memory or of stack: no fault of the step, and its user has to know."""

# Elements of carry, x and y that one merged step may use at once: bounds the memory of a sweep of many blocks.
_MERGED_ELEMENTS = 2**20


class RowsDiffer(Exception):  # noqa: N818  the caller takes another way
    """A step, run on merged rows, does not give what the forward gave."""


@dataclass
class ReplayedSweep(ABC):
    """A way to sweep columns through one segment after the other, with sums of the gradients that they send.

    segments: (first step, step after the last), from the last segment to the first. edge_factors: `[T, B]` or `[T, 1]`,
    which multiply the adjoint from step t to step t-1; None is 1 everywhere. dys: the cotangents of the ys. captured:
    the gradients sent to captured tensors; empty at first.
    """

    segments: Iterable[tuple[int, int]]
    edge_factors: Tensor | None
    dys: Sequence[Tensor | None]
    captured: PerLeaf = field(default_factory=list, init=False)

    def grads(self, columns: Blocks, dcarry: Sequence[Tensor | None]) -> PerLeaf:
        """The gradients of first carry, xs and captured tensors. dcarry: the cotangents of the final carry."""
        final = tuple([None if d is None else d[None] for d in dcarry])
        first = block_sweep(columns, self.segments, final, self.sweep)
        return [*(None if d is None else d[0] for d in first), *self.dxs(), *self.captured]

    @abstractmethod
    def sweep(self, a: int, b: int, columns: Frames, arriving: Tensors) -> Iterator[tuple[Frames, Tensors]]:
        """Sweep columns through the steps a to b-1: see `block_sweep`.

        Raises RowsDiffer where a step, run on merged rows, does not give what the forward gave.
        """

    @abstractmethod
    def dxs(self) -> PerLeaf:
        """The gradients sent to xs."""

    def across(self, adjoints: PerLeaf, t: int | list[int]) -> PerLeaf:
        """The adjoints after step t-1, from those before step t; of merged rows, at several steps."""
        if self.edge_factors is None:
            return adjoints
        factors = self.edge_factors[t]
        return [None if adjoint is None else after_edge(adjoint, factors) for adjoint in adjoints]


@dataclass
class CoupledRows(ReplayedSweep):
    """A sweep of one step after the other, with one vector-Jacobian product per block that reaches it.

    visits: the visit of a step for the block of a number; asked once per step, so that blocks may share it. xs: the
    number of xs. by_step: the gradients sent to xs, from the last step to the first.
    """

    visits: Callable[[int], Callable[[int], Visit]]
    xs: int
    by_step: list[PerLeaf] = field(default_factory=list, init=False)

    def sweep(self, a: int, b: int, columns: Frames, arriving: Tensors) -> Iterator[tuple[Frames, Tensors]]:
        start, first, top = columns.start.tolist(), columns.first.tolist(), columns.top.tolist()  # all ascend
        n, arrives = len(arriving), columns.arrives.tolist()
        adjoints = [[None if rows is None or row < 0 else rows[row] for rows in arriving] for row in arrives]
        del arriving
        for t in reversed(range(a, b)):
            visit_for = self.visits(t)
            total: PerLeaf = []
            for k in reversed(range(bisect_left(top, t - a), bisect_right(start, t - a))):
                error = [None if dy is None or t - a < first[k] else dy[t] for dy in self.dys]
                grads = visit_for(k).vjp([*adjoints[k], *error])
                total = _added(total, grads[n:])
                # Of a column that ends above the segment's first step nothing goes on.
                adjoints[k] = self.across(grads[:n], t) if start[k] < t - a or t == a else []
            self.by_step.append(total[: self.xs])
            self.captured = _added(self.captured, total[self.xs :])
            del visit_for  # and the visit that it holds, before another step is run
        down = [k for k in range(bisect_right(start, 0)) if any(rows is not None for rows in adjoints[k])]
        if down:
            picked = columns.pick(torch.tensor(down, device="cpu"))
            yield picked, tuple(map(_stacked, zip(*(adjoints[k] for k in down), strict=True)))

    def dxs(self) -> PerLeaf:
        return [_stacked(grads[::-1]) for grads in zip(*self.by_step, strict=True)]


@dataclass
class MergedRows(ReplayedSweep):
    """A sweep with blocks side by side as rows, each at its own step: `window` visits of (blocks * B) rows per segment.

    rounding: see `StepReplays.fits`, which every visit must pass.
    """

    replays: StepReplays
    rounding: float = 0.0

    def __post_init__(self) -> None:
        leaves = (*self.replays.segment.carry, *self.replays.call.xs, *self.dys)
        self.most = max(1, _MERGED_ELEMENTS // max(1, sum(prod(t.shape[1:]) for t in leaves if t is not None)))
        self.sums: PerLeaf = [
            torch.zeros_like(x) if wanted and differentiable(x) else None
            for x, wanted in zip(self.replays.call.xs, self.replays.wanted, strict=False)
        ]

    def sweep(self, a: int, b: int, columns: Frames, arriving: Tensors) -> Iterator[tuple[Frames, Tensors]]:
        for group in columns.groups(self.most):
            start, first, times = group.start.tolist(), group.first.tolist(), (group.top + a).tolist()
            numbers, adjoint = list(range(len(times))), self._begun(group.arrives.tolist(), arriving)
            while numbers:
                outside = [i for i, k in enumerate(numbers) if times[i] < a + first[k]]
                adjoint = self._pulled(times, outside, adjoint)
                going = [i for i, k in enumerate(numbers) if times[i] > a + start[k]]
                if len(going) < len(numbers):
                    down = [i for i, t in enumerate(times) if t == a]
                    if down:
                        left = [None if rows is None else rows[down] for rows in adjoint]
                        yield group.pick(torch.tensor([numbers[i] for i in down], device="cpu")), tuple(left)
                    adjoint = [None if rows is None else rows[going] for rows in adjoint]
                numbers, times = [numbers[i] for i in going], [times[i] - 1 for i in going]

    def _begun(self, arrives: list[int], arriving: Tensors) -> PerLeaf:
        """The adjoints with which columns begin, zeros where nothing arrives: so that any has a gradient."""
        to = [k for k, row in enumerate(arrives) if row >= 0]
        adjoint: PerLeaf = []
        for c, rows in zip(self.replays.segment.carry, arriving, strict=True):
            adjoint.append(c.new_zeros(len(arrives), *c.shape[1:]) if differentiable(c) else None)
            if rows is not None and to:
                given(adjoint[-1])[to] = rows[[arrives[k] for k in to]]
        return adjoint

    def _pulled(self, times: list[int], outside: list[int], adjoint: PerLeaf) -> PerLeaf:
        """The adjoints `[blocks, B, ...]` before these steps, from those after them; the sums receive the gradients.

        outside: the blocks that have no loss there.
        """
        visit = self.replays.visit_merged(times)
        if not self.replays.fits(visit, times, self.rounding):
            raise RowsDiffer
        error = [None if dy is None else dy[times] for dy in self.dys]
        for rows in error if outside else ():
            if rows is not None:
                rows[outside] = 0
        grads = visit.vjp([None if rows is None else rows.flatten(0, 1) for rows in (*adjoint, *error)])
        n, m = len(adjoint), len(self.sums)
        by_block = [None if grad is None else grad.unflatten(0, (len(times), -1)) for grad in grads[: n + m]]
        for dx, rows in zip(self.sums, by_block[n:], strict=True):
            if dx is not None and rows is not None:
                dx.index_add_(0, torch.tensor(times, device=dx.device), rows)  # blocks may cross at one step
        self.captured = _added(self.captured, grads[n + m :])
        return self.across(by_block[:n], times)

    def dxs(self) -> PerLeaf:
        return self.sums


def independent(replays: StepReplays) -> bool:
    """Whether the last two steps, run as one of 2B rows, give what the forward gave and mix no rows."""
    T, entries = replays.call.T, len(replays.segment.carry) + len(replays.call.xs)
    times = [T - 2, T - 1]
    try:
        visit = replays.visit_merged(times, wanted=[True] * len(replays.call.xs) + [False] * len(replays.call.captured))
    except EXHAUSTED:
        raise
    except MISFITS:
        return False
    return replays.fits(visit, times) and not _mixes_rows(visit, entries)


def _mixes_rows(visit: Visit, entries: int) -> bool:
    """Whether the Jacobian of the outputs in the first entries is not exactly zero between two different rows.

    A bit of the row number tells two different rows apart, so a cotangent on the rows with that bit set, and one on
    the others, reach every pair in both directions.
    """
    generator = torch.Generator("cpu").manual_seed(0)  # an own one: the caller's random numbers are not touched
    cotangents = [
        torch.randn(t.shape, generator=generator, device="cpu").to(t) if t.requires_grad else None
        for t in visit.outputs
    ]
    number = torch.arange(len(visit.outputs[0]), device="cpu")
    for bit in range((len(number) - 1).bit_length()):
        for side in (0, 1):
            other = (number >> bit) % 2 != side
            masked = [None if c is None else c.masked_fill(beside(other.to(c.device), c), 0) for c in cotangents]
            for grad in visit.vjp(masked)[:entries]:
                if grad is not None and grad[other.to(grad.device)].any():
                    return True
    return False


def _added(sums: PerLeaf, terms: PerLeaf) -> PerLeaf:
    """The sums with the terms added. sums: empty at first."""
    return list(map(added, sums or [None] * len(terms), terms))


def _stacked(grads: Sequence[Tensor | None]) -> Tensor | None:
    some = next((grad for grad in grads if grad is not None), None)
    if some is None:
        return None
    zero = torch.zeros_like(some) if any(grad is None for grad in grads) else some
    return torch.stack([zero if grad is None else grad for grad in grads])
