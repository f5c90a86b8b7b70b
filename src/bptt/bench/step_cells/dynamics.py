"""Cells that are differential equations in steps of time: leaky, spiking, oscillating, multiscale, liquid, RK4."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, softplus

from .cell import Draws, StepProblem

__all__ = [
    "CORNN",
    "LEAK",
    "LEM_DT",
    "LIF",
    "LTC_UNFOLDS",
    "RK4_DT",
    "cornn",
    "distance_from_threshold",
    "leaky",
    "lem",
    "lif",
    "ltc",
    "rk4",
]

LEAK = 0.2
"""Step of time over time constant of the leaky network."""

LIF = (0.8, 1.0, 5.0)
"""Decay of the membrane, threshold, and steepness of the surrogate."""

CORNN = (0.042, 2.7, 4.7)
"""Step of time, stiffness gamma, damping epsilon: those of the paper's first experiments."""

LEM_DT = 0.5
"""Largest step of time of a LEM."""

LTC_UNFOLDS = 3
"""Solver steps of an LTC for each input."""

RK4_DT = 0.25
"""Step of time of the ODE."""

Pair = tuple[Tensor, Tensor]


def leaky(draws: Draws) -> StepProblem:
    """Leaky rate network: h' = (1 - a) h + a tanh(W h + U x + b), a = dt / tau.

    Jaeger, Lukosevicius, Popovici and Siewert 2007, equation 3; Euler's method on a continuous-time network.
    """
    H = draws.H
    W, U, b = draws.weight(H, H), draws.weight(H, H), draws.bias(H)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = (1 - LEAK) * h + LEAK * torch.tanh(linear(h, W) + linear(x, U, b))
        return h, h

    return draws.problem(step, draws.zeros(H), draws.inputs(H))


