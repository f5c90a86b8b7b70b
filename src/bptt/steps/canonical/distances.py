"""Distances between all rows of two matrices, and their gradient, in the canonical set."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .reductions import sum_dims
from .rules import full, rule

__all__: list[str] = []

aten = torch.ops.aten

_EUCLIDEAN, _MANHATTAN = 2.0, 1.0


def _differences(a: Tensor, b: Tensor) -> Tensor:
    """`[..., P, R, M]`, of `[..., P, M]` and `[..., R, M]`."""
    return aten.sub.Tensor(aten.unsqueeze.default(a, a.dim() - 1), aten.unsqueeze.default(b, b.dim() - 2))


@rule(aten._cdist_forward.default)
def _cdist(a: Tensor, b: Tensor, p: float, mode: Any) -> Any:
    difference = _differences(a, b)
    if p == _MANHATTAN:
        return sum_dims(aten.abs.default(difference), [difference.dim() - 1], False)
    if p != _EUCLIDEAN:
        return NotImplemented
    return aten.sqrt.default(sum_dims(aten.mul.Tensor(difference, difference), [difference.dim() - 1], False))


@rule(aten._cdist_backward.default)
def _cdist_backward(grad: Tensor, a: Tensor, b: Tensor, p: float, distance: Tensor) -> Any:
    """That of `a`; zero where two rows are the same."""
    difference = _differences(a, b)
    if p == _MANHATTAN:
        slope = aten.sign.default(difference)
    elif p == _EUCLIDEAN:
        apart = aten.unsqueeze.default(distance, distance.dim())
        slope = aten.div.Tensor(difference, apart)
        slope = aten.where.self(aten.eq.Scalar(apart, 0), full(grad, [], 0), slope)
    else:
        return NotImplemented
    along = aten.mul.Tensor(aten.unsqueeze.default(grad, grad.dim()), slope)
    return sum_dims(along, [along.dim() - 2], False)
