"""The columns of blocks: in both directions' times of a whole stack, or of one part of a call after the other.

Legend: as in `frames`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..policies import Reach
from .frames import Frames, final_rows

__all__ = ["Blocks", "Columns"]


@dataclass(frozen=True)
class Columns:
    """The columns of overlapping blocks in a stack, addressed in both directions' times.

    A block with losses first..last spans the steps from last-window+1 to first+window-1 of the whole network (to last
    in a one-directional stack). A column is the same block and lane in both entries of `frames`; position r of the
    forward frame is position span-1-r of the reverse one.
    """

    frames: tuple[Frames, ...]  # one per direction, each in its own time
    owns_losses: Tensor  # [D, N] bool: whether the column's losses are those on this direction's outputs
    span: Tensor  # [N] steps from the first to the last of the block's span

    @classmethod
    def of(cls, reach: Reach, lengths: Tensor | None, T: int, B: int, directions: int) -> Columns:
        """The columns of a policy whose blocks overlap (reach.window and reach.every given)."""
        forward = Frames.of(reach, lengths, T, B)
        if directions == 1:
            return cls.alone(forward)
        assert reach.window is not None
        assert reach.every is not None
        first, last, lane, end = forward.first, forward.last, forward.lane, forward.end
        owns_losses = torch.ones(2, len(first), dtype=torch.bool, device=first.device)
        if reach.every > 1 and ((end + 1) % reach.every).any():
            # Counted from the other end the blocks are others: the two halves of the output have columns of their own.
            owns_losses = owns_losses.repeat(1, 2)
            owns_losses[1, : len(first)] = False
            owns_losses[0, len(first) :] = False
            first, last = torch.cat([first, end - last]), torch.cat([last, end - first])
            lane, end = lane.repeat(2), end.repeat(2)
        low = (last - reach.window + 1).clamp(min=0)
        high = torch.minimum(first + reach.window - 1, end)
        span = high - low + 1
        R = int(span.max())
        final = [final_rows(lane, last, end), final_rows(lane, end - first, end)]
        arrives = [rows.where(own, -1) for rows, own in zip(final, owns_losses, strict=True)]
        forward = Frames(T, forward.B, R, low, lane, first, last, end, high, arrives[0])
        reverse = Frames(T, forward.B, R, end - high, lane, end - last, end - first, end, end - low, arrives[1])
        return cls((forward, reverse), owns_losses, span)

    @classmethod
    def alone(cls, frames: Frames) -> Columns:
        """Those of one direction, which own their losses."""
        owns_losses = torch.ones(1, len(frames.start), dtype=torch.bool, device=frames.start.device)
        return cls((frames,), owns_losses, frames.top - frames.start + 1)

    def pick(self, columns: slice | Tensor) -> Columns:
        """Some of the columns."""
        return Columns(tuple(f.pick(columns) for f in self.frames), self.owns_losses[:, columns], self.span[columns])

    def groups(self, columns: int) -> Iterator[Columns]:
        """The same columns in groups of at most `columns`."""
        for i in range(0, len(self.span), max(columns, 1)):
            yield self.pick(slice(i, i + max(columns, 1)))

    def turn(self, x: Tensor, d: int) -> Tensor:
        """`[R, N, F]` from forward positions to those of direction d, and back: its own inverse within the span."""
        if d == 0:
            return x
        r = torch.arange(x.shape[0], device=self.span.device)[:, None]
        back = torch.where(r < self.span, self.span - 1 - r, r)
        return x.gather(0, back[..., None].to(x.device).expand_as(x))

    def errors(self, x: Tensor, d: int, reverse: bool = False) -> Tensor:
        """`[T, B, F]` in direction d's time -> `[R, N, F]`: the losses on direction d's outputs, zero elsewhere.

        reverse: whether x has the last step of that time first instead.
        """
        return self.frames[d].errors(x, self.owns_losses[d], reverse)


@dataclass(frozen=True)
class Blocks:
    """The columns of a one-directional call, computed for one part of it when asked for.

    group: some of them, where not all are meant.
    """

    reach: Reach
    lengths: Tensor | None
    T: int
    B: int
    group: Frames | None = None

    def within(self, a: int, b: int) -> Frames:
        """See `Frames.within`. They are not numbered where they are all columns of the call, nor where those of the
        part alone are the same: then a lane has at most one column that crosses, and it begins at the last step.
        """
        if self.group is not None:
            return self.group.within(a, b)
        if (a, b) == (0, self.T):
            return self._all
        reach = self.reach
        if self.lengths is None and reach.overlaps:
            return Frames.crossing(reach, self.T, self.B, a, b)
        of_part = reach.on(a, b) if self.lengths is None else None
        return self._all.within(a, b) if of_part is None else Frames.of(of_part, None, b - a, self.B)

    def crossing(self, t: int) -> Tensor | None:
        """The numbers of the columns that cross the edge between the steps t-1 and t, one of each lane, of those that
        do not overlap; None where they end there.
        """
        if not self.reach.crosses(t):
            return None
        before = 0 if self.reach.every is None else t // self.reach.every * self.B
        return torch.arange(before, before + self.B, device="cpu")

    @cached_property
    def _all(self) -> Frames:
        return Frames.of(self.reach, self.lengths, self.T, self.B)
