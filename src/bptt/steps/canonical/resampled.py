"""Pooling by means, upsampling and padding by reflection, in the canonical set: a matrix for each dimension.

Each is linear and treats each dimension by itself; torch's own operation says which matrix, of unit vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .rules import rule

__all__: list[str] = []

aten = torch.ops.aten

Along = Callable[[Tensor, int], Tensor]
"""An operation along the d-th of its dimensions alone, of `[n, 1, ...]` with size 1 in all others."""


def _each(values: Any, d: int, count: int) -> Any:
    """The d-th of values for each dimension, or the one for all."""
    return values[d if len(values) == count else 0] if isinstance(values, (tuple, list)) else values


def _alone(value: Any, d: int, count: int, other: Any) -> list[Any]:
    return [value if i == d else other for i in range(count)]


def _applied(a: Tensor, along: Along, count: int) -> Tensor:
    """What operations along the last dimensions give, one after the other."""
    for d in range(count):
        numbers = _numbers(along, a.shape[d - count], d, count)
        taken = _taken(numbers)
        if taken is None:
            a = _product(a, _matrix(numbers, a), d - count)
        else:  # what is not taken is multiplied by nothing: it may be infinite
            index = torch.tensor(taken, dtype=torch.int64, device=a.device)
            a = aten.index_select.default(a, a.dim() + d - count, index)
    return a


def _pulled_back(grad: Tensor, along: Along, sizes: Sequence[int]) -> Tensor:
    """The gradient of what they are applied to, which has these sizes."""
    count = len(sizes)
    for d, n in enumerate(sizes):
        matrix = _matrix(_numbers(along, n, d, count), grad)
        grad = _product(grad, aten.permute.default(matrix, [1, 0]), d - count)
    return grad


def _numbers(along: Along, n: int, d: int, count: int) -> list[list[float]]:
    """What an operation makes of each unit vector."""
    with _disable_current_modes():
        unit = torch.eye(n, dtype=torch.float64, device="cpu").view(n, 1, *_alone(n, d, count, 1))
        made: list[list[float]] = along(unit, d).reshape(n, -1).tolist()
    return made


def _taken(numbers: list[list[float]]) -> list[int] | None:
    """Which one each result is, of an operation that takes some as they are; None of any other."""
    columns = list(zip(*numbers, strict=True))
    if any(sorted(c) != [*[0.0] * (len(c) - 1), 1.0] for c in columns):
        return None
    return [c.index(1.0) for c in columns]


def _matrix(numbers: list[list[float]], like: Tensor) -> Tensor:
    return torch.tensor(numbers, dtype=like.dtype, device=like.device)


def _product(a: Tensor, matrix: Tensor, dim: int) -> Tensor:
    order = list(range(a.dim()))
    order[-1], order[dim] = order[dim], order[-1]
    turned = aten.clone.default(aten.permute.default(a, order), memory_format=torch.contiguous_format)
    outer = list(turned.shape[:-1])
    made = aten.mm.default(aten.view.default(turned, [prod(outer), turned.shape[-1]]), matrix)
    return aten.permute.default(aten.view.default(made, [*outer, matrix.shape[1]]), order)


# Means over windows


def _mean(size: Any, stride: Any, padding: Any, ceil: bool, counts_padding: bool, count: int) -> Along:
    pool = {1: torch.nn.functional.avg_pool1d, 2: torch.nn.functional.avg_pool2d, 3: torch.nn.functional.avg_pool3d}

    def along(a: Tensor, d: int) -> Tensor:
        k, p = _each(size, d, count), _each(padding, d, count)
        s = _each(stride, d, count) if stride else k
        return pool[count](a, _alone(k, d, count, 1), _alone(s, d, count, 1), _alone(p, d, count, 0), ceil,
                           counts_padding)  # fmt: skip

    return along


@rule(aten.avg_pool2d.default, aten.avg_pool3d.default)
def _avg_pool(
    a: Tensor, size: Any, stride: Any = (), padding: Any = 0, ceil: bool = False, counted: bool = True, by: Any = None
) -> Any:
    count = a.dim() - 2
    if by is not None or count not in (2, 3):
        return NotImplemented
    return _applied(a, _mean(size, stride, padding, ceil, counted, count), count)


@rule(aten.avg_pool2d_backward.default, aten.avg_pool3d_backward.default)
def _avg_pool_backward(
    grad: Tensor, a: Tensor, size: Any, stride: Any, padding: Any, ceil: bool, counted: bool, by: Any
) -> Any:
    count = a.dim() - 2
    if by is not None or count not in (2, 3):
        return NotImplemented
    return _pulled_back(grad, _mean(size, stride, padding, ceil, counted, count), a.shape[2:])


def _mean_to(sizes: Sequence[int]) -> Along:
    count = len(sizes)
    pool: Any = torch.nn.functional.adaptive_avg_pool2d if count == 2 else torch.nn.functional.adaptive_avg_pool3d
    return lambda a, d: pool(a, _alone(sizes[d], d, count, 1))


@rule(aten._adaptive_avg_pool2d.default, aten._adaptive_avg_pool3d.default)
def _adaptive_avg_pool(a: Tensor, sizes: Sequence[int]) -> Any:
    return _applied(a, _mean_to(sizes), len(sizes)) if a.dim() == len(sizes) + 2 else NotImplemented


@rule(aten._adaptive_avg_pool2d_backward.default, aten._adaptive_avg_pool3d_backward.default)
def _adaptive_avg_pool_backward(grad: Tensor, a: Tensor) -> Any:
    sizes = grad.shape[2:]
    return _pulled_back(grad, _mean_to(sizes), a.shape[2:]) if len(sizes) in (2, 3) else NotImplemented


# Upsampling


_RESAMPLED = {  # by operation: the numbers of dimensions, and whether it is told to align corners
    "upsample_nearest": ((1, 2, 3), False),
    "_upsample_nearest_exact": ((1, 2, 3), False),
    "upsample_linear": ((1,), True),
    "upsample_bilinear": ((2,), True),
    "upsample_trilinear": ((3,), True),
    "upsample_bicubic": ((2,), True),
}


def _resampling(forward: Any, sizes: Sequence[int], more: Sequence[Any], aligns: bool) -> Along:
    """more: whether it aligns corners, if it is told, and the scales that were given."""
    count = len(sizes)
    corners, scales = (list(more[:1]), list(more[1:])) if aligns else ([], list(more))

    def along(a: Tensor, d: int) -> Tensor:
        own = [scales[i] if i < len(scales) and i == d else None for i in range(count)]
        return forward(a, _alone(sizes[d], d, count, 1), *corners, *own)

    return along


def _add_resampling(name: str, count: int, aligns: bool) -> None:
    forward = getattr(aten, f"{name}{count}d").default

    @rule(forward)
    def _forward(a: Tensor, sizes: Sequence[int], *more: Any) -> Tensor:
        return _applied(a, _resampling(forward, sizes, more, aligns), count)

    @rule(getattr(aten, f"{name}{count}d_backward").default)
    def _backward(grad: Tensor, sizes: Sequence[int], given: Sequence[int], *more: Any) -> Tensor:
        return _pulled_back(grad, _resampling(forward, sizes, more, aligns), given[2:])


for _name, (_counts, _aligns) in _RESAMPLED.items():
    for _count in _counts:
        _add_resampling(_name, _count, _aligns)


# Padding


def _add_padding(name: str, count: int) -> None:
    def padding(given: Sequence[int]) -> Along:
        def along(a: Tensor, d: int) -> Tensor:
            i = 2 * (count - 1 - d)  # the last dimension's come first
            flat = a.reshape(len(a), 1, -1)
            return getattr(aten, f"{name}1d").default(flat, list(given[i : i + 2]))

        return along

    @rule(getattr(aten, f"{name}{count}d").default)
    def _forward(a: Tensor, given: Sequence[int]) -> Any:
        return _applied(a, padding(given), count) if a.dim() == count + 2 else NotImplemented

    @rule(getattr(aten, f"{name}{count}d_backward").default)
    def _backward(grad: Tensor, a: Tensor, given: Sequence[int]) -> Any:
        return _pulled_back(grad, padding(given), a.shape[2:]) if a.dim() == count + 2 else NotImplemented


for _name in ("reflection_pad", "replication_pad"):
    for _count in (1, 2, 3):
        _add_padding(_name, _count)
