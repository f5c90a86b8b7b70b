"""The block sweep in segments: when columns arrive, cross from a segment to the one before, and reach the first state.

Legend: R positions and N columns of a sweep (see `kernels.frames`); a, b: a segment's first step, and the one after its
last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..kernels import Blocks, Columns, Frames
from .records import Tensors

__all__ = ["BetweenLayers", "SegmentColumns", "block_sweep"]


def block_sweep(
    columns: Blocks,
    segments: Iterable[tuple[int, int]],
    final: Tensors,
    sweep: Callable[[int, int, Frames, Tensors], Iterable[tuple[Frames, Tensors]]],
) -> Tensors:
    """What the blocks of a call send to its first state `[B, ...]`, by leaf: all segments swept.

    columns: of the whole call, in one direction. segments: (a, b), from the last to the first;
    each is swept before the next is asked for. final: the cotangents of the final state. sweep: sweeps columns through
    the steps a to b-1, which begin with given adjoints (see `Frames.arrives`); gives groups of them, those at least
    that are swept down to step a, and the adjoints with which these leave at their first steps `[N, ...]`. None stands
    for zeros.
    """
    crossing = _Crossing(columns)
    first: list[Tensor | None] = [None] * len(final)
    for a, b in segments:
        walk = sweep(a, b, *crossing.enter(a, b, final))
        for swept in walk:
            if a > 0:
                crossing.leave(a, *swept)
            else:
                found = swept[0].collect_initial(swept[1])
                first = [f if s is None else s if f is None else s + f for s, f in zip(first, found, strict=True)]
            del swept  # before another segment is run again
    return tuple(first)


class _Crossing:
    """The adjoints carried over from each segment to the one before. columns: see `block_sweep`."""

    def __init__(self, columns: Blocks) -> None:
        self.columns = columns
        self.left: list[tuple[Tensor, Tensors]] = []  # an entry per sweep: see `leave`

    def enter(self, a: int, b: int, final: Tensors) -> tuple[Frames, Tensors]:
        """The columns of the steps a to b-1, and the adjoints with which they begin: cotangents of the final state, of
        the lanes that end there, and what the later segment has left.
        """
        part, left, nothing = self.columns.within(a, b), self.left, (None,) * len(final)
        self.left = []
        if part.number is None:  # the one column of each lane that crosses begins at its last step
            return part, _ascending(left)[1] if left else final if b == self.columns.T else nothing
        ends = any(f is not None for f in final) and bool((part.arrives >= 0).any())
        if not left:
            return part, final if ends else nothing
        numbers, carried = _ascending(left)
        place = torch.searchsorted(numbers, part.number).clamp(max=len(numbers) - 1)
        comes = numbers[place] == part.number
        if not ends:
            return replace(part, arrives=place.where(comes, -1)), carried
        joined = [_joined([(part.B, f), (len(numbers), c)]) for f, c in zip(final, carried, strict=True)]
        return replace(part, arrives=(place + part.B).where(comes, part.arrives)), tuple(joined)

    def leave(self, a: int, part: Frames, leaving: Tensors) -> None:
        """Keep what leaves a segment at its first step a and goes on: numbers of columns, and adjoints by leaf."""
        if part.number is None:
            numbers = self.columns.crossing(a)
            if numbers is not None:
                self.left.append((numbers, leaving))
            return
        assert part.offset is not None
        goes = (part.offset > 0).nonzero()[:, 0]
        if len(goes):
            rows = tuple([None if s is None else s[goes.to(s.device)] for s in leaving])
            self.left.append((part.number[goes], rows))


def _ascending(left: Sequence[tuple[Tensor, Tensors]]) -> tuple[Tensor, Tensors]:
    """Numbers of columns, ascending, and their adjoints by leaf, of all sweeps of a segment."""
    if len(left) == 1:
        return left[0]
    numbers = [n for n, _ in left]
    ascending, order = torch.cat(numbers).sort()
    leaves = zip(*[states for _, states in left], strict=True)
    joined = [_joined(list(zip(map(len, numbers), rows, strict=True))) for rows in leaves]
    return ascending, tuple([None if s is None else s[order.to(s.device)] for s in joined])


def _joined(parts: Sequence[tuple[int, Tensor | None]]) -> Tensor | None:
    """Rows one after the other, (how many, they themselves), with zeros in the place of None; None where all are."""
    some = next((rows for _, rows in parts if rows is not None), None)
    if some is None:
        return None
    return torch.cat([some.new_zeros(n, *some.shape[1:]) if rows is None else rows for n, rows in parts])


@dataclass(frozen=True)
class BetweenLayers:
    """The errors that pass between layers whose segments are swept one layer at a time, by position in the columns of
    the whole call.

    above: `[R, N, P]` what comes from the layer above. below: `[R, N, F]`, where what goes to the layer below is
    written. None where both are sums over columns, as at the two ends of a stack. owns_losses: see `Columns`.
    """

    above: Tensor | None
    below: Tensor | None
    owns_losses: Tensor

    def columns(self, part: Frames) -> Columns:
        """The columns of a segment."""
        return Columns((part,), self.owns_losses[:, part.number], part.top - part.start + 1)

    def errors(self, part: Frames, own: Tensor | None) -> Tensor | None:
        """The errors of a sweep `[R, N, P]`: its own, and those that come from the layer above."""
        if self.above is None:
            return own
        position, number = _positions(part, self.above)
        inside = (part.steps() <= part.top)[..., None].to(self.above.device)
        above = self.above[position.clamp(max=len(self.above) - 1), number].masked_fill(~inside, 0)
        return above if own is None else own + above

    def descend(self, part: Frames, below: Tensor) -> None:
        """Write what goes to the layer below. below: `[R, N, F]`."""
        if self.below is None:
            return
        position, number = _positions(part, self.below)
        r, n = (part.steps() <= part.top).nonzero(as_tuple=True)
        r, n = r.to(position.device), n.to(position.device)
        self.below[position[r, n], number[n]] = below[r, n]


def _positions(part: Frames, by_position: Tensor) -> tuple[Tensor, Tensor]:
    """(position `[R, N]`, number `[N]`) in the columns of the whole call of each position of the part."""
    assert part.offset is not None
    assert part.number is not None
    r = torch.arange(part.R, device=part.offset.device)[:, None]
    return (part.offset + r).to(by_position.device), part.number.to(by_position.device)


@dataclass(frozen=True)
class SegmentColumns:
    """The columns of a segment of a longer call, for `BackwardPass`.

    columns: with results by position and column where they are `Columns`. arriving: the adjoints with which they begin,
    by layer and direction, then by leaf of the state (see `Frames.arrives`). leaving: whether those are asked for with
    which they leave at their first steps.
    """

    columns: Frames | Columns
    arriving: Sequence[Tensors]
    leaving: bool
    between: BetweenLayers | None = None
