"""The pieces that columns fall into where states are replaced, and batches of them, which a fused layer runs as rows.

Legend: M pieces, S steps of all pieces of a batch, L steps of the longest; T, B, R, N as in `frames`. Addresses are
computed on the CPU, as those of `frames` are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .frames import Frames

__all__ = ["Batch", "Pieces"]


@dataclass(frozen=True, eq=False)
class Pieces:
    """The longest parts of columns inside which no state is replaced, column by column. All tensors `[M]`."""

    frames: Frames
    start: Tensor  # int64, the first step
    length: Tensor  # int64
    column: Tensor  # int64
    fresh: Tensor  # bool, whether it begins with the zero state of a reset
    entire: bool  # whether the pieces are whole lanes of T steps, in their order

    @classmethod
    def of(cls, frames: Frames, resets: Tensor | None) -> Pieces:
        """The pieces of all columns. resets: bool `[T, B]` on the CPU; None is nowhere."""
        if resets is not None or not frames.whole:
            return cls._of(frames, resets)
        if "pieces" not in vars(frames):  # of its own, as a cached property: frames of whole lanes last for many calls
            with torch.inference_mode(False), torch._C._DisableFuncTorch():  # in any mode, in any transform or none
                vars(frames)["pieces"] = cls._of(frames, None)
        found: Pieces = vars(frames)["pieces"]
        return found

    @classmethod
    def _of(cls, frames: Frames, resets: Tensor | None) -> Pieces:
        N, device = len(frames.start), frames.start.device
        length, every = frames.top - frames.start + 1, torch.arange(N, device=device)
        if resets is None:
            entire = frames.whole and bool((length == frames.T).all())
            return cls(frames, frames.start, length, every, torch.zeros(N, dtype=torch.bool, device=device), entire)
        steps = frames.steps().clamp(max=frames.T - 1)
        begins = resets[steps, frames.lane] & (torch.arange(frames.R, device=device)[:, None] < length)
        begins[0] = True
        column, position = begins.t().nonzero(as_tuple=True)
        start = frames.start[column] + position
        after = torch.cat([start[1:], start[:1]])  # the first step of the next piece, in the same column or another one
        ends = torch.cat([column[1:] != column[:-1], torch.ones_like(column[:1], dtype=torch.bool)])
        after = torch.where(ends, frames.top[column] + 1, after)
        return cls(frames, start, after - start, column, resets[start, frames.lane[column]], False)

    @property
    def lane(self) -> Tensor:
        """The lane of each piece."""
        return self.frames.lane[self.column]

    @property
    def opens(self) -> Tensor:
        """Whether a piece is the first one of its column and begins with the state before it."""
        return (self.start == self.frames.start[self.column]) & ~self.fresh

    @property
    def closes(self) -> Tensor:
        """Whether a piece is the last one of its column."""
        return self.start + self.length == self.frames.top[self.column] + 1

    @cached_property
    def _all(self) -> Batch:
        """The batch of whole lanes."""
        return Batch(self, torch.arange(len(self.start), device=self.start.device), self.frames.T, None)

    def batches(self) -> Iterator[Batch]:
        """All pieces in at most two batches: the longest ones, which are rows of equal length, and the others."""
        longest = self.length == self.length.max()
        if longest.all() or 2 * longest.sum() < len(longest):
            yield self.batch()
        else:
            for index in (longest.nonzero()[:, 0], (~longest).nonzero()[:, 0]):
                yield self.batch(index)

    def batch(self, index: Tensor | None = None) -> Batch:
        """The batch of some pieces, or of all."""
        if self.entire:
            return self._all
        index = torch.arange(len(self.start), device=self.start.device) if index is None else index
        length = self.length[index]
        if bool((length == length[0]).all()):
            return Batch(self, index, int(length[0]), None)
        index = index[length.argsort(descending=True, stable=True)]
        L = int(self.length[index[0]])
        return Batch(self, index, L, torch.bincount(self.length[index] - 1, minlength=L).flip(0).cumsum(0).flip(0))


@dataclass(frozen=True, eq=False)
class Batch:
    """A batch of pieces, the rows of one call: side by side where they are equally long, else packed.

    Values of their steps are `[L, M, F]`, or packed `[S, F]`, as torch.nn.utils.rnn.PackedSequence has them.
    """

    pieces: Pieces
    index: Tensor  # int64 [M], the numbers of the pieces, the longest first
    longest: int  # L
    sizes: Tensor | None  # int64 [L], how many pieces have each position; None: all have

    @cached_property
    def _steps(self) -> tuple[Tensor, Tensor]:
        """(its position in its piece, the number of its piece) `[S]` of each step."""
        position = torch.arange(self.longest, device=self.index.device)
        if self.sizes is None:
            return position.repeat_interleave(len(self.index)), self.index.repeat(self.longest)
        position, row = (position[:, None] < self.pieces.length[self.index]).nonzero(as_tuple=True)
        return position, self.index[row]

    def addresses(self, by_position: bool) -> Tensor:
        """The address `[S]` of each step in `[T * B, ...]`, or in `[R * N, ...]`, by position and column."""
        pieces, (position, piece) = self.pieces, self._steps
        if not by_position:
            return (pieces.start[piece] + position) * pieces.frames.B + pieces.lane[piece]
        column = pieces.column[piece]
        return (pieces.start[piece] + position - pieces.frames.start[column]) * len(pieces.frames.start) + column

    def foreign(self) -> Tensor | None:
        """The steps `[S]` whose losses are not the own ones of their column, bool; None: there are none."""
        frames = self.pieces.frames
        if frames.whole:
            return None
        position, piece = self._steps
        step, column = self.pieces.start[piece] + position, self.pieces.column[piece]
        foreign = (step < frames.first[column]) | (step > frames.last[column])
        return foreign if bool(foreign.any()) else None

    def take(self, x: Tensor, by_position: bool = False) -> Tensor:
        """The values of a tensor `[T, B, F]`, by position `[R, N, F]`, as rows of this batch."""
        if self.pieces.entire:
            return x
        rows = x.reshape(-1, x.shape[2]).index_select(0, self.addresses(by_position).to(x.device))
        return rows if self.sizes is not None else rows.view(self.longest, len(self.index), x.shape[2])

    def start(self, state: Tensor) -> Tensor:
        """The state `[M, F]` with which each piece begins, from those before each step that begins one `[.., B, F]`."""
        pieces = self.pieces
        if pieces.entire:
            return state[0]
        fresh = pieces.fresh[self.index]
        rows = (pieces.start.masked_fill(pieces.fresh, 0) * pieces.frames.B + pieces.lane)[self.index]
        begin = state.reshape(-1, state.shape[2]).index_select(0, rows.to(state.device))
        return begin.masked_fill(fresh[:, None].to(state.device), 0) if bool(fresh.any()) else begin
