"""The minimal gated unit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ._cell import CellModule

__all__ = ["MGU"]


class MGU(CellModule):
    """The minimal gated unit, a GRU with one gate: `h = cell(x, h)`.

        f = sigmoid(W_f [h_{t-1}, x_t] + b_f)
        n = tanh(W_h [f h_{t-1}, x_t] + b_h)
        h_t = (1 - f) h_{t-1} + f n

    The gate f both forgets and resets: two thirds of a GRU's parameters.

    input_size, hidden_size: I and H. bias: whether there are b_f and b_h.

    Parameters: weight_ih [2 H, I], weight_hh [2 H, H], bias [2 H], in the order f, n.

    Called with x `[B, I]` or `[I]` and h `[B, H]` or `[H]` (zeros where left out), it returns h_t.

    Raises ValueError for sizes below 1, and for an input or a state of another shape.

    >>> import torch, bptt
    >>> cell = bptt.nn.cells.MGU(3, 4)
    >>> cell(torch.zeros(2, 3), cell.initial_state(2)).shape
    torch.Size([2, 4])

    Source: Zhou, Wu, Zhang and Zhou 2016, "Minimal gated unit for recurrent neural networks" (arXiv 1603.09420):
    its equations of the forget gate, the short-term response and the hidden state.
    """

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, *, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(input_size, hidden_size, bias, 2, device, dtype)
        self.reset_parameters()

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        (h,) = self._entering(input, hx)
        f, n = linear(input, self.weight_ih, self.bias).chunk(2, -1)
        W_f, W_h = self.weight_hh.chunk(2)
        f = torch.sigmoid(f + linear(h, W_f))
        n = torch.tanh(n + linear(f * h, W_h))
        return (1 - f) * h + f * n
