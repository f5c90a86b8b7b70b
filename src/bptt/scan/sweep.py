"""The block sweep over the steps of a scan: one driver over segments, and two ways to sweep blocks through one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from .graph import Block, scaled
from .pytrees import added, beside, differentiable
from .replay import Visit
from .segments import StepReplays

__all__ = ["EXHAUSTED", "MISFITS", "CoupledRows", "MergedRows", "PerLeaf", "block_sweep", "independent"]

PerLeaf = list[Tensor | None]
"""A gradient for each leaf, or an adjoint; None stands for zeros."""

MISFITS = (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, AssertionError)
"""The errors that a step for B rows may raise when it is given more rows; those in `EXHAUSTED` are excepted."""

EXHAUSTED = (torch.OutOfMemoryError, RecursionError)
"""The errors of a machine that has run out of memory or of stack: no fault of the step, and its user has to know."""

# Elements of carry, x and y that one merged step may use at once: bounds the memory of a sweep of many blocks.
_MERGED_ELEMENTS = 2**20


@dataclass
class SegmentSweep(ABC):
    """A way to sweep blocks through one segment after the other, with sums of the gradients that they send.

    segments: (first step, step after the last), from the last segment to the first. edge_factors: `[T, B]` or `[T, 1]`,
    which multiply the adjoint from step t to step t-1; None is 1 everywhere. dys: the cotangents of the ys. first,
    captured: the gradients sent to the first carry and to captured tensors; empty at first.
    """

    segments: Iterable[tuple[int, int]]
    edge_factors: Tensor | None
    dys: Sequence[Tensor | None]
    first: PerLeaf = field(default_factory=list, init=False)
    captured: PerLeaf = field(default_factory=list, init=False)

    @abstractmethod
    def sweep(self, a: int, b: int, adjoints: dict[Block, PerLeaf]) -> dict[Block, PerLeaf] | None:
        """Sweep blocks through the steps a to b-1. Returns the adjoints of those that go on before a.

        adjoints: those that blocks carry over from later segments, or have at their last losses; is emptied. Returns
        None where a step, run on merged rows, does not give what the forward gave.
        """

    @abstractmethod
    def dxs(self) -> PerLeaf:
        """The gradients sent to xs."""

    def across(self, adjoints: PerLeaf, t: int | list[int]) -> PerLeaf:
        """The adjoints after step t-1, from those before step t; of merged rows, at several steps."""
        if self.edge_factors is None:
            return adjoints
        factors = self.edge_factors[t]
        return [None if adjoint is None else scaled(adjoint, factors) for adjoint in adjoints]


def block_sweep(rows: SegmentSweep, blocks: Sequence[Block], dcarry: Sequence[Tensor | None]) -> PerLeaf | None:
    """The gradients of first carry, xs and captured tensors; None where merged rows do not give what the forward gave.

    blocks: (earliest step reached, first loss, last loss). dcarry: cotangents of the final carry, which belong to the
    last loss.
    """
    waiting, adjoints = list(blocks), dict[Block, PerLeaf]()
    for a, b in rows.segments:
        new = bisect_left(waiting, a, key=lambda block: block[2])
        adjoints |= {block: list(dcarry) if block is blocks[-1] else [None] * len(dcarry) for block in waiting[new:]}
        del waiting[new:]
        left = rows.sweep(a, b, adjoints)
        if left is None:
            return None
        adjoints = left
    return [*rows.first, *rows.dxs(), *rows.captured]


@dataclass
class CoupledRows(SegmentSweep):
    """A sweep of one step after the other, with one vector-Jacobian product per block that reaches it.

    visits: the visit of a step for a block; asked once per step, so that blocks may share it. xs: the number of xs.
    by_step: the gradients sent to xs, from the last step to the first.
    """

    visits: Callable[[int], Callable[[Block], Visit]]
    xs: int
    by_step: list[PerLeaf] = field(default_factory=list, init=False)

    def sweep(self, a: int, b: int, adjoints: dict[Block, PerLeaf]) -> dict[Block, PerLeaf]:
        waiting, active = sorted(adjoints), dict[Block, PerLeaf]()
        for t in reversed(range(a, b)):
            while waiting and waiting[-1][2] >= t:
                block = waiting.pop()
                active[block] = adjoints.pop(block)
            visit_for = self.visits(t)
            total: PerLeaf = []
            for block in list(active):
                earliest, first, _ = block
                adjoint = active.pop(block)
                n, error = len(adjoint), [None if dy is None or t < first else dy[t] for dy in self.dys]
                grads = visit_for(block).vjp([*adjoint, *error])
                adjoint, total = self.across(grads[:n], t), _added(total, grads[n:])
                if t > earliest:
                    active[block] = adjoint
                elif t == 0:
                    self.first = _added(self.first, adjoint)
            self.by_step.append(total[: self.xs])
            self.captured = _added(self.captured, total[self.xs :])
            del visit_for  # and the visit that it holds, before another step is run
        return active

    def dxs(self) -> PerLeaf:
        return [_stacked(grads[::-1]) for grads in zip(*self.by_step, strict=True)]


@dataclass
class MergedRows(SegmentSweep):
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

    def sweep(self, a: int, b: int, adjoints: dict[Block, PerLeaf]) -> dict[Block, PerLeaf] | None:
        waiting, leaving = sorted(adjoints), dict[Block, PerLeaf]()
        for i in range(0, len(waiting), self.most):
            blocks = waiting[i : i + self.most]
            # Zeros where nothing has arrived yet, so that a gradient is there whichever blocks are swept together.
            adjoint = [
                c.new_zeros(len(blocks), *c.shape[1:]) if rows is None and differentiable(c) else rows
                for c, rows in zip(
                    self.replays.segment.carry,
                    map(_stacked, zip(*map(adjoints.pop, blocks), strict=True)),
                    strict=True,
                )
            ]
            times = [min(last, b - 1) for _, _, last in blocks]
            while blocks:
                visit = self.replays.visit_merged(times)
                if not self.replays.fits(visit, times, self.rounding):
                    return None
                adjoint = self.across(self._pulled(visit, blocks, times, adjoint), times)
                at_0 = [k for k, t in enumerate(times) if t == 0]
                if at_0:
                    self.first = _added(self.first, [None if rows is None else rows[at_0].sum(0) for rows in adjoint])
                going = [k for k, (earliest, _, _) in enumerate(blocks) if times[k] > earliest]
                cross = [k for k in going if times[k] == a]
                if cross:
                    sent = ([None] * len(cross) if rows is None else rows[cross].unbind() for rows in adjoint)
                    leaving |= zip([blocks[k] for k in cross], map(list, zip(*sent, strict=True)), strict=True)
                    going = [k for k in going if times[k] > a]
                if len(going) < len(blocks):
                    adjoint = [None if rows is None else rows[going] for rows in adjoint]
                blocks, times = [blocks[k] for k in going], [times[k] - 1 for k in going]
        return leaving

    def _pulled(self, visit: Visit, blocks: list[Block], times: list[int], adjoint: PerLeaf) -> PerLeaf:
        """The adjoints `[blocks, B, ...]` before these steps, from those after them; the sums receive the gradients."""
        error = [None if dy is None else dy[times] for dy in self.dys]
        outside = [k for k, (_, first, _) in enumerate(blocks) if times[k] < first]
        for rows in error:
            if rows is not None:
                rows[outside] = 0
        grads = visit.vjp([None if rows is None else rows.flatten(0, 1) for rows in (*adjoint, *error)])
        n, m = len(adjoint), len(self.sums)
        by_block = [None if grad is None else grad.unflatten(0, (len(blocks), -1)) for grad in grads[: n + m]]
        for dx, rows in zip(self.sums, by_block[n:], strict=True):
            if dx is not None and rows is not None:
                dx.index_add_(0, torch.tensor(times, device=dx.device), rows)  # blocks may cross at one step
        self.captured = _added(self.captured, grads[n + m :])
        return by_block[:n]

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
