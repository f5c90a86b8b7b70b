"""Spikes: the step function forward, and a surrogate of its derivative backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["fast_sigmoid_spike", "triangular_spike"]


def fast_sigmoid_spike(excess: Tensor, slope: float = 25.0) -> Tensor:
    """Give 1 where excess is above 0, else 0, with the derivative of a fast sigmoid, 1 / (1 + slope |excess|)^2.

    excess: how far the membrane is above its threshold, of any shape. slope: how narrow the surrogate is. It is 1 at
    the threshold, whatever the slope. Has derivatives of every order, those of the surrogate.

    >>> import torch, bptt
    >>> v = torch.tensor([-0.04, 0.04], requires_grad=True)
    >>> spikes = bptt.nn.cells.fast_sigmoid_spike(v)
    >>> spikes.tolist(), torch.autograd.grad(spikes.sum(), v)[0].tolist()
    ([0.0, 1.0], [0.25, 0.25])

    Source: Zenke and Ganguli 2018, "SuperSpike" (arXiv 1705.11146); Neftci, Mostafa and Zenke 2019 (arXiv 1901.09948).
    """
    spikes: Tensor = FastSigmoid.apply(excess, slope)
    return spikes


def triangular_spike(excess: Tensor, height: float = 0.3) -> Tensor:
    """Give 1 where excess is above 0, else 0, with the triangle height * max(0, 1 - |excess|) for its derivative.

    excess: how far the membrane is above its threshold, as a share of it, of any shape. height: the largest derivative,
    below 1 so that gradients through many spikes do not explode. Has derivatives of every order, those of the triangle.

    >>> import torch, bptt
    >>> v = torch.tensor([-0.5, 0.0, 2.0], requires_grad=True)
    >>> spikes = bptt.nn.cells.triangular_spike(v, height=0.5)
    >>> spikes.tolist(), torch.autograd.grad(spikes.sum(), v)[0].tolist()
    ([0.0, 0.0, 1.0], [0.25, 0.5, 0.0])

    Source: Bellec, Salaj, Subramoney, Legenstein and Maass 2018 (arXiv 1803.09574): the pseudo-derivative.
    """
    spikes: Tensor = Triangle.apply(excess, height)
    return spikes


class Spikes(torch.autograd.Function):
    """Spikes. Subclasses have a backward pass of differentiable operations alone, so that it can be traced and derived.

    ctx.size: the number that the surrogate is given.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(excess: Tensor, size: float) -> Tensor:
        return (excess > 0).to(excess.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        excess, ctx.size = inputs
        ctx.save_for_backward(excess)


class FastSigmoid(Spikes):
    """Spikes with the derivative of a fast sigmoid of this slope."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (excess,) = ctx.saved_tensors
        return grads[0] / (1 + ctx.size * excess.abs()) ** 2, None


class Triangle(Spikes):
    """Spikes with a triangle of this height for a derivative."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (excess,) = ctx.saved_tensors
        return grads[0] * ctx.size * torch.relu(1 - excess.abs()), None
