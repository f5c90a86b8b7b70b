"""The block sweep over replayed steps: one step at a time, or the blocks side by side where rows are independent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ._replay import Visit, added, differentiable
from ._tape import Tape, beside

__all__ = ["Block", "Grads", "Sweep", "independent"]

Block = tuple[int, int, int]
Grads = list[Tensor | None]

# Elements of carry, x and y that one merged step may take at once: bounds the memory of a walk over many blocks.
_MERGED_ELEMENTS = 2**20


@dataclass(frozen=True)
class Sweep:
    """How far the adjoints walk; both ways of walking return the gradients of first carry, xs and captured tensors.

    blocks: (earliest step walked to, first loss, last loss). edges: `[T, B]` or `[T, 1]`, what multiplies the adjoint
    on its way from step t to step t-1; None is 1 everywhere. dcarry: cotangents of the final carry. dys: of the ys.
    """

    blocks: Sequence[Block]
    edges: Tensor | None

    def one_by_one(
        self,
        visit: Callable[[int], Visit],
        T: int,
        m: int,
        dcarry: Sequence[Tensor | None],
        dys: Sequence[Tensor | None],
    ) -> Grads:
        """Each step is visited once, with one vector-Jacobian product per block that walks over it. m: how many xs."""
        n = len(dcarry)
        waiting = list(self.blocks)
        walking: dict[Block, Grads] = {}
        dfirst: Grads = [None] * n
        dxs: list[Grads] = []
        dcaptured: Grads = []
        for t in reversed(range(T)):
            if waiting and waiting[-1][2] == t:
                walking[waiting.pop()] = list(dcarry) if t == T - 1 else [None] * n
            step = visit(t)
            total: Grads = [None] * (len(step.entries) - n)
            for block in list(walking):
                earliest, first, _ = block
                error = [None if dy is None or t < first else dy[t] for dy in dys]
                grads = step.vjp([*walking.pop(block), *error])
                adjoint = [_scaled(grad, None if self.edges is None else self.edges[t]) for grad in grads[:n]]
                total = list(map(added, total, grads[n:]))
                if t > earliest:
                    walking[block] = adjoint
                elif t == 0:
                    dfirst = list(map(added, dfirst, adjoint))
            dxs.append(total[:m])
            dcaptured = list(map(added, dcaptured or [None] * len(total[m:]), total[m:]))
        return [*dfirst, *(_stacked(grads[::-1]) for grads in zip(*dxs, strict=True)), *dcaptured]

    def merged(
        self,
        tape: Tape,
        dcarry: Sequence[Tensor | None],
        dys: Sequence[Tensor | None],
        fits: Callable[[Visit, list[int]], bool],
    ) -> Grads | None:
        """The blocks side by side in the rows, each at a step of its own; `window` visits of (blocks * B) rows.

        fits: whether a visit of these steps is what it should be; None is returned once one is not.
        """
        n = len(tape.carry)
        leaves = [t for t in (*tape.carry, *tape.xs, *dys) if t is not None]
        B = leaves[0].shape[1]
        size = max(1, _MERGED_ELEMENTS * tape.T // max(1, sum(t.numel() for t in leaves)))
        dfirst: Grads = [None] * n
        dxs = [
            torch.zeros_like(x) if w and differentiable(x) else None for x, w in zip(tape.xs, tape.wanted, strict=False)
        ]
        dcaptured: Grads = [None] * len(tape.captured)
        for start in range(0, len(self.blocks), size):
            blocks = list(self.blocks[start : start + size])
            times = [last for _, _, last in blocks]
            # Adjoints are `[blocks, B, ...]`.
            adjoint: Grads = [c.new_zeros(len(blocks), *c.shape[1:]) if differentiable(c) else None for c in tape.carry]
            if times[-1] == tape.T - 1:
                for rows, dc in zip(adjoint, dcarry, strict=True):
                    if rows is not None and dc is not None:
                        rows[-1] = dc
            while blocks:
                visit = tape.visit_merged(times)
                if not fits(visit, times):
                    return None
                error = [_error(dy, blocks, times) for dy in dys]
                grads = visit.vjp([None if rows is None else rows.flatten(0, 1) for rows in (*adjoint, *error)])
                by_block = [None if g is None else g.unflatten(0, (len(blocks), B)) for g in grads[: n + len(dxs)]]
                for dx, rows in zip(dxs, by_block[n:], strict=True):
                    if dx is not None and rows is not None:
                        dx[times] += rows
                dcaptured = list(map(added, dcaptured, grads[n + len(dxs) :]))
                adjoint = [_scaled(rows, None if self.edges is None else self.edges[times]) for rows in by_block[:n]]
                begun = [i for i, t in enumerate(times) if t == 0]
                dfirst = [
                    added(d, rows[begun].sum(0)) if begun and rows is not None else d
                    for d, rows in zip(dfirst, adjoint, strict=True)
                ]
                going = [i for i, (earliest, _, _) in enumerate(blocks) if times[i] > earliest]
                if len(going) < len(blocks):
                    adjoint = [None if rows is None else rows[going] for rows in adjoint]
                blocks, times = [blocks[i] for i in going], [times[i] - 1 for i in going]
        return [*dfirst, *dxs, *dcaptured]


def independent(tape: Tape) -> bool:
    """Whether the last two steps, run as one of 2B rows, give what the forward gave and mix no rows."""
    probe = replace(tape, wanted=[True] * len(tape.xs) + [False] * len(tape.captured))
    times = [tape.T - 2, tape.T - 1]
    try:
        visit = probe.visit_merged(times)
    except Exception:  # whatever a step may raise that is made for B rows and is given 2B
        return False
    entries = len(tape.carry) + len(tape.xs)
    return tape.recorded.check_merged(visit, times) and not _mixes_rows(visit, entries)


def _mixes_rows(visit: Visit, entries: int) -> bool:
    """Whether the Jacobian of the outputs in the first entries is not exactly zero between two different rows.

    A bit of the row number tells two different rows apart, so a cotangent on the rows with that bit set, and one on
    the others, reach every pair in both directions.
    """
    generator = torch.Generator().manual_seed(0)  # an own one: the caller's random numbers are not touched
    cotangents = [torch.randn(t.shape, generator=generator).to(t) if t.requires_grad else None for t in visit.outputs]
    number = torch.arange(len(visit.outputs[0]))
    for bit in range((len(number) - 1).bit_length()):
        for side in (0, 1):
            other = (number >> bit) % 2 != side
            masked = [None if c is None else c.masked_fill(beside(other.to(c.device), c), 0) for c in cotangents]
            for grad in visit.vjp(masked)[:entries]:
                if grad is not None and grad[other.to(grad.device)].any():
                    return True
    return False


def _scaled(adjoint: Tensor | None, factor: Tensor | None) -> Tensor | None:
    """The adjoint across a time edge. Nothing crosses an edge of factor 0, not even a NaN."""
    if adjoint is None or factor is None:
        return adjoint
    factor = beside(factor, adjoint).to(adjoint.dtype)
    return torch.where(factor == 0, torch.zeros_like(adjoint), adjoint * factor)


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
