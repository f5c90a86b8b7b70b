"""The places of the steps of packed sequences, whose rows are none of padding: addresses only.

Legend: T steps of the longest sequence, B lanes, S rows: the sum of all lengths; N columns of a sweep (see `frames`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .frames import Frames

__all__ = ["PackedRows"]


@dataclass(frozen=True, eq=False)
class PackedRows:
    """The rows of sequences as torch's PackedSequence has them: step after step, of each the lanes that are as long,
    the longest first. All tensors int64 on the CPU.

    Values of steps are `[S, F]`. States are `[B + S, F]`, the initial ones and then that after each step.
    """

    sizes: Tensor
    """`[T]` the lanes that have a step t, as PackedSequence.batch_sizes."""

    @cached_property
    def T(self) -> int:
        return len(self.sizes)

    @cached_property
    def B(self) -> int:
        return int(self.sizes[0])

    @cached_property
    def S(self) -> int:
        return int(self.first[-1] + self.sizes[-1])

    @cached_property
    def first(self) -> Tensor:
        """`[T]` the first row of each step."""
        return self.sizes.cumsum(0) - self.sizes

    @cached_property
    def lengths(self) -> Tensor:
        """`[B]` the steps of each lane."""
        lanes = torch.arange(self.B, device="cpu")
        return torch.searchsorted(-self.sizes, -lanes, right=False)

    @cached_property
    def step(self) -> Tensor:
        """`[S]` the step of each row."""
        return torch.arange(self.T, device="cpu").repeat_interleave(self.sizes, output_size=self.S)

    @cached_property
    def lane(self) -> Tensor:
        """`[S]` the lane of each row."""
        return torch.arange(self.S, device="cpu") - self.first[self.step]

    @cached_property
    def padded(self) -> Tensor:
        """`[S]` the row of each in a `[T * B, ...]` tensor."""
        return self.step * self.B + self.lane

    @cached_property
    def _before(self) -> tuple[Tensor, Tensor]:
        rows, B = torch.arange(self.S, device="cpu"), self.B
        step = self.step
        back = self.first.roll(1) - self.first  # from a row to that of the step before
        back[0] = -B  # the initial states
        onward = self.first.roll(-1) - self.first
        of_next = self.sizes.roll(-1)
        of_next[-1] = 0
        follows = self.lane < of_next[step]
        return rows + B + back[step], torch.where(follows, rows + B + onward[step], self.lane)

    def before(self, d: int) -> Tensor:
        """`[S]` where among the states that before each step lies, in the time of direction d."""
        return self._before[d]

    def last(self, d: int) -> Tensor:
        """`[B]` where among the states the final ones of direction d lie."""
        lanes = torch.arange(self.B, device="cpu")
        return self.B + lanes + (self.first[self.lengths - 1] if d == 0 else 0)

    def tops(self, frames: Frames, d: int) -> Tensor:
        """`[N]` the row of the step that each column walks from, of columns in the order of `Frames.walks`."""
        top, lane = frames.walks.columns[:2]
        return self.first[top if d == 0 else self.lengths[lane] - 1 - top] + lane
