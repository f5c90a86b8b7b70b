"""The adjoints that overlapping blocks carry over from a segment to the one before.

Legend: R positions and N columns of a sweep (see `kernels.frames`); k numbers layers and directions as in `net`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from ..kernels import Columns, Frames
from .net import States

__all__ = ["Crossing"]


Part = TypeVar("Part", covariant=True)


class Divisible(Protocol[Part]):
    """The columns of a call, of which a segment takes those that cross it, as `Frames` or as `Columns`."""

    def within(self, a: int, b: int) -> Part:
        """Those of the steps a to b-1, in the time of that part alone."""
        ...


class Crossing(Generic[Part]):
    """The columns of a call swept in segments, and the adjoints carried over from each segment to the one before.

    columns: of the whole call, or of some blocks, of one direction. above: `[R, N, P]` errors that come from the layer
    above, by position in the columns. below: `[R, N, F]`, where what goes to the layer below is written, by position;
    None where both are sums over columns, as at the two ends of a stack.
    """

    def __init__(self, columns: Divisible[Part], above: Tensor | None = None, below: Tensor | None = None) -> None:
        self.columns, self.above, self.below = columns, above, below
        # By layer: numbers of the columns, ascending `[n]`; lambda of h `[n, P]`, of c `[n, H]`.
        self.arrived: dict[int, tuple[Tensor, States]] = {}
        self.left: dict[int, list[tuple[Tensor, States]]] = {}  # the same, an entry per sweep

    @property
    def by_position(self) -> bool:
        """Whether errors come or go by position, or some column has no losses of its own."""
        whole = not isinstance(self.columns, Columns) or bool(self.columns.owns_losses.all())
        return self.above is not None or self.below is not None or not whole

    def within(self, a: int, b: int) -> Part:
        """The columns of the segment of the steps a to b-1, the one before the last asked for."""
        self.arrived = {}
        for k, swept in self.left.items():
            numbers, states = zip(*swept, strict=True)
            ascending, order = torch.cat(numbers).sort()
            rows = order.to(states[0][0].device)
            self.arrived[k] = ascending, tuple(torch.cat(s)[rows] for s in zip(*states, strict=True))
        self.left = {}
        return self.columns.within(a, b)

    def arriving(
        self, k: int, part: Frames, final: tuple[Tensor | None, ...]
    ) -> tuple[Frames, tuple[Tensor | None, ...]]:
        """The columns of a sweep and the adjoints with which they begin: cotangents of the final state, of the lanes
        that end in the segment, and what comes from the later segment.
        """
        assert part.number is not None
        numbers, carried = self.arrived.get(k, (part.number[:0], ()))
        if not len(numbers):
            return part, final
        place = torch.searchsorted(numbers, part.number).clamp(max=len(numbers) - 1)
        comes = numbers[place] == part.number
        if all(f is None for f in final):
            return replace(part, arrives=place.where(comes, -1)), carried
        rows = [c.new_zeros(part.B, *c.shape[1:]) if f is None else f for c, f in zip(carried, final, strict=True)]
        joined = tuple(torch.cat([f, c]) for f, c in zip(rows, carried, strict=True))
        return replace(part, arrives=(place + part.B).where(comes, part.arrives)), joined

    def leave(self, k: int, part: Frames, leaving: States) -> None:
        """Keep what leaves the segment at its first step and goes on. leaving: h `[N, P]`, c `[N, H]` by column."""
        assert part.number is not None
        assert part.offset is not None
        goes = (part.offset > 0).nonzero()[:, 0]
        rows = goes.to(leaving[0].device)
        self.left.setdefault(k, []).append((part.number[goes], tuple(s[rows] for s in leaving)))

    def errors(self, part: Frames, own: Tensor | None) -> Tensor | None:
        """The errors of a sweep `[R, N, P]`: its own, and those that come from the layer above."""
        if self.above is None:
            return own
        position, number = self._positions(part, self.above)
        inside = (part.steps() <= part.top)[..., None].to(self.above.device)
        above = self.above[position.clamp(max=len(self.above) - 1), number].masked_fill(~inside, 0)
        return above if own is None else own + above

    def descend(self, part: Frames, below: Tensor) -> None:
        """Write what goes to the layer below. below: `[R, N, F]`."""
        if self.below is None:
            return
        position, number = self._positions(part, self.below)
        r, n = (part.steps() <= part.top).nonzero(as_tuple=True)
        r, n = r.to(position.device), n.to(position.device)
        self.below[position[r, n], number[n]] = below[r, n]

    @staticmethod
    def _positions(part: Frames, by_position: Tensor) -> tuple[Tensor, Tensor]:
        """(position `[R, N]`, number `[N]`) in the columns of the whole call of each position of the part."""
        assert part.offset is not None
        assert part.number is not None
        r = torch.arange(part.R, device=part.offset.device)[:, None]
        return (part.offset + r).to(by_position.device), part.number.to(by_position.device)
