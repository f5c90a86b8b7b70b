"""The places of the rows of a block sweep: addresses only, no arithmetic on values.

A block sweep walks N columns side by side, one per (block, lane). Column n walks R positions, position r at step
start[n] + r, from r = R-1 down to r = 0. Aligning the columns at their *ends of the walk* (r = 0) lets a shorter
last block start later instead of stopping earlier: before its first error its adjoint is zero.

Legend: T steps, B lanes, N columns, R positions. Times are the direction's own: for a reverse layer they count
from the end of each sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ..policies import Reach

__all__ = ["Frames"]

_Rows = TypeVar("_Rows", Tensor, "Tensor | None")


@dataclass(frozen=True)
class Frames:
    """The columns of one sweep. All tensors `[N]`, int64; steps are inclusive.

    Addresses are computed on the CPU, where lengths are known, and moved once: no device is waited for.
    """

    T: int
    B: int
    R: int
    start: Tensor
    lane: Tensor
    first: Tensor  # a column's own losses: steps first..last
    last: Tensor
    end: Tensor  # the last step of the column's sequence
    top: Tensor  # the step a column's walk starts from: after it the adjoint is zero
    arrives: Tensor  # the row of `Sweep.arriving` with which a column's walk begins at its top; -1 is none
    whole: bool = False  # one column per lane, from 0 to T-1: every step is its own address
    number: Tensor | None = None  # of each column in the frames these are a part of, where they cross into others
    offset: Tensor | None = None  # and the position there of its first one here

    @classmethod
    def of(cls, reach: Reach, lengths: Tensor | None, T: int, B: int) -> Frames:
        """The columns a policy asks for, on sequences of `lengths` `[B]` (int64, on the CPU) out of T; None: all T."""
        if lengths is not None:
            return cls._of(reach, lengths, T)
        return _even(reach, T, B) if torch.compiler.is_compiling() else _kept(reach, T, B)  # it sees through a cache

    @classmethod
    def crossing(cls, reach: Reach, T: int, B: int, a: int, b: int) -> Frames:
        """`Frames.of(reach, None, T, B).within(a, b)` without the columns elsewhere, for blocks that leave no gap."""
        assert reach.window is not None
        assert reach.every is not None
        blocks = -(-T // reach.every)
        low, high = a // reach.every, min(blocks, (b + reach.window - 1) // reach.every)
        if high < blocks and min((high + 1) * reach.every, T) - reach.window < b:
            high += 1  # the last block, if it is short
        block = torch.arange(low, high, device="cpu").repeat_interleave(B)
        lane = torch.arange(B, device="cpu").repeat(high - low)
        first = block * reach.every
        last = (first + reach.every - 1).clamp(max=T - 1)
        start, end = (last - reach.window + 1).clamp(min=0), torch.full_like(last, T - 1)
        frames = cls(T, B, reach.window, start, lane, first, last, end, last, final_rows(lane, last, end))
        return frames._part(a, b, torch.arange(low * B, high * B, device="cpu"))

    @classmethod
    def _of(cls, reach: Reach, lengths: Tensor, T: int) -> Frames:
        B, device = len(lengths), lengths.device  # named, since a default device may be set
        lanes = torch.arange(B, device=device)
        if reach.every is None:
            zero, last = torch.zeros_like(lengths), lengths - 1
            return cls(T, B, T, zero, lanes, zero, last, last, last, final_rows(lanes, last, last), whole=True)
        columns = []
        for length in map(int, lengths.unique()):  # the blocks of a sequence depend on its length alone
            blocks = torch.tensor(reach.blocks(length), device=device)
            alike = lanes[lengths == length]
            lane = alike.repeat(len(blocks))
            columns.append(torch.cat([blocks.repeat_interleave(len(alike), 0), lane[:, None]], 1))
        start, first, last, lane = torch.cat(columns).unbind(1)
        end, R = lengths[lane] - 1, int((last - start).max()) + 1
        return cls(T, B, R, start, lane, first, last, end, last, final_rows(lane, last, end))

    def groups(self, columns: int) -> Iterator[Frames]:
        """The same columns in groups of at most `columns`, so that a sweep's memory stays bounded."""
        if self.whole or len(self.start) <= columns:
            yield self
            return
        for i in range(0, len(self.start), max(columns, 1)):
            yield self.pick(slice(i, i + max(columns, 1)))

    def pick(self, columns: slice | Tensor) -> Frames:
        """The sweep over some of the columns."""
        names = ["start", "lane", "first", "last", "end", "top", "arrives"]
        names += ["number", "offset"] if self.number is not None else []
        return replace(self, **{name: getattr(self, name)[columns] for name in names}, whole=False)

    def within(self, a: int, b: int) -> Frames:
        """The columns within the steps a to b-1, in the time of that part alone, numbered as they are here.

        A column that comes from after b-1 starts at the part's last step, without losses of its own if they all lie
        there. The end of a sequence after b-1 lies nowhere in the part. The adjoints that arrive at columns from
        there are known to the sweep of the later part alone: here there are none.
        """
        crossing = ((self.start < b) & (self.top >= a)).nonzero()[:, 0]
        part = self.pick(crossing)._part(a, b, crossing)
        return replace(part, whole=self.whole and len(crossing) == self.B)

    def _part(self, a: int, b: int, number: Tensor) -> Frames:
        """These columns, which all cross the steps a to b-1, in the time of that part alone."""
        T, high = b - a, b - 1 - a
        start, top = (self.start - a).clamp(min=0), (self.top - a).clamp(max=high)
        first, last = (self.first - a).clamp(min=0), (self.last - a).clamp(max=high)
        inside = self.end < b
        return replace(
            self,
            T=T,
            R=int((top - start).max()) + 1 if len(start) else 0,
            start=start,
            first=first,
            last=last,
            end=torch.where(inside, self.end - a, T),
            top=top,
            arrives=self.arrives.where(inside, -1),
            number=number,
            offset=start + a - self.start,
        )

    def steps(self) -> Tensor:
        """The step of each position `[R, N]`."""
        return self.start + torch.arange(self.R, device=self.start.device)[:, None]

    def addresses(self, device: torch.device, reverse: bool = False) -> Tensor:
        """Row of each position in a `[T * B, ...]` tensor `[R * N]`; past T-1 clamped (adjoint still zero).

        reverse: whether the tensor has the last step first.
        """
        steps = self.steps().clamp(max=self.T - 1)
        return ((self.T - 1 - steps if reverse else steps) * self.B + self.lane).flatten().to(device)

    def spread(self, x: Tensor, reverse: bool = False) -> Tensor:
        """`[T, B, F]` -> `[R, N, F]`: every position's value; reverse: see `addresses`."""
        if self.whole:
            return x.flip(0) if reverse else x
        rows = x.reshape(self.T * self.B, x.shape[2]).index_select(0, self.addresses(x.device, reverse))
        return rows.view(self.R, len(self.start), x.shape[2])

    def collect(self, x: Tensor, into: Tensor | None) -> Tensor:
        """`[R, N, F]` -> `[T, B, F]`: the sum over all positions at a step and lane, on top of what `into` holds.

        The transpose of `spread`. `into` is written to and returned; None stands for zeros.
        """
        if self.whole:
            return x if into is None else into + x
        rows = x.new_zeros(self.T * self.B, x.shape[2]) if into is None else into.view(-1, x.shape[2])
        rows.index_add_(0, self.addresses(x.device), x.flatten(0, 1))
        return rows.view(self.T, self.B, x.shape[2])

    def errors(self, x: Tensor, owns_losses: Tensor | None = None, reverse: bool = False) -> Tensor:
        """`[T, B, F]` -> `[R, N, F]`: every column's own losses, zero elsewhere.

        owns_losses: `[N]`, which have any. reverse: see `addresses`.
        """
        if self.whole:
            return self.spread(x, reverse)
        steps = self.steps()
        own = (steps >= self.first) & (steps <= self.last)
        own = own if owns_losses is None else own & owns_losses
        return self.spread(x, reverse).masked_fill(~own[..., None].to(x.device), 0)

    def collect_initial(self, initial: Sequence[_Rows]) -> tuple[_Rows, ...]:
        """`[N, ...]` -> `[B, ...]`: what reaches the initial state of each lane, over the columns that walk so far."""
        if self.whole:
            return tuple(initial)
        columns = (self.start == 0).nonzero()[:, 0]
        lane = self.lane[columns]
        return tuple(
            [
                s if s is None else
                s.new_zeros(self.B, *s.shape[1:]).index_add(0, lane.to(s.device), s[columns.to(s.device)])
                for s in initial
            ]
        )  # fmt: skip

    @property
    def kept_bytes(self) -> int:
        """Of addresses at most, those of `walks` included whether or not they have been asked for."""
        own = 4 if self.whole else 6  # tensors of their own: some are the same one
        return 8 * ((own + 7) * len(self.start) + 2 * (self.R + 1))

    @cached_property
    def walks(self) -> WalkOrder:
        """The columns in a compiled kernel's order."""
        return WalkOrder.of(self)


