"""Sums, means, variances and norms in the canonical set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .rules import cast, dim_of, rule

__all__ = ["mean_dims", "sum_dims"]

aten = torch.ops.aten


@rule(aten.sum.default)
def _sum(a: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    return aten.sum.dim_IntList(a, list(range(a.dim())), False, dtype=dtype)


@rule(aten.sum.dim_IntList)
def _sum_dims(a: Tensor, dims: Sequence[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    if dtype is None and a.dtype in (torch.bool, torch.int32, torch.int16, torch.int8, torch.uint8):
        dtype = torch.int64
    a = cast(a, dtype)
    if a.dim() == 0:
        return aten.clone.default(a)
    every = [dim_of(d, a) for d in dims] if dims else list(range(a.dim()))
    if dims == every and dtype is None:
        return NotImplemented
    return aten.sum.dim_IntList(a, sorted(every), keepdim)


@rule(aten.mean.default)
def _mean(a: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    return mean_dims(a, None, False, dtype=dtype)


@rule(aten.mean.dim)
def mean_dims(
    a: Tensor, dims: Sequence[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Tensor:
    """The mean along some dimensions, or along all."""
    a = cast(a, dtype)
    every = [dim_of(d, a) for d in dims] if dims else list(range(a.dim()))
    count = math.prod(a.shape[d] for d in every)
    return aten.div.Tensor(sum_dims(a, every, keepdim), count)


def sum_dims(a: Tensor, dims: list[int], keepdim: bool) -> Tensor:
    """The sum along some dimensions, counted from the first one."""
    return aten.sum.dim_IntList(a, sorted(dims), keepdim) if a.dim() else a


@rule(aten.var.correction)
def _var(a: Tensor, dims: Sequence[int] | None = None, *, correction: Any = None, keepdim: bool = False) -> Tensor:
    every = [dim_of(d, a) for d in dims] if dims else list(range(a.dim()))
    centred = aten.sub.Tensor(a, mean_dims(a, every, True))
    count = math.prod(a.shape[d] for d in every) - (1 if correction is None else correction)
    return aten.div.Tensor(sum_dims(aten.mul.Tensor(centred, centred), every, keepdim), max(count, 0))


@rule(aten.var_mean.correction)
def _var_mean(a: Tensor, dims: Sequence[int] | None = None, *, correction: Any = None, keepdim: bool = False) -> Any:
    return _var(a, dims, correction=correction, keepdim=keepdim), mean_dims(a, dims, keepdim)


@rule(aten.std.correction)
def _std(a: Tensor, dims: Sequence[int] | None = None, *, correction: Any = None, keepdim: bool = False) -> Tensor:
    return aten.sqrt.default(_var(a, dims, correction=correction, keepdim=keepdim))


@rule(aten.linalg_vector_norm.default)
def _norm(
    a: Tensor, order: Any = 2, dims: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Any:
    if order not in (1, 2) or dtype is not None:
        return NotImplemented
    every = [dim_of(d, a) for d in dims] if dims else list(range(a.dim()))
    if order == 1:
        return sum_dims(aten.abs.default(a), every, keepdim)
    return aten.sqrt.default(sum_dims(aten.mul.Tensor(a, a), every, keepdim))
