"""The coupled oscillatory recurrent network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ._cell import CellModule, positive

__all__ = ["CoRNN"]


class CoRNN(CellModule):
    """The coupled oscillatory recurrent network (coRNN): `y, z = cell(x, (y, z))`.

    Units are oscillators of position y and velocity z, driven through one another and by the input,

        y'' = tanh(W_y y + W_z y' + V x + b) - gamma y - epsilon y'                                         (1)

    in steps of dt, explicit but for the position:

        z_t = z_{t-1} + dt (tanh(W_y y_{t-1} + W_z z_{t-1} + V x_t + b) - gamma y_{t-1} - epsilon z_{t-1})
        y_t = y_{t-1} + dt z_t                                                                              (3)

    input_size, hidden_size: I and H. bias: whether there is b.
    dt: the length of a step. gamma: the square of the frequency. epsilon: the damping. All three decide how long a unit
        remembers, and are tuned for each task; gradients stay bounded for small dt.

    Parameters: weight_ih [H, I] (V), weight_hh [H, H] (W_y), weight_hz [H, H] (W_z), bias [H].

    Called with x `[B, I]` or `[I]` and the states `[B, H]` or `[H]` (zeros where left out), it returns (y_t, z_t).

    Raises ValueError for numbers that are not above 0, and for an input or a state of another shape.

    >>> import torch, bptt
    >>> cell = bptt.nn.cells.CoRNN(3, 4)
    >>> y, z = cell(torch.zeros(2, 3), cell.initial_state(2))
    >>> torch.equal(y, cell.dt * z)
    True

    Source: Rusch and Mishra 2021, "Coupled oscillatory recurrent neural network (coRNN): an accurate and (gradient)
    stable architecture for learning long time dependencies" (arXiv 2010.00951), with n-bar = n - 1.
    """

    states = ("y", "z")
    options = ("dt", "gamma", "epsilon")

    weight_hz: Tensor

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        *,
        dt: float = 0.05,
        gamma: float = 2.5,
        epsilon: float = 5.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, 1, device, dtype)
        self._add("weight_hz", hidden_size, hidden_size)
        self.dt, self.gamma, self.epsilon = positive("dt", dt), positive("gamma", gamma), positive("epsilon", epsilon)
        self.reset_parameters()

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        y, z = self._entering(input, hx)
        drive = linear(input, self.weight_ih, self.bias) + linear(y, self.weight_hh) + linear(z, self.weight_hz)
        z = z + self.dt * (torch.tanh(drive) - self.gamma * y - self.epsilon * z)
        return y + self.dt * z, z
