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


@rule(aten._trilinear.default)
def _trilinear(
    a: Tensor, b: Tensor, c: Tensor, of_a: Any, of_b: Any, of_c: Any, summed: Any, unrolled: int = 1
) -> Tensor:
    """The product of three tensors, each with dimensions of size 1 inserted, summed over some dimensions."""
    for_all = []
    for t, dims in ((a, of_a), (b, of_b), (c, of_c)):
        for dim in sorted(dims):
            t = aten.unsqueeze.default(t, dim)
        for_all.append(t)
    product = aten.mul.Tensor(aten.mul.Tensor(for_all[0], for_all[1]), for_all[2])
    return aten.sum.dim_IntList(product, sorted(summed)) if summed else product


@rule(aten.convolution_backward.default)
def _convolution_backward(grad: Tensor, a: Tensor, weight: Tensor, sizes: Any, *others: Any) -> Any:
    """One gradient at a time: that of the input feeds the carry, that of the weights can wait.

    That of the input is a convolution too: transposed if the other was not.
    """
    *geometry, wanted = others
    if sum(wanted) == 1 and wanted[1]:
        return NotImplemented
    stride, padding, dilation, transposed, _, groups = geometry

    def of_input() -> Tensor:
        if transposed:
            none = [0] * len(stride)
            return aten.convolution.default(grad, weight, None, stride, padding, dilation, False, none, groups)
        plain = [(n - 1) * s - 2 * p + d * (k - 1) + 1 for n, s, p, d, k
                 in zip(grad.shape[2:], stride, padding, dilation, weight.shape[2:], strict=True)]  # fmt: skip
        rest = [n - m for n, m in zip(a.shape[2:], plain, strict=True)]
        return aten.convolution.default(grad, weight, None, stride, padding, dilation, True, rest, groups)

    def of_weight() -> Tensor:
        return aten.convolution_backward.default(grad, a, weight, sizes, *geometry, [False, True, False])[1]

    bias = aten.sum.dim_IntList(grad, [d for d in range(grad.dim()) if d != 1]) if wanted[2] else None
    return of_input() if wanted[0] else None, of_weight() if wanted[1] else None, bias


@rule(aten.t.default, aten.numpy_T.default)
def _t(a: Tensor) -> Tensor:
    return aten.permute.default(a, list(range(a.dim()))[::-1])


@rule(aten.transpose.int)
def _transpose(a: Tensor, first: int, second: int) -> Tensor:
    dims = list(range(a.dim()))
    first, second = dim_of(first, a), dim_of(second, a)
    dims[first], dims[second] = dims[second], dims[first]
    return aten.permute.default(a, dims)
