"""Windows over the last dimensions in the canonical set: the largest of each, their values side by side, and back.

The values at one place of all windows are a slice; what goes back to it is written there, into zeros.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from .rules import full, rule

__all__: list[str] = []

aten = torch.ops.aten


def _both(values: Any) -> tuple[int, int]:
    values = list(values) if isinstance(values, (tuple, list)) else [values]
    return values[0], values[-1]


@dataclass(frozen=True)
class _Windows:
    """Windows over the last two dimensions, of a tensor with these sizes and padding around."""

    sizes: tuple[int, ...]
    window: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    counts: tuple[int, ...]  # of windows

    @classmethod
    def over(
        cls, a: Sequence[int], window: Any, stride: Any, padding: Any, dilation: Any, ceil: bool = False
    ) -> _Windows:
        k, p, d = _both(window), _both(padding), _both(dilation)
        s = _both(stride) if not isinstance(stride, (tuple, list)) or stride else k
        sizes, counts = tuple(a[-2:]), []
        for i in range(2):
            room = sizes[i] + 2 * p[i] - d[i] * (k[i] - 1) - 1
            count = (-(-room // s[i]) if ceil else room // s[i]) + 1
            counts.append(count - (ceil and (count - 1) * s[i] >= sizes[i] + p[i]))
        return cls(sizes, k, s, p, d, tuple(counts))

    @property
    def padded(self) -> tuple[int, ...]:
        """The sizes with padding, as far as windows reach."""
        return tuple(
            max(n + 2 * p, (c - 1) * s + (k - 1) * d + 1)
            for n, p, c, s, k, d in zip(
                self.sizes, self.padding, self.counts, self.stride, self.window, self.dilation, strict=True
            )
        )

    def places(self) -> Iterator[tuple[tuple[int, ...], list[tuple[int, int, int]]]]:
        """Of each place in a window: the row and column there, and the slices that all windows have there."""
        for at in itertools.product(*(range(k) for k in self.window)):
            firsts = [i * d for i, d in zip(at, self.dilation, strict=True)]
            yield at, [(f, f + (c - 1) * s + 1, s) for f, c, s in zip(firsts, self.counts, self.stride, strict=True)]

    def pad(self, a: Tensor, value: float) -> Tensor:
        """A tensor with its padding."""
        for dim, (n, p, whole) in enumerate(zip(self.sizes, self.padding, self.padded, strict=True), a.dim() - 2):
            parts = [(p, value), (whole - n - p, value)]
            around = [full(a, [*a.shape[:dim], size, *a.shape[dim + 1 :]], v) for size, v in parts]
            pieces = [t for t in (around[0], a, around[1]) if t.shape[dim]]
            a = aten.cat.default(pieces, dim) if len(pieces) > 1 else a
        return a

    def take(self, padded: Tensor, slices: Sequence[tuple[int, int, int]]) -> Tensor:
        """The values at one place of all windows."""
        for dim, (start, end, step) in enumerate(slices, padded.dim() - 2):
            padded = aten.slice.Tensor(padded, dim, start, end, step)
        return padded

    def put_back(self, values: Sequence[Tensor]) -> Tensor:
        """The sum of values at each place of all windows, where these lie."""
        like, total = values[0], None
        outer = list(like.shape[:-2])
        for value, (_, slices) in zip(values, self.places(), strict=True):
            (r0, r1, rs), (c0, c1, cs) = slices
            rows = full(like, [*outer, self.counts[0], self.padded[1]], 0)
            rows = aten.slice_scatter.default(rows, value, like.dim() - 1, c0, c1, cs)
            whole = full(like, [*outer, *self.padded], 0)
            whole = aten.slice_scatter.default(whole, rows, like.dim() - 2, r0, r1, rs)
            total = whole if total is None else aten.add.Tensor(total, whole)
        assert total is not None
        for dim, (n, p) in enumerate(zip(self.sizes, self.padding, strict=True), like.dim() - 2):
            total = aten.slice.Tensor(total, dim, p, p + n, 1)
        return total

    def numbers(self, like: Tensor) -> Tensor:
        """The number that each value has in a row of all, with padding."""
        (p, q), (rows, columns) = self.padding, self.padded
        numbers = [[(i - p) * self.sizes[1] + j - q for j in range(columns)] for i in range(rows)]
        return torch.tensor(numbers, dtype=torch.int64, device=like.device)

    def firsts(self, like: Tensor) -> list[Tensor | None]:
        """Of each place in a window: in which windows it is the first that is no padding, if others are before it."""
        (rows, columns), (p, q), seen, found = self.counts, self.padding, set[tuple[int, int]](), list[Tensor | None]()
        for _, slices in self.places():
            (r, _, rs), (c, _, cs) = slices
            new = {
                (i, j)
                for i in range(rows)
                for j in range(columns)
                if 0 <= r + i * rs - p < self.sizes[0] and 0 <= c + j * cs - q < self.sizes[1]
            } - seen
            truths = [[(i, j) in new for j in range(columns)] for i in range(rows)]
            found.append(torch.tensor(truths, device=like.device) if found and new else None)
            seen |= new
        return found


@rule(aten.max_pool2d_with_indices.default)
def _max_pool(
    a: Tensor, window: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil: bool = False
) -> tuple[Tensor, Tensor]:
    over = _Windows.over(a.shape, window, stride, padding, dilation, ceil)
    padded, numbers = over.pad(a, -math.inf), over.numbers(a)
    found: Tensor | None = None
    for (_, slices), first in zip(over.places(), over.firsts(a), strict=True):
        value, number = over.take(padded, slices), over.take(numbers, slices)
        if found is None:
            found, index = value, aten.expand.default(number, list(value.shape))
            continue
        larger = aten.logical_or.default(aten.gt.Tensor(value, found), aten.ne.Tensor(value, value))
        if first is not None:
            larger = aten.logical_or.default(larger, first)
        found, index = aten.where.self(larger, value, found), aten.where.self(larger, number, index)
    assert found is not None
    return found, index


@rule(aten.max_pool2d_with_indices_backward.default)
def _max_pool_backward(
    grad: Tensor, a: Tensor, window: Any, stride: Any, padding: Any, dilation: Any, ceil: bool, index: Tensor
) -> Tensor:
    over = _Windows.over(a.shape, window, stride, padding, dilation, ceil)
    numbers, zero = over.numbers(a), full(grad, [], 0)
    return over.put_back([
        aten.where.self(aten.eq.Tensor(index, over.take(numbers, slices)), grad, zero) for _, slices in over.places()
    ])  # fmt: skip


@rule(aten.im2col.default)
def _im2col(a: Tensor, window: Any, dilation: Any, padding: Any, stride: Any) -> Any:
    if a.dim() != 4:
        return NotImplemented
    over = _Windows.over(a.shape, window, stride, padding, dilation)
    padded, (B, C), count = over.pad(a, 0.0), a.shape[:2], math.prod(over.counts)
    parts = [_columns(over.take(padded, slices), [B, C, 1, count]) for _, slices in over.places()]
    return _columns(aten.cat.default(parts, 2), [B, C * len(parts), count])


@rule(aten.col2im.default)
def _col2im(a: Tensor, sizes: Sequence[int], window: Any, dilation: Any, padding: Any, stride: Any) -> Any:
    if a.dim() != 3:
        return NotImplemented
    over = _Windows.over(sizes, window, stride, padding, dilation)
    places = math.prod(over.window)
    whole = _columns(a, [a.shape[0], a.shape[1] // places, places, *over.counts])
    return over.put_back([aten.select.int(whole, 2, i) for i in range(places)])


@rule(aten.unfold.default)
def _unfold(a: Tensor, dim: int, size: int, step: int) -> Tensor:
    dim = dim % a.dim()
    count = (a.shape[dim] - size) // step + 1
    parts = [aten.slice.Tensor(a, dim, i, i + (count - 1) * step + 1, step) for i in range(size)]
    return aten.cat.default([aten.unsqueeze.default(p, a.dim()) for p in parts], a.dim())


@rule(aten.unfold_backward.default)
def _unfold_backward(grad: Tensor, sizes: Sequence[int], dim: int, size: int, step: int) -> Tensor:
    dim = dim % len(sizes)
    end = (grad.shape[dim] - 1) * step + 1
    parts = [
        aten.slice_scatter.default(full(grad, sizes, 0), aten.select.int(grad, len(sizes), i), dim, i, i + end, step)
        for i in range(size)
    ]
    return reduce(aten.add.Tensor, parts)


def _columns(a: Tensor, sizes: list[int]) -> Tensor:
    return aten.view.default(aten.clone.default(a, memory_format=torch.contiguous_format), sizes)
