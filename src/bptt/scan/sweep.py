"""The block sweep over replayed steps: one step at a time, or the blocks side by side where rows are independent."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from .graph import Block, scaled
from .leaves import added, beside, differentiable
from .replays import StepReplays
from .visit import Visit

__all__ = ["MISFITS", "Grads", "Sweep", "exhausted", "independent"]

Grads = list[Tensor | None]

MISFITS = (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, AssertionError)
"""What a step may raise that is made for B rows and is given more; of them, not those that tell of `exhausted`."""

_Left = tuple[list[Block], list[Tensor]]  # blocks that go on in the segment before, and their adjoints

# Elements of carry, x and y that one merged step may take at once: bounds the memory of a walk over many blocks.
_MERGED_ELEMENTS = 2**20


@dataclass
class _Sums:
    """What all blocks send to first carry, xs and captured tensors so far."""

    dfirst: Grads
    dxs: Grads
    dcaptured: Grads


@dataclass(frozen=True)
class Sweep:
    """How far the adjoints walk; both ways of walking return the gradients of first carry, xs and captured tensors.

    blocks: (earliest step walked to, first loss, last loss). edge_factors: `[T, B]` or `[T, 1]`, what multiplies the
    adjoint on its way from step t to step t-1; None is 1 everywhere. dcarry: cotangents of the final carry. dys: of the
    ys.
    """

    blocks: Sequence[Block]
    edge_factors: Tensor | None

    def one_by_one(
        self,
        visits: Callable[[int], Callable[[Block], Visit]],
        T: int,
        m: int,
        dcarry: Sequence[Tensor | None],
        dys: Sequence[Tensor | None],
    ) -> Grads:
        """One step after the other, with one vector-Jacobian product per block that walks over it.

        visits: the visit of a step for a block; asked once per step, so that blocks may share it. m: how many xs.
        """
        n = len(dcarry)
        waiting = list(self.blocks)
        walking: dict[Block, Grads] = {}
        dfirst: Grads = [None] * n
        dxs: list[Grads] = []
        dcaptured: Grads = []
        for t in reversed(range(T)):
            if waiting and waiting[-1][2] == t:
                walking[waiting.pop()] = list(dcarry) if t == T - 1 else [None] * n
            visit_for = visits(t)
            total: Grads = []
            for block in list(walking):
                earliest, first, _ = block
                error = [None if dy is None or t < first else dy[t] for dy in dys]
                grads = visit_for(block).vjp([*walking.pop(block), *error])
                adjoint = [
                    _scaled(grad, None if self.edge_factors is None else self.edge_factors[t]) for grad in grads[:n]
                ]
                total = list(map(added, total or [None] * len(grads[n:]), grads[n:]))
                if t > earliest:
                    walking[block] = adjoint
                elif t == 0:
                    dfirst = list(map(added, dfirst, adjoint))
            dxs.append(total[:m])
            dcaptured = list(map(added, dcaptured or [None] * len(total[m:]), total[m:]))
            del visit_for  # and the visit that it holds, before another step is run
        return [*dfirst, *(_stacked(grads[::-1]) for grads in zip(*dxs, strict=True)), *dcaptured]

    def merged(
        self,
        replays: StepReplays,
        dcarry: Sequence[Tensor | None],
        dys: Sequence[Tensor | None],
        fits: Callable[[Visit, list[int]], bool],
    ) -> Grads | None:
        """The blocks side by side in the rows, each at a step of its own; `window` visits of (blocks * B) rows.

        Where the tape comes in several segments, each has visits of its own, and a block goes on in the segment before.
        fits: whether a visit of these steps is what it should be; None is returned once one is not.
        """
        # No rows of each leaf of the carry: nothing here may hold on to a segment.
        none = [c.new_empty(0, *c.shape[1:]) for c in replays.segment.carry]
        elements = sum(prod(t.shape[1:]) for t in (*none, *replays.xs, *dys) if t is not None)
        size = max(1, _MERGED_ELEMENTS // max(1, elements))
        dxs = [
            torch.zeros_like(x) if w and differentiable(x) else None
            for x, w in zip(replays.xs, replays.wanted, strict=False)
        ]
        sums = _Sums([None] * len(none), dxs, [None] * len(replays.captured))
        waiting = list(self.blocks)
        crossing: list[Block] = []  # from the segment behind, in order
        crossed = none  # their adjoints `[blocks, B, ...]`
        while True:
            begin = bisect_left(waiting, replays.segment.start, key=lambda block: block[2])
            new, waiting = waiting[begin:], waiting[:begin]
            blocks, left = [*new, *crossing], list[_Left]()
            for i in range(0, len(blocks), size):
                group = blocks[i : i + size]
                begun = min(max(0, len(new) - i), len(group))
                later = slice(max(0, i - len(new)), max(0, i + size - len(new)))
                adjoint: Grads = [
                    torch.cat([c.new_zeros(begun, *c.shape[1:]), rows[later]]) if differentiable(c) else None
                    for c, rows in zip(none, crossed, strict=True)
                ]
                if begun == len(group) and group[-1][2] == replays.T - 1:
                    for rows, dc in zip(adjoint, dcarry, strict=True):
                        if rows is not None and dc is not None:
                            rows[-1] = dc
                gone = self._together(replays, group, adjoint, dys, fits, sums)
                if gone is None:
                    return None
                left += gone
            if not waiting and not left:
                return [*sums.dfirst, *sums.dxs, *sums.dcaptured]
            crossing = [block for blocks, _ in left for block in blocks]
            crossed = [torch.cat([c, *(a[k] for _, a in left)]) for k, c in enumerate(none)]
            replays.back()

    def _together(
        self,
        replays: StepReplays,
        blocks: list[Block],
        adjoint: Grads,
        dys: Sequence[Tensor | None],
        fits: Callable[[Visit, list[int]], bool],
        sums: _Sums,
    ) -> list[_Left] | None:
        """Some blocks through the segment. Returns those that go on in the one before, None where a visit misfits."""
        n = len(adjoint)
        times = [min(last, replays.segment.stop - 1) for _, _, last in blocks]
        left: list[_Left] = []
        while blocks:
            visit = replays.visit_merged(times)
            if not fits(visit, times):
                return None
            error = [_error(dy, blocks, times) for dy in dys]
            grads = visit.vjp([None if rows is None else rows.flatten(0, 1) for rows in (*adjoint, *error)])
            by_block = [None if g is None else g.unflatten(0, (len(blocks), -1)) for g in grads[: n + len(sums.dxs)]]
            for dx, rows in zip(sums.dxs, by_block[n:], strict=True):
                if dx is not None and rows is not None:
                    dx.index_add_(0, torch.tensor(times, device=dx.device), rows)  # blocks may cross at one step
            sums.dcaptured = list(map(added, sums.dcaptured, grads[n + len(sums.dxs) :]))
            adjoint = [
                _scaled(rows, None if self.edge_factors is None else self.edge_factors[times]) for rows in by_block[:n]
            ]
            begun = [i for i, t in enumerate(times) if t == 0]
            sums.dfirst = [
                added(d, rows[begun].sum(0)) if begun and rows is not None else d
                for d, rows in zip(sums.dfirst, adjoint, strict=True)
            ]
            going = [i for i, (earliest, _, _) in enumerate(blocks) if times[i] > earliest]
            out = [i for i in going if times[i] == replays.segment.start]
            if out:
                arrived = [
                    c.new_zeros(len(out), *c.shape[1:]) if rows is None else rows[out]
                    for c, rows in zip(replays.segment.carry, adjoint, strict=True)
                ]
                left.append(([blocks[i] for i in out], arrived))
                going = [i for i in going if times[i] > replays.segment.start]
            if len(going) < len(blocks):
                adjoint = [None if rows is None else rows[going] for rows in adjoint]
            blocks, times = [blocks[i] for i in going], [times[i] - 1 for i in going]
        return left


def independent(replays: StepReplays) -> bool:
    """Whether the last two steps, run as one of 2B rows, give what the forward gave and mix no rows."""
    probe = replace(replays, wanted=[True] * len(replays.xs) + [False] * len(replays.captured))
    times = [replays.T - 2, replays.T - 1]
    try:
        visit = probe.visit_merged(times)
    except MISFITS as error:
        if exhausted(error):
            raise
        return False
    entries = len(replays.segment.carry) + len(replays.xs)
    return replays.fits(visit, times) and not _mixes_rows(visit, entries)


def exhausted(error: Exception) -> bool:
    """Whether the machine is at its end, and not the step: memory, or the stack. Its user has to know."""
    return isinstance(error, (torch.OutOfMemoryError, RecursionError))


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


def _scaled(adjoint: Tensor | None, factor: Tensor | None) -> Tensor | None:
    return adjoint if adjoint is None or factor is None else scaled(adjoint, factor)


def _error(dy: Tensor | None, blocks: Sequence[Block], times: list[int]) -> Tensor | None:
    """The local errors `[blocks, B, ...]` of blocks at these steps: zero before a block's first loss."""
    if dy is None:
        return None
    error = dy[times]
    error[[i for i, (_, first, _) in enumerate(blocks) if times[i] < first]] = 0
    return error


def _stacked(grads: Sequence[Tensor | None]) -> Tensor | None:
    some = next((grad for grad in grads if grad is not None), None)
    return None if some is None else torch.stack([torch.zeros_like(some) if g is None else g for g in grads])
