"""Views: where the values of an operand lie, as a distance and strides within a row of a slot.

Legend: a *slot* is memory that a program reads or writes, with a row for each lane and step or without rows; k is how
many rows a value has for each of these (`Value.rows`), the first dimension of a view by row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ..steps import Value

__all__ = ["Slot", "View", "collapse", "dense_strides", "dims_of"]


@dataclass(eq=False)
class Slot:
    """A memory of a program. kind: one of csrc/program.hpp.

    width: the values of a row, or of all where there are no rows. name: of the value that the caller gives or takes.
    at: the distance of its buffer within a row of a tile's memory, -1 is none; of packed weights, K. partner: of an
    adjoint, the slot of what the step after sends back.
    """

    kind: str
    width: int
    name: str = ""
    at: int = -1
    partner: Slot | None = None

    @property
    def by_row(self) -> bool:
        return self.kind not in ("outside", "once", "packed", "sum")


def dims_of(kind: Value) -> tuple[int, ...]:
    """The dimensions of a value within a row."""
    return (kind.rows, *kind.shape) if kind.rows else kind.shape


def dense_strides(dims: Sequence[int]) -> tuple[int, ...]:
    """Those of values one after the other.

    >>> dense_strides((2, 3, 4))
    (12, 4, 1)
    """
    return tuple(math.prod(dims[i + 1 :]) for i in range(len(dims)))


@dataclass(frozen=True)
class View:
    """A view of values in a slot. by_row: whether the first of dims counts rows; a slot without rows may be so too."""

    slot: Slot
    by_row: bool
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    @classmethod
    def of(cls, slot: Slot, kind: Value) -> View:
        """All of a slot."""
        dims = dims_of(kind)
        return cls(slot, kind.rows > 0, dims, dense_strides(dims))

    def broadcast(self, dims: tuple[int, ...], by_row: bool) -> View | None:
        """The same for larger dimensions, or None."""
        missing = len(dims) - len(self.dims)
        if missing < 0 or (self.by_row and (missing or not by_row)):
            return None
        strides = [0] * missing
        for i, (size, stride) in enumerate(zip(self.dims, self.strides, strict=True)):
            wanted = dims[missing + i]
            rows = by_row and not self.by_row and missing + i == 0
            if size != 1 and (size != wanted or rows):
                return None
            strides.append(stride if size == wanted and not rows else 0)
        return replace(self, by_row=by_row, dims=dims, strides=tuple(strides))

    def reshape(self, dims: tuple[int, ...], by_row: bool) -> View | None:
        """The same values in other dimensions, or None where they have to be copied for that."""
        sizes, strides = collapse(self.dims, [self.strides])
        new: list[int] = []
        at, left = len(sizes) - 1, sizes[-1]
        step = strides[0][-1]
        for size in reversed(dims):
            if size == 1:
                new.append(0)
                continue
            if left == 1 and at > 0:
                at -= 1
                left, step = sizes[at], strides[0][at]
            if left % size:
                return None
            new.append(step)
            left, step = left // size, step * size
        return replace(self, by_row=by_row, dims=dims, strides=tuple(reversed(new)))

    def select(self, dim: int, index: int) -> View:
        """One of a dimension, which goes."""
        rest = [i for i in range(len(self.dims)) if i != dim]
        return self.pick(rest, self.offset + index * self.strides[dim])

    def slice(self, dim: int, start: int, size: int, step: int = 1) -> View:
        """Some of a dimension."""
        dims, strides = list(self.dims), list(self.strides)
        dims[dim], strides[dim] = size, strides[dim] * step
        offset = self.offset + start * self.strides[dim]
        return replace(self, dims=tuple(dims), strides=tuple(strides), offset=offset)

    def pick(self, order: Iterable[int], offset: int | None = None) -> View:
        """Its dimensions in another order, or some of them."""
        order = tuple(order)
        dims, strides = tuple(self.dims[i] for i in order), tuple(self.strides[i] for i in order)
        return replace(self, dims=dims, strides=strides, offset=self.offset if offset is None else offset)

    def same(self, other: View) -> bool:
        """Whether both are the same values in the same order."""
        if self.slot is not other.slot or self.offset != other.offset or self.dims != other.dims:
            return False
        return all(n == 1 or a == b for n, a, b in zip(self.dims, self.strides, other.strides, strict=True))


def collapse(dims: Sequence[int], strides: Sequence[Sequence[int]]) -> tuple[list[int], list[list[int]]]:
    """The fewest dimensions that say the same of several operands; at least one.

    >>> collapse((2, 1, 3), [(3, 9, 1), (0, 0, 1)])
    ([2, 3], [[3, 1], [0, 1]])
    >>> collapse((2, 1, 3), [(3, 9, 1)])
    ([6], [[1]])
    """
    sizes: list[int] = []
    kept: list[list[int]] = [[] for _ in strides]
    for i, size in enumerate(dims):
        if size == 1:
            continue
        if sizes and all(k[-1] == s[i] * size for k, s in zip(kept, strides, strict=True)):
            sizes[-1] *= size
            for k, s in zip(kept, strides, strict=True):
                k[-1] = s[i]
        else:
            sizes.append(size)
            for k, s in zip(kept, strides, strict=True):
                k.append(s[i])
    if not sizes:
        return [1], [[1] for _ in strides]
    return sizes, kept
