"""The adaptive leaky integrate-and-fire neuron."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.nn.functional import linear

from ._cell import CellModule, positive
from ._surrogate import triangular_spike

__all__ = ["ALIF"]


class ALIF(CellModule):
    """Adaptive leaky integrate-and-fire neurons, as in LSNNs: `spikes, (v, a) = cell(x, (v, a))`.

        B_t = threshold + beta a_t                                                                      (1)
        a_t = rho a_{t-1} + (1 - rho) s_{t-1}                               rho = exp(-dt / tau_a)      (2)
        v_t = alpha v_{t-1} + (1 - alpha) i_t - B_{t-1} s_{t-1}             alpha = exp(-dt / tau_m)
        i_t = W_ih x_t + b + W_hh s_{t-1}
        s_t = step((v_t - B_t) / B_t)

    A neuron's threshold B rises with each of its spikes and falls back slowly, over tau_a: that is a memory many times
    longer than the membrane's. The derivative of the step function is a triangle (`triangular_spike`). Membrane
    resistance and the delay of connections are one; there is no refractory time.

    input_size, hidden_size: I and H. bias: whether there is b.
    tau_m, tau_a, dt: the time constants of membrane and threshold and the length of a step, in one unit (here
        milliseconds).
    threshold: that of a neuron at rest, the paper's b^0. beta: how much spikes raise it; 0 makes plain neurons.
    height: of the triangle, the paper's gamma.
    recurrent: whether spikes of the layer come back to it; without, there is no weight_hh.
    detach_reset: whether no gradient passes through the reset, the last term of v_t.

    Parameters: weight_ih [H, I], weight_hh [H, H], bias [H].

    Called with x `[B, I]` or `[I]` and the states `[B, H]` or `[H]` (zeros where left out), it returns the spikes, 0 or
    1, and (v_t, a_t).

    Raises ValueError for numbers that are not above 0, and for an input or a state of another shape.

    >>> import torch, bptt
    >>> cell = bptt.nn.cells.ALIF(3, 4)
    >>> spikes, (v, a) = cell(torch.ones(2, 3), cell.initial_state(2))
    >>> spikes.shape, v.shape, a.shape
    (torch.Size([2, 4]), torch.Size([2, 4]), torch.Size([2, 4]))

    Source: Bellec, Salaj, Subramoney, Legenstein and Maass 2018, "Long short-term memory and learning-to-learn in
    networks of spiking neurons" (arXiv 1803.09574): the neurons of the LSNN, where a is called b.
    """

    states = ("v", "a")
    options = ("tau_m", "tau_a", "dt", "threshold", "beta", "height", "recurrent", "detach_reset")

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        *,
        tau_m: float = 20.0,
        tau_a: float = 700.0,
        dt: float = 1.0,
        threshold: float = 0.01,
        beta: float = 1.8,
        height: float = 0.3,
        recurrent: bool = True,
        detach_reset: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, 1, device, dtype)
        self.tau_m, self.tau_a, self.dt = positive("tau_m", tau_m), positive("tau_a", tau_a), positive("dt", dt)
        self.threshold, self.height = positive("threshold", threshold), positive("height", height)
        if not beta >= 0:
            raise ValueError(f"beta must be 0 or more: got {beta}")
        self.beta, self.recurrent, self.detach_reset = beta, recurrent, detach_reset
        if not recurrent:
            self.register_parameter("weight_hh", None)
        self.reset_parameters()

    def spikes(self, v: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        """The spikes of neurons with the membrane v and the adaptation a, and their threshold B."""
        B = self.threshold + self.beta * a
        return triangular_spike((v - B) / B, self.height), B

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        v, a = self._entering(input, hx)
        alpha, rho = math.exp(-self.dt / self.tau_m), math.exp(-self.dt / self.tau_a)
        s, B = self.spikes(v, a)
        reset = (B * s).detach() if self.detach_reset else B * s
        i = linear(input, self.weight_ih, self.bias)
        if self.recurrent:
            i = i + linear(s, self.weight_hh)
        v = alpha * v + (1 - alpha) * i - reset
        a = rho * a + (1 - rho) * s
        return self.spikes(v, a)[0], (v, a)
