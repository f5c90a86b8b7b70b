"""The sLSTM of xLSTM."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, logsigmoid

from ._cell import CellModule, one_of

__all__ = ["SLSTM"]


class SLSTM(CellModule):
    """The sLSTM of xLSTM, an LSTM with exponential gates: `h, c, n, m = cell(x, (h, c, n, m))`.

        (i~, f~, z~, o~) = W_ih x_t + W_hh h_{t-1} + b
        c_t = f c_{t-1} + i z,    n_t = f n_{t-1} + i,    h_t = o c_t / n_t
        z = tanh(z~),    i = exp(i~),    f = sigmoid(f~) or exp(f~),    o = sigmoid(o~)

    with i and f stabilised by m, of which h_t does not depend but for rounding:

        m_t = max(log f + m_{t-1}, log i)
        i' = exp(log i - m_t),    f' = exp(log f + m_{t-1} - m_t)

    input_size, hidden_size: I and H. bias: whether there is b. forget: the activation of the forget gate, "sigmoid" or
    "exp". All units mix their memories through weight_hh: one head, in the words of the paper.

    Parameters: weight_ih [4 H, I], weight_hh [4 H, H], bias [4 H], in the order i, f, z, o.

    Called with x `[B, I]` or `[I]` and the states `[B, H]` or `[H]` (zeros where left out), it returns (h_t, c_t, n_t,
    m_t). From c = n = 0 any m gives the same h_t, unless f exceeds i so far that i' is rounded to 0: m starts at 0.

    Raises ValueError for an unknown forget gate, and for an input or a state of another shape.

    >>> import torch, bptt
    >>> cell = bptt.nn.cells.SLSTM(3, 4)
    >>> h, c, n, m = cell(torch.zeros(2, 3), cell.initial_state(2))
    >>> h.shape, bool((n > 0).all())
    (torch.Size([2, 4]), True)

    Source: Beck, Pöppel, Spanring, Auer, Prudnikova, Kopp, Klambauer, Brandstetter and Hochreiter 2024, "xLSTM:
    extended long short-term memory" (arXiv 2405.04517): the sLSTM with a stabilizer state.
    """

    states = ("h", "c", "n", "m")
    options = ("forget",)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        *,
        forget: str = "sigmoid",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, 4, device, dtype)
        self.forget = one_of("forget", forget, "sigmoid", "exp")
        self.reset_parameters()

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        h, c, n, m = self._entering(input, hx)
        gates = linear(input, self.weight_ih, self.bias) + linear(h, self.weight_hh)
        log_i, f, z, o = gates.chunk(4, -1)
        log_f = (logsigmoid(f) if self.forget == "sigmoid" else f) + m
        m = torch.maximum(log_f, log_i)
        i, f = torch.exp(log_i - m), torch.exp(log_f - m)
        c = f * c + i * torch.tanh(z)
        n = f * n + i
        return torch.sigmoid(o) * c / n, c, n, m
