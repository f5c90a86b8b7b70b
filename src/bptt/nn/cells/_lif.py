"""The leaky integrate-and-fire neuron."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.nn.functional import linear

from ._cell import CellModule, positive
from ._surrogate import fast_sigmoid_spike

__all__ = ["LIF"]


class LIF(CellModule):
    """Leaky integrate-and-fire neurons with a synaptic current: `spikes, (v, i) = cell(x, (v, i))`.

        s_{t-1} = step(v_{t-1} - threshold)
        i_t = alpha i_{t-1} + W_ih x_t + b + W_hh s_{t-1}           alpha = exp(-dt / tau_syn)     (4)
        v_t = beta v_{t-1} + i_{t-1} - threshold s_{t-1}            beta = exp(-dt / tau_mem)      (5)

    and the output is s_t. The current of a step reaches the membrane in the next one. The derivative of the step
    function is that of a fast sigmoid (`fast_sigmoid_spike`).

    input_size, hidden_size: I and H. bias: whether there is b.
    tau_mem, tau_syn, dt: the time constants of membrane and synapse and the length of a step, in one unit (here
        milliseconds).
    threshold: where the membrane spikes, and what a spike takes from it.
    slope: of the surrogate.
    recurrent: whether spikes of the layer come back to it; without, there is no weight_hh.
    detach_reset: whether no gradient passes through the reset, the last term of (5).

    Parameters: weight_ih [H, I], weight_hh [H, H], bias [H].

    Called with x `[B, I]` or `[I]` and the states `[B, H]` or `[H]` (zeros where left out), it returns the spikes, 0 or
    1, and (v_t, i_t).

    Raises ValueError for numbers that are not above 0, and for an input or a state of another shape.

    >>> import torch, bptt
    >>> cell = bptt.nn.cells.LIF(3, 4)
    >>> spikes, (v, i) = cell(torch.ones(2, 3), cell.initial_state(2))
    >>> spikes.shape, v.shape, i.shape
    (torch.Size([2, 4]), torch.Size([2, 4]), torch.Size([2, 4]))

    Source: Neftci, Mostafa and Zenke 2019, "Surrogate gradient learning in spiking neural networks" (arXiv 1901.09948).
    """

    states = ("v", "i")
    options = ("tau_mem", "tau_syn", "dt", "threshold", "slope", "recurrent", "detach_reset")

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        *,
        tau_mem: float = 10.0,
        tau_syn: float = 5.0,
        dt: float = 1.0,
        threshold: float = 1.0,
        slope: float = 25.0,
        recurrent: bool = True,
        detach_reset: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, 1, device, dtype)
        self.tau_mem, self.tau_syn = positive("tau_mem", tau_mem), positive("tau_syn", tau_syn)
        self.dt = positive("dt", dt)
        self.threshold, self.slope = positive("threshold", threshold), positive("slope", slope)
        self.recurrent, self.detach_reset = recurrent, detach_reset
        if not recurrent:
            self.register_parameter("weight_hh", None)
        self.reset_parameters()

    def spikes(self, v: Tensor) -> Tensor:
        """The spikes of neurons with the membrane v."""
        return fast_sigmoid_spike(v - self.threshold, self.slope)

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        v, i = self._entering(input, hx)
        s = self.spikes(v)
        reset = self.threshold * (s.detach() if self.detach_reset else s)
        v = math.exp(-self.dt / self.tau_mem) * v + i - reset
        i = math.exp(-self.dt / self.tau_syn) * i + linear(input, self.weight_ih, self.bias)
        if self.recurrent:
            i = i + linear(s, self.weight_hh)
        return self.spikes(v), (v, i)