def final_rows(lane: Tensor, last: Tensor, end: Tensor) -> Tensor:
    """`Frames.arrives` for the cotangents of the final state: the lane of each column that ends with its sequence."""
    return lane.where(last == end, -1)


KEPT, KEPT_BYTES = 256, 2**24
"""The largest number of sweeps whose columns are cached for later calls, and of bytes of all of them together."""

_KEPT: dict[tuple[Reach, int, int], Frames] = {}
"""Columns on sequences of equal length, by what they were asked for with, the last asked for at the end."""


def _kept(reach: Reach, T: int, B: int) -> Frames:
    """The columns on sequences of equal length; cached, since a training loop asks for the same ones at every call.

    Those that were asked for longest ago go first. Columns of more bytes than all may have are not cached: their walk
    takes far longer than they do.
    """
    key = (reach, T, B)
    found = _KEPT.pop(key, None)  # one operation at a time, each whole by itself: several threads may be here
    if found is not None:
        _KEPT[key] = found
        return found
    with torch.inference_mode(False), torch._C._DisableFuncTorch():  # for calls in any mode, in any transform or none
        found = _even(reach, T, B)
    kept = [*_KEPT.items(), (key, found)]
    held = sum(frames.kept_bytes for _, frames in kept)
    if found.kept_bytes <= KEPT_BYTES:
        _KEPT[key] = found
        for first, frames in kept[:-1]:
            if held <= KEPT_BYTES and len(_KEPT) <= KEPT:
                break
            _KEPT.pop(first, None)
            held -= frames.kept_bytes
    return found


