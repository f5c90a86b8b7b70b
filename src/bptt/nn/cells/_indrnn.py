"""The independently recurrent network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ._cell import NONLINEARITIES, CellModule, one_of

__all__ = ["IndRNN"]


class IndRNN(CellModule):
    """The independently recurrent network (IndRNN), whose units see only their own past: `h = cell(x, h)`.

        h_t = f(W x_t + u h_{t-1} + b)        u h: unit by unit

    So the Jacobian of a step is diagonal, and over k steps it is at most |u|^k for relu: units with |u| near 1 remember
    long, and a bound |u| <= c^(1 / T) keeps gradients over T steps below c. Units mix in the next layer.

    input_size, hidden_size: I and H. bias: whether there is b. nonlinearity: f, one of "relu", "tanh", "sigmoid" and
        "softplus".

    Parameters: weight_ih [H, I], weight_hh [H] (u, which starts in U(0, 1)), bias [H].

    Called with x `[B, I]` or `[I]` and h `[B, H]` or `[H]` (zeros where left out), it returns h_t.

    Raises ValueError for an unknown nonlinearity, and for an input or a state of another shape.

    >>> import torch, bptt
    >>> cell = bptt.nn.cells.IndRNN(3, 4)
    >>> cell(torch.zeros(2, 3), cell.initial_state(2)).shape, cell.weight_hh.shape
    (torch.Size([2, 4]), torch.Size([4]))

    Source: Li, Li, Cook, Zhu and Gao 2018, "Independently recurrent neural network (IndRNN): building a longer and
    deeper RNN" (arXiv 1803.04831): the equation of its hidden state.
    """

    options = ("nonlinearity",)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        *,
        nonlinearity: str = "relu",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, 1, device, dtype)
        self.nonlinearity = one_of("nonlinearity", nonlinearity, *NONLINEARITIES)
        self._add("weight_hh", hidden_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        torch.nn.init.uniform_(self.weight_hh)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        (h,) = self._entering(input, hx)
        return NONLINEARITIES[self.nonlinearity](linear(input, self.weight_ih, self.bias) + self.weight_hh * h)
