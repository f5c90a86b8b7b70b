"""Losses of each element, and their gradients, in the canonical set."""

from __future__ import annotations

import torch
from torch import Tensor

from .reductions import mean_dims, sum_dims
from .rules import rule, times

__all__: list[str] = []

aten = torch.ops.aten

_MEAN, _SUM = 1, 2  # of the numbers by which aten knows reductions


def _reduced(a: Tensor, reduction: int) -> Tensor:
    every = list(range(a.dim()))
    return mean_dims(a, None, False) if reduction == _MEAN else sum_dims(a, every, False) if reduction == _SUM else a


def _spread(grad: Tensor, slope: Tensor, reduction: int) -> Tensor:
    """The gradient of what was reduced: its slope times the share of an element."""
    made = aten.mul.Tensor(slope, grad)
    return aten.div.Tensor(made, slope.numel()) if reduction == _MEAN else made


@rule(aten.mse_loss.default)
def _mse(a: Tensor, target: Tensor, reduction: int = _MEAN) -> Tensor:
    difference = aten.sub.Tensor(a, target)
    return _reduced(aten.mul.Tensor(difference, difference), reduction)


@rule(aten.mse_loss_backward.default)
def _mse_backward(grad: Tensor, a: Tensor, target: Tensor, reduction: int) -> Tensor:
    return _spread(grad, aten.mul.Tensor(aten.sub.Tensor(a, target), 2), reduction)


@rule(aten.smooth_l1_loss.default)
def _smooth_l1(a: Tensor, target: Tensor, reduction: int = _MEAN, beta: float = 1.0) -> Tensor:
    away = aten.abs.default(aten.sub.Tensor(a, target))
    if beta == 0:
        return _reduced(away, reduction)
    near = aten.div.Tensor(aten.mul.Tensor(aten.mul.Tensor(away, away), 0.5), beta)
    return _reduced(aten.where.self(aten.lt.Scalar(away, beta), near, aten.sub.Tensor(away, 0.5 * beta)), reduction)


@rule(aten.smooth_l1_loss_backward.default)
def _smooth_l1_backward(grad: Tensor, a: Tensor, target: Tensor, reduction: int, beta: float) -> Tensor:
    difference = aten.sub.Tensor(a, target)
    slope = aten.sign.default(difference)
    if beta != 0:
        near = aten.lt.Scalar(aten.abs.default(difference), beta)
        slope = aten.where.self(near, aten.div.Tensor(difference, beta), slope)
    return _spread(grad, slope, reduction)


@rule(aten.huber_loss.default)
def _huber(a: Tensor, target: Tensor, reduction: int = _MEAN, delta: float = 1.0) -> Tensor:
    away = aten.abs.default(aten.sub.Tensor(a, target))
    near = aten.mul.Tensor(aten.mul.Tensor(away, away), 0.5)
    far = times(aten.sub.Tensor(away, 0.5 * delta), delta)
    return _reduced(aten.where.self(aten.lt.Scalar(away, delta), near, far), reduction)


@rule(aten.huber_loss_backward.default)
def _huber_backward(grad: Tensor, a: Tensor, target: Tensor, reduction: int, delta: float) -> Tensor:
    difference = aten.sub.Tensor(a, target)
    near = aten.lt.Scalar(aten.abs.default(difference), delta)
    return _spread(grad, aten.where.self(near, difference, times(aten.sign.default(difference), delta)), reduction)
