"""Constant tensors in the canonical set: all are `full`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .rules import full, rule

__all__ = ["OF_NUMBERS"]

aten = torch.ops.aten

OF_NUMBERS = {aten.arange.default, aten.arange.start, aten.arange.start_step, aten.eye.default, aten.eye.m,
              aten.linspace.default}  # fmt: skip
"""Operations that make a tensor of Python numbers alone, with other elements in other places."""


@rule(aten.zeros_like.default, aten.new_zeros.default)
def _zeros(a: Tensor, size: Any = None, *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    return full(a, a.shape if size is None else size, 0, dtype)


@rule(aten.ones_like.default, aten.new_ones.default)
def _ones(a: Tensor, size: Any = None, *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    return full(a, a.shape if size is None else size, 1, dtype)


@rule(aten.full_like.default)
def _full_like(a: Tensor, value: Any, *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    return full(a, a.shape, value, dtype)


@rule(aten.new_full.default)
def _new_full(a: Tensor, size: Sequence[int], value: Any, *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    return full(a, size, value, dtype)


@rule(aten.zeros.default)
def _zeros_of(size: Sequence[int], *, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
    return aten.full.default(size, 0, dtype=dtype or torch.get_default_dtype(), device=device or "cpu")


@rule(aten.ones.default)
def _ones_of(size: Sequence[int], *, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
    return aten.full.default(size, 1, dtype=dtype or torch.get_default_dtype(), device=device or "cpu")


@rule(aten.empty.memory_format, aten.empty_strided.default)
def _empty(size: Sequence[int], *_: Any, dtype: Any = None, device: Any = None, **__: Any) -> Tensor:
    """Zeros: what it holds is written before it is read."""
    return aten.full.default(size, 0, dtype=dtype or torch.get_default_dtype(), device=device or "cpu")


@rule(aten.new_empty.default, aten.new_empty_strided.default)
def _new_empty(a: Tensor, size: Any, *_: Any, dtype: torch.dtype | None = None, **__: Any) -> Tensor:
    return full(a, size, 0, dtype)


@rule(aten.empty_like.default)
def _empty_like(a: Tensor, *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    """In the order in memory of what it is like: random numbers may be drawn into it in that."""
    order = sorted(range(a.dim()), key=a.stride, reverse=True)
    made = full(a, [a.shape[d] for d in order], 0, dtype)
    return made if order == sorted(order) else aten.permute.default(made, [order.index(d) for d in range(a.dim())])


@rule(aten.scalar_tensor.default)
def _scalar_tensor(value: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
    return aten.full.default([], value, dtype=dtype or torch.get_default_dtype(), device=device or "cpu")
