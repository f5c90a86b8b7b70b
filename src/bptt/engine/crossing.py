"""The block sweep in segments: when columns arrive, cross from a segment to the one before, and reach the first state.

Legend: R positions and N columns of a sweep (see `kernels.frames`); k numbers layers and directions as in `net`; a, b:
a segment's first step, and the one after its last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from ..kernels import Columns, Frames
from .records import Tensors

__all__ = ["Crossing", "block_sweep"]


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
        # By layer: numbers of the columns, ascending `[n]`; lambda of each leaf of the state `[n, ...]`.
        self.arrived: dict[int, tuple[Tensor, Tensors]] = {}
        self.left: dict[int, list[tuple[Tensor, Tensors]]] = {}  # the same, an entry per sweep

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
            joined = [_joined(list(zip(map(len, numbers), rows, strict=True))) for rows in zip(*states, strict=True)]
            self.arrived[k] = ascending, tuple([None if s is None else s[order.to(s.device)] for s in joined])
        self.left = {}
        return self.columns.within(a, b)

    def arriving(self, k: int, part: Frames, final: Tensors) -> tuple[Frames, Tensors]:
        """The columns of a sweep and the adjoints with which they begin: cotangents of the final state, of the lanes
        that end in the segment, and what comes from the later segment. None stands for zeros.
        """
        if k not in self.arrived:
            return part, final
        assert part.number is not None
        numbers, carried = self.arrived[k]
        place = torch.searchsorted(numbers, part.number).clamp(max=len(numbers) - 1)
        comes = numbers[place] == part.number
        if all(f is None for f in final) or not bool((part.arrives >= 0).any()):
            return replace(part, arrives=place.where(comes, -1)), carried
        joined = [_joined([(part.B, f), (len(numbers), c)]) for f, c in zip(final, carried, strict=True)]
        return replace(part, arrives=(place + part.B).where(comes, part.arrives)), tuple(joined)

    def leave(self, k: int, part: Frames, leaving: Tensors) -> None:
        """Keep what leaves the segment at its first step and goes on. leaving: `[N, ...]` by leaf of the state."""
        if part.number is None:  # of a call in one segment
            return
        assert part.offset is not None
        goes = (part.offset > 0).nonzero()[:, 0]
        if len(goes):
            rows = tuple([None if s is None else s[goes.to(s.device)] for s in leaving])
            self.left.setdefault(k, []).append((part.number[goes], rows))

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


def _joined(parts: Sequence[tuple[int, Tensor | None]]) -> Tensor | None:
    """Rows one after the other, (how many, they themselves), with zeros in the place of None; None where all are."""
    some = next((rows for _, rows in parts if rows is not None), None)
    if some is None:
        return None
    return torch.cat([some.new_zeros(n, *some.shape[1:]) if rows is None else rows for n, rows in parts])


def block_sweep(
    columns: Frames,
    segments: Iterable[tuple[int, int]],
    final: Tensors,
    sweep: Callable[[int, int, Frames, Tensors], Iterable[tuple[Frames, Tensors]]],
) -> Tensors:
    """What the blocks of a step through time send to the first carry `[B, ...]`, by leaf: all segments swept.

    columns: of the whole call. segments: (a, b), from the last to the first; each is swept before the next is asked
    for. final: the cotangents of the final carry. sweep: sweeps columns through the steps a to b-1, which begin with
    given adjoints (see `Frames.arrives`); gives groups of them, those at least that are swept down to step a, and the
    adjoints with which these leave at their first steps `[N, ...]`. None stands for zeros.
    """
    crossing = Crossing(columns)
    first: list[Tensor | None] = [None] * len(final)
    for a, b in segments:
        part = columns if (a, b) == (0, columns.T) else crossing.within(a, b)
        begin = final if b == columns.T else (None,) * len(final)
        walk = sweep(a, b, *crossing.arriving(0, part, begin))
        crossing.arrived = {}  # the sweep alone has them now
        for swept in walk:
            crossing.leave(0, *swept)
            if a == 0:
                found = swept[0].collect_initial(swept[1])
                first = [f if s is None else s if f is None else s + f for s, f in zip(first, found, strict=True)]
            del swept  # before another segment is run again
    return tuple(first)
