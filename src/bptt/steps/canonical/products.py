"""Matrix products and convolutions in the canonical set."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .rules import dim_of, rule, times

__all__: list[str] = []

aten = torch.ops.aten


@rule(aten.addmm.default)
def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    product = times(aten.mm.default(a, b), alpha)
    return product if beta == 0 else aten.add.Tensor(product, times(bias, beta))


@rule(aten.bmm.default)
def _bmm(a: Tensor, b: Tensor) -> Any:
    if len(a) != 1:
        return NotImplemented
    return aten.unsqueeze.default(aten.mm.default(aten.select.int(a, 0, 0), aten.select.int(b, 0, 0)), 0)


@rule(aten.baddbmm.default)
def _baddbmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    product = times(aten.bmm.default(a, b), alpha)
    return product if beta == 0 else aten.add.Tensor(product, times(bias, beta))


@rule(aten.mv.default)
def _mv(a: Tensor, b: Tensor) -> Tensor:
    return aten.squeeze.dims(aten.mm.default(a, aten.unsqueeze.default(b, 1)), [1])


@rule(aten.addmv.default)
def _addmv(bias: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    product = times(_mv(a, b), alpha)
    return product if beta == 0 else aten.add.Tensor(product, times(bias, beta))


@rule(aten.dot.default)
def _dot(a: Tensor, b: Tensor) -> Tensor:
    return aten.sum.dim_IntList(aten.mul.Tensor(a, b), [0])


@rule(aten.convolution_backward.default)
def _convolution_backward(grad: Tensor, a: Tensor, weight: Tensor, sizes: Any, *others: Any) -> Any:
    """One gradient at a time: that of the input feeds the carry, that of the weights can wait."""
    *geometry, wanted = others
    if sum(wanted) == 1 and not wanted[2]:
        return NotImplemented

    def alone(i: int) -> Tensor | None:
        own = [j == i for j in range(3)]
        return aten.convolution_backward.default(grad, a, weight, sizes, *geometry, own)[i] if wanted[i] else None

    bias = aten.sum.dim_IntList(grad, [d for d in range(grad.dim()) if d != 1]) if wanted[2] else None
    return alone(0), alone(1), bias


@rule(aten.t.default, aten.numpy_T.default)
def _t(a: Tensor) -> Tensor:
    return aten.permute.default(a, list(range(a.dim()))[::-1])


@rule(aten.transpose.int)
def _transpose(a: Tensor, first: int, second: int) -> Tensor:
    dims = list(range(a.dim()))
    first, second = dim_of(first, a), dim_of(second, a)
    dims[first], dims[second] = dims[second], dims[first]
    return aten.permute.default(a, dims)
