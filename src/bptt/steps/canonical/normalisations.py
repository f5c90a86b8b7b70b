"""Layer norm, batch norm, softmax and their gradients in the canonical set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .reductions import mean_dims, sum_dims
from .rules import cast, dim_of, full, rule

__all__: list[str] = []

aten = torch.ops.aten


@rule(aten.native_layer_norm.default)
def _layer_norm(a: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float) -> Any:
    dims = list(range(a.dim() - len(shape), a.dim()))
    mean = mean_dims(a, dims, True)
    centred = aten.sub.Tensor(a, mean)
    inverse = aten.rsqrt.default(aten.add.Tensor(mean_dims(aten.mul.Tensor(centred, centred), dims, True), eps))
    y = aten.mul.Tensor(centred, inverse)
    y = y if weight is None else aten.mul.Tensor(y, weight)
    return y if bias is None else aten.add.Tensor(y, bias), mean, inverse


@rule(aten.native_layer_norm_backward.default)
def _layer_norm_backward(
    grad: Tensor,
    a: Tensor,
    shape: Sequence[int],
    mean: Tensor,
    inverse: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    wanted: Sequence[bool],
) -> Any:
    outer = list(range(a.dim() - len(shape)))
    dims = list(range(a.dim() - len(shape), a.dim()))
    normal = aten.mul.Tensor(aten.sub.Tensor(a, mean), inverse)
    da = dw = db = None
    if wanted[0]:
        g = grad if weight is None else aten.mul.Tensor(grad, weight)
        along = aten.mul.Tensor(normal, mean_dims(aten.mul.Tensor(g, normal), dims, True))
        da = aten.mul.Tensor(aten.sub.Tensor(aten.sub.Tensor(g, mean_dims(g, dims, True)), along), inverse)
    if wanted[1] and weight is not None:
        dw = sum_dims(aten.mul.Tensor(grad, normal), outer, False) if outer else aten.mul.Tensor(grad, normal)
    if wanted[2] and bias is not None:
        db = sum_dims(grad, outer, False) if outer else aten.clone.default(grad)
    return da, dw, db


@rule(aten.native_group_norm.default)
def _group_norm(
    a: Tensor, weight: Tensor | None, bias: Tensor | None, rows: int, C: int, _: int, groups: int, eps: float
) -> Any:
    inside = list(range(2, a.dim() + 1))
    grouped = aten.view.default(a, [rows, groups, C // groups, *a.shape[2:]])
    mean = mean_dims(grouped, inside, True)
    centred = aten.sub.Tensor(grouped, mean)
    inverse = aten.rsqrt.default(aten.add.Tensor(mean_dims(aten.mul.Tensor(centred, centred), inside, True), eps))
    y = aten.view.default(aten.mul.Tensor(centred, inverse), list(a.shape))
    y = y if weight is None else aten.mul.Tensor(y, _along_channels(a, weight))
    y = y if bias is None else aten.add.Tensor(y, _along_channels(a, bias))
    return y, *(aten.view.default(t, [rows, groups]) for t in (mean, inverse))


@rule(aten.native_group_norm_backward.default)
def _group_norm_backward(
    grad: Tensor, a: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor | None, rows: int, C: int, *others: Any
) -> Any:
    _, groups, wanted = others
    inside, shape = list(range(2, a.dim() + 1)), [rows, groups, C // groups, *a.shape[2:]]
    mean, inverse = (aten.view.default(t, [rows, groups, *[1] * (a.dim() - 1)]) for t in (mean, inverse))
    normal = aten.mul.Tensor(aten.sub.Tensor(aten.view.default(a, shape), mean), inverse)
    channels = [d for d in range(a.dim()) if d != 1]
    da = dw = db = None
    if wanted[0]:
        g = grad if weight is None else aten.mul.Tensor(grad, _along_channels(a, weight))
        g = aten.view.default(g, shape)
        along = aten.mul.Tensor(normal, mean_dims(aten.mul.Tensor(g, normal), inside, True))
        da = aten.mul.Tensor(aten.sub.Tensor(aten.sub.Tensor(g, mean_dims(g, inside, True)), along), inverse)
        da = aten.view.default(da, list(a.shape))
    if wanted[1] and weight is not None:
        dw = sum_dims(aten.mul.Tensor(grad, aten.view.default(normal, list(a.shape))), channels, False)
    if wanted[2]:
        db = sum_dims(grad, channels, False)
    return da, dw, db


def _along_channels(a: Tensor, values: Tensor) -> Tensor:
    return aten.view.default(values, [1, -1, *[1] * (a.dim() - 2)]) if a.dim() > 2 else values


@rule(aten._native_batch_norm_legit_no_training.default)
def _batch_norm(
    a: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, momentum: float, eps: float
) -> Any:
    inverse = aten.rsqrt.default(aten.add.Tensor(variance, eps))
    y = aten.mul.Tensor(aten.sub.Tensor(a, _along_channels(a, mean)), _along_channels(a, inverse))
    y = y if weight is None else aten.mul.Tensor(y, _along_channels(a, weight))
    empty = aten.full.default([0], 0, dtype=a.dtype, device=a.device)
    return y if bias is None else aten.add.Tensor(y, _along_channels(a, bias)), empty, empty


@rule(aten.native_batch_norm.default, aten._native_batch_norm_legit.no_stats)
def _batch_norm_of(a: Tensor, weight: Tensor | None, bias: Tensor | None, *others: Any) -> Any:
    """By given statistics, or those of the batch; where it writes to running statistics, it is not known."""
    mean, variance, training, momentum, eps = others if len(others) == 5 else (None, None, *others)
    if not training:
        return _batch_norm(a, weight, bias, mean, variance, momentum, eps)
    if mean is not None or variance is not None:
        return NotImplemented
    dims = [d for d in range(a.dim()) if d != 1]
    mean = mean_dims(a, dims, False)
    centred = aten.sub.Tensor(a, _along_channels(a, mean))
    inverse = aten.rsqrt.default(aten.add.Tensor(mean_dims(aten.mul.Tensor(centred, centred), dims, False), eps))
    y = aten.mul.Tensor(centred, _along_channels(a, inverse))
    y = y if weight is None else aten.mul.Tensor(y, _along_channels(a, weight))
    return y if bias is None else aten.add.Tensor(y, _along_channels(a, bias)), mean, inverse


@rule(aten.native_batch_norm_backward.default)
def _batch_norm_backward(grad: Tensor, a: Tensor, weight: Tensor | None, *others: Any) -> Any:
    mean, variance, of_batch, inverse_of_batch, training, eps, wanted = others
    dims = [d for d in range(a.dim()) if d != 1]
    inverse = inverse_of_batch if training else aten.rsqrt.default(aten.add.Tensor(variance, eps))
    centred = aten.sub.Tensor(a, _along_channels(a, of_batch if training else mean))
    normal = aten.mul.Tensor(centred, _along_channels(a, inverse))
    g = grad if weight is None else aten.mul.Tensor(grad, _along_channels(a, weight))
    da = None
    if wanted[0] and training:
        along = aten.mul.Tensor(normal, _along_channels(a, mean_dims(aten.mul.Tensor(g, normal), dims, False)))
        g = aten.sub.Tensor(aten.sub.Tensor(g, _along_channels(a, mean_dims(g, dims, False))), along)
    if wanted[0]:
        da = aten.mul.Tensor(g, _along_channels(a, inverse))
    dw = sum_dims(aten.mul.Tensor(grad, normal), dims, False) if wanted[1] else None
    return da, dw, sum_dims(grad, dims, False) if wanted[2] else None


@rule(aten._softmax.default)
def _softmax(a: Tensor, dim: int, _: bool) -> Tensor:
    dim = dim_of(dim, a)
    e = aten.exp.default(aten.sub.Tensor(a, aten.amax.default(a, [dim], True)))
    return aten.div.Tensor(e, aten.sum.dim_IntList(e, [dim], True))


@rule(aten._safe_softmax.default)
def _safe_softmax(a: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """Zeros where all along the dimension is -inf."""
    a = cast(a, dtype)
    dim = dim_of(dim, a)
    top = aten.amax.default(a, [dim], True)
    nothing = aten.eq.Scalar(top, -math.inf)
    zero, one = full(a, [], 0), full(a, [], 1)
    e = aten.exp.default(aten.sub.Tensor(a, aten.where.self(nothing, zero, top)))
    return aten.div.Tensor(e, aten.where.self(nothing, one, aten.sum.dim_IntList(e, [dim], True)))


@rule(aten._softmax_backward_data.default)
def _softmax_backward(grad: Tensor, y: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    dim = dim_of(dim, y)
    product = aten.mul.Tensor(grad, y)
    return aten.sub.Tensor(product, aten.mul.Tensor(y, aten.sum.dim_IntList(product, [dim], True)))


@rule(aten._log_softmax.default)
def _log_softmax(a: Tensor, dim: int, _: bool) -> Tensor:
    dim = dim_of(dim, a)
    shifted = aten.sub.Tensor(a, aten.amax.default(a, [dim], True))
    return aten.sub.Tensor(shifted, aten.log.default(aten.sum.dim_IntList(aten.exp.default(shifted), [dim], True)))


@rule(aten._log_softmax_backward_data.default)
def _log_softmax_backward(grad: Tensor, y: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    total = aten.sum.dim_IntList(grad, [dim_of(dim, y)], True)
    return aten.sub.Tensor(grad, aten.mul.Tensor(aten.exp.default(y), total))


@rule(aten.logsumexp.default)
def _logsumexp(a: Tensor, dims: Sequence[int], keepdim: bool = False) -> Tensor:
    every = sorted(dim_of(d, a) for d in dims)
    top = aten.amax.default(a, every, True)
    infinite = aten.eq.Scalar(aten.abs.default(top), math.inf)
    top = aten.where.self(infinite, aten.full.default([], 0, dtype=a.dtype, device=a.device), top)
    total = aten.sum.dim_IntList(aten.exp.default(aten.sub.Tensor(a, top)), every, True)
    made = aten.add.Tensor(aten.log.default(total), top)
    return made if keepdim else aten.squeeze.dims(made, every)


@rule(aten._weight_norm_interface.default)
def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Any:
    if v.dtype not in (torch.float32, torch.float64):  # whose norms have another type
        return NotImplemented
    dims = [d for d in range(v.dim()) if d != dim]
    norm = aten.sqrt.default(sum_dims(aten.mul.Tensor(v, v), dims, True))
    return aten.mul.Tensor(v, aten.div.Tensor(g, norm)), norm


@rule(aten._weight_norm_interface_backward.default)
def _weight_norm_backward(grad: Tensor, v: Tensor, g: Tensor, norm: Tensor, dim: int) -> Any:
    if v.dtype not in (torch.float32, torch.float64):
        return NotImplemented
    dims = [d for d in range(v.dim()) if d != dim]
    along = aten.div.Tensor(sum_dims(aten.mul.Tensor(grad, v), dims, True), norm)
    unit = aten.div.Tensor(v, norm)
    dv = aten.mul.Tensor(aten.sub.Tensor(grad, aten.mul.Tensor(along, unit)), aten.div.Tensor(g, norm))
    return dv, along
