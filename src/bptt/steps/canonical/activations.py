"""Activations, and what their derivatives are asked as, in the canonical set."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .arithmetic import clamp
from .rules import dim_of, rule, times

__all__: list[str] = []

aten = torch.ops.aten


def _zero_where(mask: Tensor, grad: Tensor) -> Tensor:
    return aten.where.self(mask, aten.full.default([], 0, dtype=grad.dtype, device=grad.device), grad)


@rule(aten.threshold_backward.default)
def _threshold_backward(grad: Tensor, a: Tensor, threshold: Any) -> Tensor:
    return _zero_where(aten.le.Scalar(a, threshold), grad)


@rule(aten.hardtanh.default)
def _hardtanh(a: Tensor, low: Any = -1, high: Any = 1) -> Tensor:
    return clamp(a, low, high)


@rule(aten.hardtanh_backward.default)
def _hardtanh_backward(grad: Tensor, a: Tensor, low: Any, high: Any) -> Tensor:
    return _zero_where(aten.logical_or.default(aten.le.Scalar(a, low), aten.ge.Scalar(a, high)), grad)


@rule(aten.hardshrink_backward.default, aten.softshrink_backward.default)
def _shrink_backward(grad: Tensor, a: Tensor, size: Any) -> Tensor:
    return _zero_where(aten.logical_and.default(aten.ge.Scalar(a, -size), aten.le.Scalar(a, size)), grad)


@rule(aten.hardsigmoid.default)
def _hardsigmoid(a: Tensor) -> Tensor:
    return aten.div.Tensor(clamp(aten.add.Tensor(a, 3), 0, 6), 6)


@rule(aten.hardsigmoid_backward.default)
def _hardsigmoid_backward(grad: Tensor, a: Tensor) -> Tensor:
    outside = aten.logical_or.default(aten.le.Scalar(a, -3), aten.ge.Scalar(a, 3))
    return _zero_where(outside, aten.div.Tensor(grad, 6))


@rule(aten.leaky_relu.default)
def _leaky_relu(a: Tensor, slope: Any = 0.01) -> Tensor:
    return aten.where.self(aten.gt.Scalar(a, 0), a, aten.mul.Tensor(a, slope))


@rule(aten.leaky_relu_backward.default)
def _leaky_relu_backward(grad: Tensor, a: Tensor, slope: Any, _: bool) -> Tensor:
    return aten.where.self(aten.gt.Scalar(a, 0), grad, aten.mul.Tensor(grad, slope))


@rule(aten._prelu_kernel.default)
def _prelu(a: Tensor, slope: Tensor) -> Tensor:
    return aten.where.self(aten.gt.Scalar(a, 0), a, aten.mul.Tensor(slope, a))


@rule(aten._prelu_kernel_backward.default)
def _prelu_backward(grad: Tensor, a: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    above = aten.gt.Scalar(a, 0)
    return (
        aten.where.self(above, grad, aten.mul.Tensor(slope, grad)),
        _zero_where(above, aten.mul.Tensor(a, grad)),
    )


@rule(aten.elu.default)
def _elu(a: Tensor, alpha: Any = 1, scale: Any = 1, input_scale: Any = 1) -> Tensor:
    below = times(aten.expm1.default(times(a, input_scale)), alpha * scale)
    return aten.where.self(aten.gt.Scalar(a, 0), times(a, scale), below)


@rule(aten.elu_backward.default)
def _elu_backward(grad: Tensor, alpha: Any, scale: Any, input_scale: Any, is_result: bool, a: Tensor) -> Tensor:
    if is_result:
        below = times(aten.add.Tensor(a, alpha * scale), input_scale)
    else:
        below = times(aten.exp.default(times(a, input_scale)), alpha * scale * input_scale)
    return aten.where.self(aten.gt.Scalar(a, 0), times(grad, scale), aten.mul.Tensor(grad, below))


@rule(aten.silu.default)
def _silu(a: Tensor) -> Tensor:
    return aten.mul.Tensor(a, aten.sigmoid.default(a))


@rule(aten.silu_backward.default)
def _silu_backward(grad: Tensor, a: Tensor) -> Tensor:
    s = aten.sigmoid.default(a)
    inner = aten.add.Tensor(aten.mul.Tensor(a, aten.rsub.Scalar(s, 1)), 1)
    return aten.mul.Tensor(aten.mul.Tensor(grad, s), inner)


@rule(aten.mish.default)
def _mish(a: Tensor) -> Tensor:
    return aten.mul.Tensor(a, aten.tanh.default(aten.softplus.default(a)))


@rule(aten.mish_backward.default)
def _mish_backward(grad: Tensor, a: Tensor) -> Tensor:
    t = aten.tanh.default(aten.softplus.default(a))
    slope = aten.mul.Tensor(aten.rsub.Scalar(aten.mul.Tensor(t, t), 1), aten.sigmoid.default(a))
    return aten.mul.Tensor(grad, aten.add.Tensor(t, aten.mul.Tensor(a, slope)))


@rule(aten.softplus.default)
def _softplus(a: Tensor, beta: Any = 1, threshold: Any = 20) -> Tensor:
    scaled = times(a, beta)
    # max(z, 0) + log1p(exp(-|z|)) is log1p(exp(z)) without its overflow.
    tail = aten.log1p.default(aten.exp.default(aten.neg.default(aten.abs.default(scaled))))
    soft = aten.add.Tensor(aten.relu.default(scaled), tail)
    return aten.where.self(aten.gt.Scalar(scaled, threshold), a, soft if beta == 1 else aten.div.Tensor(soft, beta))


@rule(aten.softplus_backward.default)
def _softplus_backward(grad: Tensor, a: Tensor, beta: Any, threshold: Any) -> Tensor:
    scaled = times(a, beta)
    soft = aten.mul.Tensor(grad, aten.sigmoid.default(scaled))
    return aten.where.self(aten.gt.Scalar(scaled, threshold), grad, soft)


@rule(aten.log_sigmoid_forward.default)
def _log_sigmoid_forward(a: Tensor) -> tuple[Tensor, Tensor]:
    tail = aten.log1p.default(aten.exp.default(aten.neg.default(aten.abs.default(a))))
    return aten.sub.Tensor(aten.clamp_max.default(a, 0), tail), aten.full.default(
        [0], 0, dtype=a.dtype, device=a.device
    )


@rule(aten.log_sigmoid_backward.default)
def _log_sigmoid_backward(grad: Tensor, a: Tensor, _: Tensor) -> Tensor:
    return aten.mul.Tensor(grad, aten.sigmoid.default(aten.neg.default(a)))


@rule(aten.gelu.default)
def _gelu(a: Tensor, *, approximate: str = "none") -> Tensor:
    half = aten.mul.Tensor(a, 0.5)
    if approximate == "tanh":
        return aten.mul.Tensor(half, aten.add.Tensor(aten.tanh.default(_gelu_inner(a)), 1))
    return aten.mul.Tensor(half, aten.add.Tensor(aten.erf.default(aten.mul.Tensor(a, math.sqrt(0.5))), 1))


def _gelu_inner(a: Tensor) -> Tensor:
    cube = aten.mul.Tensor(aten.mul.Tensor(a, a), a)
    return aten.mul.Tensor(aten.add.Tensor(a, aten.mul.Tensor(cube, 0.044715)), math.sqrt(2 / math.pi))


@rule(aten.gelu_backward.default)
def _gelu_backward(grad: Tensor, a: Tensor, *, approximate: str = "none") -> Tensor:
    if approximate == "tanh":
        t = aten.tanh.default(_gelu_inner(a))
        slope = aten.add.Tensor(aten.mul.Tensor(aten.mul.Tensor(a, a), 3 * 0.044715), 1)
        inner = aten.mul.Tensor(
            aten.rsub.Scalar(aten.mul.Tensor(t, t), 1), aten.mul.Tensor(slope, math.sqrt(2 / math.pi))
        )
        both = aten.add.Tensor(aten.add.Tensor(t, 1), aten.mul.Tensor(a, inner))
        return aten.mul.Tensor(grad, aten.mul.Tensor(both, 0.5))
    below = aten.mul.Tensor(aten.add.Tensor(aten.erf.default(aten.mul.Tensor(a, math.sqrt(0.5))), 1), 0.5)
    density = aten.mul.Tensor(
        aten.exp.default(aten.mul.Tensor(aten.mul.Tensor(a, a), -0.5)), 1 / math.sqrt(2 * math.pi)
    )
    return aten.mul.Tensor(grad, aten.add.Tensor(below, aten.mul.Tensor(a, density)))


@rule(aten.glu.default)
def _glu(a: Tensor, dim: int = -1) -> Tensor:
    dim, half = dim_of(dim, a), a.shape[dim] // 2
    return aten.mul.Tensor(
        aten.slice.Tensor(a, dim, 0, half), aten.sigmoid.default(aten.slice.Tensor(a, dim, half, 2 * half))
    )


@rule(aten.glu_backward.default)
def _glu_backward(grad: Tensor, a: Tensor, dim: int) -> Tensor:
    dim, half = dim_of(dim, a), a.shape[dim] // 2
    s = aten.sigmoid.default(aten.slice.Tensor(a, dim, half, 2 * half))
    first = aten.mul.Tensor(grad, s)
    second = aten.sigmoid_backward.default(aten.mul.Tensor(grad, aten.slice.Tensor(a, dim, 0, half)), s)
    return aten.cat.default([first, second], dim)
