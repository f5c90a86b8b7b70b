"""Images read at places between their elements (`grid_sample`), in the canonical set: the nearest elements, weighed.

Jaderberg and others 2015 (arXiv 1506.02025), equations 5 to 7.
Legend: N images of C channels and H x W elements, read at P places each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from .reductions import sum_dims
from .rules import cast, full, rule, times

__all__: list[str] = []

aten = torch.ops.aten

_BILINEAR, _NEAREST = 0, 1
_ZEROS, _BORDER, _REFLECTION = 0, 1, 2


@dataclass(frozen=True)
class _Axis:
    """Coordinates in one dimension of an image `[N, P]`. slope: their derivative in what the grid says."""

    at: Tensor
    slope: Tensor | float

    @classmethod
    def of(cls, given: Tensor, size: int, padding: int, corners: bool) -> _Axis:
        scale = (size - 1) / 2 if corners else size / 2
        at = aten.mul.Tensor(aten.add.Tensor(given, 1.0), scale)
        at = at if corners else aten.sub.Tensor(at, 0.5)
        slope: Tensor | float = scale
        if padding == _REFLECTION:
            low, span = (0.0, size - 1.0) if corners else (-0.5, float(size))
            if span == 0:
                return cls(full(at, at.shape, 0), 0.0)
            away = aten.sub.Tensor(at, low)
            turns = aten.floor.default(aten.div.Tensor(aten.abs.default(away), span))
            rest = aten.sub.Tensor(aten.abs.default(away), aten.mul.Tensor(turns, span))
            back = aten.eq.Scalar(aten.fmod.Scalar(turns, 2), 1)
            at = aten.where.self(back, aten.add.Tensor(aten.neg.default(rest), span + low), aten.add.Tensor(rest, low))
            turned = aten.logical_xor.default(back, aten.lt.Scalar(away, 0))
            slope = aten.where.self(turned, full(at, [], -scale), full(at, [], scale))
        if padding != _ZEROS:
            inside = aten.logical_and.default(aten.gt.Scalar(at, 0), aten.lt.Scalar(at, size - 1))
            slope = aten.where.self(
                inside, slope if isinstance(slope, Tensor) else full(at, [], slope), full(at, [], 0)
            )
            at = aten.clamp_max.default(aten.clamp_min.default(at, 0), size - 1)
        return cls(at, slope)


@dataclass(frozen=True)
class _Corner:
    """One of the elements around a place. index, inside: `[N, P]`. wx, wy: its weight in each dimension."""

    index: Tensor
    inside: Tensor
    wx: Tensor | float
    wy: Tensor | float
    right: bool
    below: bool

    def read(self, flat: Tensor) -> Tensor:
        """Its values `[N, C, P]`; 0 where it lies beyond the image."""
        found = aten.gather.default(flat, 2, _of_channels(self.index, flat.shape[1]))
        return aten.where.self(aten.unsqueeze.default(self.inside, 1), found, full(flat, [], 0))

    @property
    def weight(self) -> Tensor | float:
        return self.wx if isinstance(self.wx, float) else aten.mul.Tensor(self.wx, self.wy)


def _corners(x: _Axis, y: _Axis, sizes: Sequence[int], mode: int) -> list[_Corner]:
    if mode == _NEAREST:
        return [_corner(aten.round.default(x.at), aten.round.default(y.at), sizes, 1.0, 1.0, False, False)]
    left, top = aten.floor.default(x.at), aten.floor.default(y.at)
    right, below = aten.sub.Tensor(x.at, left), aten.sub.Tensor(y.at, top)
    found = []
    for j in (0, 1):
        for i in (0, 1):
            column, wx = (aten.add.Tensor(left, 1.0), right) if i else (left, aten.rsub.Scalar(right, 1.0))
            row, wy = (aten.add.Tensor(top, 1.0), below) if j else (top, aten.rsub.Scalar(below, 1.0))
            found.append(_corner(column, row, sizes, wx, wy, bool(i), bool(j)))
    return found


def _corner(
    column: Tensor, row: Tensor, sizes: Sequence[int], wx: Tensor | float, wy: Tensor | float, right: bool, below: bool
) -> _Corner:
    H, W = sizes
    inside = [aten.ge.Scalar(column, 0), aten.lt.Scalar(column, W), aten.ge.Scalar(row, 0), aten.lt.Scalar(row, H)]
    there = reduce(aten.logical_and.default, inside)
    number = aten.add.Tensor(aten.mul.Tensor(row, float(W)), column)
    index = cast(aten.where.self(there, number, full(number, [], 0)), torch.int64)
    return _Corner(index, there, wx, wy, right, below)


def _of_channels(a: Tensor, C: int) -> Tensor:
    return aten.expand.default(aten.unsqueeze.default(a, 1), [a.shape[0], C, a.shape[1]])


def _viewed(a: Tensor, shape: Sequence[int]) -> Tensor:
    return aten.view.default(aten.clone.default(a, memory_format=torch.contiguous_format), shape)


def _places(a: Tensor, grid: Tensor, mode: int, padding: int, corners: bool) -> tuple[_Axis, _Axis, list[_Corner]]:
    N, P = grid.shape[0], grid.shape[1] * grid.shape[2]
    x, y = (
        _Axis.of(_viewed(aten.select.int(grid, 3, d), [N, P]), size, padding, corners)
        for d, size in ((0, a.shape[3]), (1, a.shape[2]))
    )
    return x, y, _corners(x, y, a.shape[2:], mode)


@rule(aten.grid_sampler_2d.default)
def _sampled(a: Tensor, grid: Tensor, mode: int, padding: int, corners: bool) -> Any:
    if mode not in (_BILINEAR, _NEAREST):
        return NotImplemented
    flat = _viewed(a, [*a.shape[:2], a.shape[2] * a.shape[3]])
    _, _, around = _places(a, grid, mode, padding, corners)
    terms = [times(c.read(flat), _beside(c.weight)) for c in around]
    return _viewed(reduce(aten.add.Tensor, terms), [*a.shape[:2], *grid.shape[1:3]])


@rule(aten.grid_sampler_2d_backward.default)
def _sampled_backward(
    grad: Tensor, a: Tensor, grid: Tensor, mode: int, padding: int, corners: bool, wanted: Sequence[bool]
) -> Any:
    if mode not in (_BILINEAR, _NEAREST):
        return NotImplemented
    (N, C), size = a.shape[:2], a.shape[2] * a.shape[3]
    x, y, around = _places(a, grid, mode, padding, corners)
    arriving = _viewed(grad, [N, C, grid.shape[1] * grid.shape[2]])
    image: Tensor | None = None
    if wanted[0]:
        image = full(grad, [N, C, size], 0)
        for c in around:
            there = aten.unsqueeze.default(c.inside, 1)
            sent = aten.where.self(there, times(arriving, _beside(c.weight)), full(grad, [], 0))
            added = aten.scatter_add.default(full(grad, [N, C, size], 0), 2, _of_channels(c.index, C), sent)
            image = aten.add.Tensor(image, added)
        image = _viewed(image, list(a.shape))
    if mode == _NEAREST:
        return image, full(grid, grid.shape, 0)
    flat = _viewed(a, [N, C, size])
    across, down = list[Tensor](), list[Tensor]()
    for c in around:
        felt = sum_dims(aten.mul.Tensor(arriving, c.read(flat)), [1], False)
        across.append(aten.mul.Tensor(felt, c.wy if c.right else aten.neg.default(c.wy)))
        down.append(aten.mul.Tensor(felt, c.wx if c.below else aten.neg.default(c.wx)))
    slopes = [aten.mul.Tensor(reduce(aten.add.Tensor, terms), axis.slope) for terms, axis in ((across, x), (down, y))]
    both = aten.cat.default([aten.unsqueeze.default(t, 2) for t in slopes], 2)
    return image, _viewed(both, list(grid.shape))


def _beside(weight: Tensor | float) -> Any:
    """A weight for all channels."""
    return weight if isinstance(weight, float) else aten.unsqueeze.default(weight, 1)
