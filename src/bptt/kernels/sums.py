"""Sums of sweep results by position, over groups of columns."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cells import Weights
from .frames import Frames
from .kernel import Sweep, SweepResult

__all__ = ["Sums", "columns_at_once"]

SWEEP_VALUES = 2**24
"""The values that a sweep may hold per group of columns, where blocks overlap so much that they go in groups."""

ON_A_DEVICE = 8
"""How many times as many it may hold on a device with memory of its own, whose time goes by launches."""

SWEEP_SEQUENCES = 4
"""Columns that together are at most this many times the sequence are one group, whatever their size."""


def columns_at_once(frames: Frames, w: Weights, *, sequence_fits: bool = True) -> int:
    """How many columns a group may have: all, where together they are hardly more than the sequence itself.

    sequence_fits: whether so much may be in memory; else a group has at least the columns of one block.
    """
    if sequence_fits and frames.R * len(frames.start) <= SWEEP_SEQUENCES * frames.T * frames.B:
        return len(frames.start)
    most = SWEEP_VALUES if w.hh.is_cpu else ON_A_DEVICE * SWEEP_VALUES
    return max(1 if sequence_fits else frames.B, most // (frames.R * 4 * w.hh.shape[0]))


class Sums:
    """The sums over columns of the sweep results of one layer and direction so far.

    request: that of each sweep, apart from its group of columns.
    """

    def __init__(self, request: Sweep) -> None:
        # da [T, B, G*H], dx [T, B, I], then lambda of h [T, B, P], of c [T, B, H], those that there are.
        self._summed: list[Tensor | None] = [None] * (2 + min(request.adjoints, request.cell.states))
        self._weights: tuple[Tensor | None, ...] = ()
        self._leaving: list[tuple[Tensor, ...]] = []  # of each sweep, h [N, P], c [N, H]

    def add(self, frames: Frames, result: SweepResult) -> None:
        """Add what one sweep over `frames`, by position, has brought back."""
        parts = zip((result.da, result.dx, *result.adjoints), self._summed, strict=True)
        self._summed = [None if part is None else frames.collect(part, into) for part, into in parts]
        if self._weights:
            pairs = zip(self._weights, result.weights, strict=True)
            self._weights = tuple([a if a is None or b is None else a + b for a, b in pairs])
        else:
            self._weights = result.weights
        self._leaving.append(result.leaving)

    def result(self) -> SweepResult:
        """The sums by step and lane; what leaves columns stays by column, in their order. There has been a sweep."""
        da, dx, *adjoints = self._summed
        leaving = tuple(torch.cat(states) for states in zip(*self._leaving, strict=True))
        return SweepResult(da, tuple([a for a in adjoints if a is not None]), leaving, (), self._weights, dx)