class _Spike(torch.autograd.Function):
    """Heaviside's step, 1 above 0, with the derivative 1 / (1 + k |v|)^2."""

    @staticmethod
    def forward(v: Tensor) -> Tensor:
        return (v > 0).to(v.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (v,) = ctx.saved_tensors
        return grads[0] / (1 + LIF[2] * v.abs()) ** 2


def lif(draws: Draws) -> StepProblem:
    """Recurrent layer of leaky integrate-and-fire neurons, trained through a surrogate gradient.

        v' = decay v (1 - s) + W x + R s        s' = 1 where v' > threshold, else 0

    The membrane v is reset by the spike s of the step before. ds'/dv' is taken for 1 / (1 + k |v' - threshold|)^2.

    Neftci, Mostafa and Zenke 2019 (arXiv 1901.09948); the surrogate of Zenke and Ganguli 2018.
    """
    H = draws.H
    decay, threshold, _ = LIF
    bound = 2 * H**-0.5
    W, R = draws.uniform(H, H, low=-bound, high=bound), draws.weight(H, H)

    def step(carry: Pair, x: Tensor) -> tuple[Pair, Tensor]:
        v, s = carry
        v = decay * v * (1 - s) + linear(x, W) + linear(s, R)
        spikes: Tensor = _Spike.apply(v - threshold)
        return (v, spikes), spikes

    return draws.problem(step, (draws.zeros(H), draws.zeros(H)), draws.inputs(H))


def distance_from_threshold(carry: Pair) -> Tensor:
    """|v - threshold| of a `lif` layer's carry."""
    return (carry[0] - LIF[1]).abs()


def cornn(draws: Draws) -> StepProblem:
    """Coupled oscillatory network: a network of damped oscillators, driven by the input.

    z' = z + dt (tanh(W y + V z + U x + b) - gamma y - epsilon z)       y' = y + dt z'

    Rusch and Mishra 2021 (arXiv 2010.00951), equation 3.
    """
    H = draws.H
    dt, gamma, epsilon = CORNN
    W, V, U, b = draws.weight(H, H), draws.weight(H, H), draws.weight(H, H), draws.bias(H)

    def step(carry: Pair, x: Tensor) -> tuple[Pair, Tensor]:
        y, z = carry
        z = z + dt * (torch.tanh(linear(y, W) + linear(z, V) + linear(x, U, b)) - gamma * y - epsilon * z)
        y = y + dt * z
        return (y, z), y

    return draws.problem(step, (draws.zeros(H), draws.zeros(H)), draws.inputs(H))


def lem(draws: Draws) -> StepProblem:
    """Long expressive memory: two states, each with a step of time that input and state choose.

        d_1 = dt sigmoid(W_1 y + V_1 x + b_1)       d_2 = dt sigmoid(W_2 y + V_2 x + b_2)
        z' = (1 - d_1) z + d_1 tanh(W_z y + V_z x + b_z)
        y' = (1 - d_2) y + d_2 tanh(W_y z' + V_y x + b_y)

    Rusch, Mishra, Erichson and Mahoney 2022 (arXiv 2110.04744), equation 3.
    """
    H = draws.H
    W, V, b, W_y = draws.weight(3 * H, H), draws.weight(4 * H, H), draws.bias(4 * H), draws.weight(H, H)

    def step(carry: Pair, x: Tensor) -> tuple[Pair, Tensor]:
        y, z = carry
        x_1, x_2, x_z, x_y = linear(x, V, b).chunk(4, 1)
        y_1, y_2, y_z = linear(y, W).chunk(3, 1)
        d_1, d_2 = LEM_DT * torch.sigmoid(x_1 + y_1), LEM_DT * torch.sigmoid(x_2 + y_2)
        z = (1 - d_1) * z + d_1 * torch.tanh(x_z + y_z)
        y = (1 - d_2) * y + d_2 * torch.tanh(x_y + linear(z, W_y))
        return (y, z), y

    return draws.problem(step, (draws.zeros(H), draws.zeros(H)), draws.inputs(H))


def rk4(draws: Draws) -> StepProblem:
    """An ODE, dh/dt = tanh(W h + U x + b) - h, by one step of the classical Runge-Kutta method of 4 stages.

        k_1 = f(h)      k_2 = f(h + dt/2 k_1)      k_3 = f(h + dt/2 k_2)      k_4 = f(h + dt k_3)
        h' = h + dt/6 (k_1 + 2 k_2 + 2 k_3 + k_4)

    Funahashi and Nakamura 1993 for the network, Chen et al. 2018 (arXiv 1806.07366) for the training of such a step.
    """
    H = draws.H
    W, U, b = draws.weight(H, H), draws.weight(H, H), draws.bias(H)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        drive = linear(x, U, b)

        def f(h: Tensor) -> Tensor:
            return torch.tanh(linear(h, W) + drive) - h

        k_1 = f(h)
        k_2 = f(h + RK4_DT / 2 * k_1)
        k_3 = f(h + RK4_DT / 2 * k_2)
        k_4 = f(h + RK4_DT * k_3)
        h = h + RK4_DT / 6 * (k_1 + 2 * k_2 + 2 * k_3 + k_4)
        return h, h

    return draws.problem(step, draws.zeros(H), draws.inputs(H))


def ltc(draws: Draws) -> StepProblem:
    """Liquid time-constant network by its fused solver, `LTC_UNFOLDS` steps for each input.

    f = sigmoid(W h + U x + b)      h <- (h + dt f A) / (1 + dt (1 / tau + f)),     dt = 1 / LTC_UNFOLDS

    tau = softplus(t), so that it stays positive.

    Hasani, Lechner, Amini, Rus and Grosu 2021 (arXiv 2006.04439), equation 3 and algorithm 1.
    """
    H = draws.H
    W, U, b, A = draws.weight(H, H), draws.weight(H, H), draws.bias(H), draws.normal(H)
    t = draws.uniform(H, low=0.0, high=2.0)
    dt = 1 / LTC_UNFOLDS

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        drive, rate = linear(x, U, b), 1 / softplus(t)
        for _ in range(LTC_UNFOLDS):
            f = torch.sigmoid(linear(h, W) + drive)
            h = (h + dt * f * A) / (1 + dt * (rate + f))
        return h, h

    return draws.problem(step, draws.zeros(H), draws.inputs(H))
