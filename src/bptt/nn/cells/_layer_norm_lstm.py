"""The LSTM with layer normalisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear

from ._cell import CellModule, positive

__all__ = ["LayerNormLSTM"]


class LayerNormLSTM(CellModule):
    """The LSTM with layer normalisation: `h, c = cell(x, (h, c))`.

        (i, f, g, o) = LN(W_hh h_{t-1}; alpha_1) + LN(W_ih x_t; alpha_2) + b        (20)
        c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g)                               (21)
        h_t = sigmoid(o) tanh(LN(c_t; alpha_3, beta_3))                             (22)

    LN takes the mean and the variance over all 4 H entries in (20), over H in (22). The paper's beta_1 and beta_2 only
    add to b, which stands for all three. At h = 0 LN divides by sqrt(eps), so that the gradient of a first state of
    zeros is large.

    input_size, hidden_size: I and H. bias: whether there are b and beta_3. eps: added to the variance.

    Parameters: weight_ih [4 H, I], weight_hh [4 H, H], bias [4 H]; gain_ih and gain_hh [4 H] (alpha_2, alpha_1), gain_c
    and bias_c [H] (alpha_3, beta_3). The order of the gates is torch.nn.LSTM's. Gains start at 1 and biases at 0.

    Called with x `[B, I]` or `[I]` and the states `[B, H]` or `[H]` (zeros where left out), it returns (h_t, c_t).

    Raises ValueError for sizes below 1, and for an input or a state of another shape.

    >>> import torch, bptt
    >>> cell = bptt.nn.cells.LayerNormLSTM(3, 4)
    >>> h, c = cell(torch.zeros(2, 3), cell.initial_state(2))
    >>> h.shape, c.shape
    (torch.Size([2, 4]), torch.Size([2, 4]))

    Source: Ba, Kiros and Hinton 2016, "Layer normalization" (arXiv 1607.06450), supplementary material.
    """

    states = ("h", "c")
    options = ("eps",)

    gain_ih: Tensor
    gain_hh: Tensor
    gain_c: Tensor
    bias_c: Tensor | None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        *,
        eps: float = 1e-5,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, 4, device, dtype)
        self.eps = positive("eps", eps)
        self._add("gain_ih", 4 * hidden_size)
        self._add("gain_hh", 4 * hidden_size)
        self._add("gain_c", hidden_size)
        self._add("bias_c", hidden_size, wanted=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for name, parameter in self.named_parameters():
            if not name.startswith("weight"):
                torch.nn.init.constant_(parameter, float(name.startswith("gain")))

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        h, c = self._entering(input, hx)
        four, one = (4 * self.hidden_size,), (self.hidden_size,)
        gates = layer_norm(linear(input, self.weight_ih), four, self.gain_ih, self.bias, self.eps)
        gates = gates + layer_norm(linear(h, self.weight_hh), four, self.gain_hh, None, self.eps)
        i, f, g, o = gates.chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(layer_norm(c, one, self.gain_c, self.bias_c, self.eps))
        return h, c
