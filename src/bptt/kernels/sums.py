"""What a walk over overlapping blocks is put together from: groups of columns, their errors, and the sums over them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..cells import Cell, Weights
from .frames import Frames
from .kernel import Swept, Walked, Wanted

__all__ = ["Sums", "columns_at_once", "with_final"]

SWEEP_VALUES = 2**24
"""Values a sweep may hold per group of columns, where blocks overlap so much that they are walked in groups."""

SWEEP_SEQUENCES = 4
"""Columns that together are at most so many times the sequence are walked in one group, whatever their size."""


def columns_at_once(frames: Frames, w: Weights, *, sequence_fits: bool = True) -> int:
    """How many columns a group may have: all, where together they are hardly more than the sequence itself.

    sequence_fits: whether so much may be in memory; else a group has at least the columns of one block.
    """
    if sequence_fits and frames.R * len(frames.start) <= SWEEP_SEQUENCES * frames.T * frames.B:
        return len(frames.start)
    return max(1 if sequence_fits else frames.B, SWEEP_VALUES // (frames.R * 4 * w.hh.shape[0]))


def with_final(
    cell: Cell,
    frames: Frames,
    error: Tensor | None,
    final: tuple[Tensor | None, ...],
    position: Tensor,
    column: Tensor,
) -> tuple[Tensor | None, ...]:
    """The errors of all states: that of h `[R, N, P]`, completed by the cotangents of the final state.

    final: h `[B, P]`, c `[B, H]`, which enter at the given positions and columns.
    """
    errors: list[Tensor | None] = [error, *[None] * (cell.states - 1)]
    for i, cotangent in enumerate(final):
        if cotangent is not None:
            device, base = cotangent.device, errors[i]
            if base is None:
                base = cotangent.new_zeros(frames.R, len(frames.start), cotangent.shape[-1])
            value = cotangent.index_select(0, frames.lane[column].to(device))
            errors[i] = base.index_put((position.to(device), column.to(device)), value, accumulate=True)
    return tuple(errors)


@dataclass
class Sums:
    """What the sweeps of one layer and direction have brought back so far, summed over columns."""

    wanted: Wanted
    da: Tensor | None = None  # [T, B, G*H]
    adjoint: Tensor | None = None  # [T, B, P], where collected
    initial: tuple[Tensor, ...] = ()  # h [B, P], c [B, H]
    leaving: list[tuple[Tensor, ...]] = field(default_factory=list)  # of each sweep, h [N, P], c [N, H]
    adjoint_c: Tensor | None = None  # [T, B, H], where collected

    def add(self, frames: Frames, swept: Swept) -> None:
        """Add what one sweep over `frames` has brought back."""
        initial = frames.collect_initial(swept.initial) if self.wanted.initial else ()
        if self.initial:
            initial = tuple(a + b for a, b in zip(self.initial, initial, strict=True))
        self.initial = initial
        self.leaving.append(swept.initial)
        self.da = frames.collect(swept.da, self.da)
        if self.wanted.adjoint:
            assert swept.adjoint is not None
            self.adjoint = frames.collect(swept.adjoint, self.adjoint)
        if swept.adjoint_c is not None:
            self.adjoint_c = frames.collect(swept.adjoint_c, self.adjoint_c)

    def walked(self) -> Walked:
        """The sums; there has been a sweep."""
        assert self.da is not None
        leaving = tuple(torch.cat(states) for states in zip(*self.leaving, strict=True))
        return Walked(self.da, self.adjoint, self.initial, leaving=leaving, adjoint_c=self.adjoint_c)