def _even(reach: Reach, T: int, B: int) -> Frames:
    return Frames._of(reach, torch.full((B,), T, device="cpu"), T)


class WalkOrder(NamedTuple):
    """The order in which a compiled kernel walks columns: the longest first, so that those still walking after j steps
    are a range; of equally long ones those that reach step 0 first, so that those that leave there are one too.
    """

    columns: Tensor  # [6, N] int64: top (the step a walk starts from), lane, length, column, own losses, `arrives`
    short: Tensor  # int64: the columns that walk fewer than R positions
    counts: Tensor  # [2, R + 1] int64: columns longer than j; columns that after j steps are at the initial state
    overlaps: bool  # whether two columns meet at a step and lane
    covers: bool  # whether the columns, without overlap, walk every step of every lane
    rows: int  # of what arrives, as many as are read

    @classmethod
    def of(cls, frames: Frames) -> WalkOrder:
        """The walks of all columns."""
        start, top, device = frames.start, frames.top, frames.start.device
        length = top - start + 1
        order = (2 * length + (start == 0)).argsort(descending=True, stable=True)
        columns = torch.stack([top, frames.lane, length, torch.arange(len(top), device=device),
                               frames.last - frames.first + 1, frames.arrives])[:, order].contiguous()  # fmt: skip
        j = torch.arange(frames.R + 1, device=device)
        ascending = length.sort()[0]
        longer = len(length) - torch.searchsorted(ascending, j, right=True)
        leaving = torch.bincount(length[start == 0], minlength=frames.R + 1)
        by_lane = (frames.lane * (frames.T + 1) + start).argsort()
        lane, low, high = frames.lane[by_lane], start[by_lane], top[by_lane]
        overlaps = bool(((lane[1:] == lane[:-1]) & (low[1:] <= high[:-1])).any())
        covers = not overlaps and int(length.sum()) == frames.T * frames.B
        rows = int(frames.arrives.max()) + 1 if len(top) else 0
        short = (length < frames.R).nonzero()[:, 0]
        return cls(columns, short, torch.stack([longer, leaving]), overlaps, covers, rows)
