"""Pooling by means, upsampling and padding by reflection, in the canonical set: weighted sums for each dimension.

Each is linear and treats each dimension by itself; torch's own operation says which elements a result is made of, and
with which weights. No result has anything of another element, be it infinite or NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .rules import full, rule, times

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
    """What operations along the last dimensions give, one after the other, the last one first as in torch."""
    for d in reversed(range(count)):
        a = _along(a, _shares(along, a.shape[d - count], d, count), a.dim() + d - count)
    return a


def _pulled_back(grad: Tensor, along: Along, sizes: Sequence[int]) -> Tensor:
    """The gradient of what they are applied to, which has these sizes."""
    count = len(sizes)
    for d, n in enumerate(sizes):
        shares, back = _shares(along, n, d, count), [dict[int, float]() for _ in range(n)]
        for result, share in enumerate(shares):
            for element, weight in share.items():
                back[element][result] = weight
        grad = _along(grad, back, grad.dim() + d - count)
    return grad


Shares = Sequence[dict[int, float]]
"""Of each result the elements that it is a sum of, with their weights. A weight may be 0: of an infinite element the
result is then NaN; what is no part of the sum leaves it alone."""


def _shares(along: Along, n: int, d: int, count: int) -> Shares:
    """What an operation makes of n elements: weights by unit vectors, and what it reads at all by NaN in one place."""
    with _disable_current_modes():
        unit = torch.eye(n, dtype=torch.float64, device="cpu")
        probes = torch.cat([unit, unit.masked_fill(unit == 1, math.nan)]).view(2 * n, 1, *_alone(n, d, count, 1))
        made = along(probes, d).reshape(2, n, -1)
        weights, read = made[0].T.tolist(), made[1].isnan().T.tolist()
    return [{i: w[i] for i in range(n) if r[i]} for w, r in zip(weights, read, strict=True)]


def _along(a: Tensor, shares: Shares, dim: int) -> Tensor:
    """Sums of elements along a dimension."""
    n, most = a.shape[dim], max(map(len, shares))
    if most > 1 and all(len(share) == n for share in shares):
        numbers = [[share[i] for share in shares] for i in range(n)]
        return _product(a, torch.tensor(numbers, dtype=a.dtype, device=a.device), dim)
    if most > len(shares) and all(s and max(s) - min(s) + 1 == len(s) for s in shares):
        return aten.cat.default([_sum(a, share, dim) for share in shares], dim)
    total: Tensor | None = None
    for j in range(most):
        parts = [list(share.items())[j] if j < len(share) else None for share in shares]
        value = _taken(a, [next(iter(s), 0) if p is None else p[0] for p, s in zip(parts, shares, strict=True)], dim)
        beside = [len(shares), *[1] * (a.dim() - dim - 1)]
        weights = [0.0 if p is None else p[1] for p in parts]
        if len(set(weights)) > 1 and None not in parts:
            value = aten.mul.Tensor(value, torch.tensor(weights, dtype=a.dtype, device=a.device).view(beside))
        elif None not in parts:
            value = times(value, weights[0])
        else:
            there = torch.tensor([p is not None for p in parts], device=a.device).view(beside)
            weights = [1.0 if p is None else p[1] for p in parts]
            if set(weights) != {1.0}:
                value = aten.mul.Tensor(value, torch.tensor(weights, dtype=a.dtype, device=a.device).view(beside))
            value = aten.where.self(there, value, full(a, [], 0))
        total = value if total is None else aten.add.Tensor(total, value)
    return full(a, [*a.shape[:dim], len(shares), *a.shape[dim + 1 :]], 0) if total is None else total


def _taken(a: Tensor, index: Sequence[int], dim: int) -> Tensor:
    """Elements of a dimension: a slice, where they lie so."""
    step = index[1] - index[0] if len(index) > 1 else 1
    if step > 0 and list(index) == list(range(index[0], index[-1] + 1, step)):
        return aten.slice.Tensor(a, dim, index[0], index[-1] + 1, step)
    return aten.index_select.default(a, dim, torch.tensor(index, dtype=torch.int64, device=a.device))


def _sum(a: Tensor, share: dict[int, float], dim: int) -> Tensor:
    """One sum of elements that lie side by side."""
    first, last = min(share), max(share)
    part, weights = aten.slice.Tensor(a, dim, first, last + 1, 1), [share[i] for i in range(first, last + 1)]
    if len(set(weights)) > 1:
        weighing = torch.tensor(weights, dtype=a.dtype, device=a.device).view(-1, *[1] * (a.dim() - dim - 1))
        return aten.sum.dim_IntList(aten.mul.Tensor(part, weighing), [dim], True)
    return times(aten.sum.dim_IntList(part, [dim], True), weights[0])


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
