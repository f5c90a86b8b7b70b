"""The LSTM, with or without a projection of h. Equations: chapter 5 of equations/README.md.

i, f, o = sigmoid(...), g = tanh(...) of W_i* x + b_i* + W_h* h_{t-1} + b_h*
c_t = f * c_{t-1} + i * g          h_t = o * tanh(c_t), times W_hr' with a projection
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ._cell import Cell, Pullback, State, Weights, parts

__all__ = ["LSTM"]


class LSTM(Cell):
    """Taped: i, f, g, o, in this order (torch's)."""

    name = "lstm"
    gates_per_unit = 4
    taped_per_unit = 4
    states = 2

    def gates(self, gx: Tensor, h: Tensor, w: Weights) -> Tensor:
        i, f, g, o = parts(gx + functional.linear(h, w.hh), 4)
        return torch.cat([torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)], -1)

    def advance(self, gates: Tensor, prev: State, w: Weights) -> State:
        i, f, g, o = parts(gates, 4)
        c = f * prev[1] + i * g
        h = o * torch.tanh(c)
        return (h if w.hr is None else functional.linear(h, w.hr), c)

    def pull(self, lam: State, gates: Tensor, prev: State, state: State, w: Weights) -> Pullback:
        i, f, g, o = parts(gates, 4)
        dh, dc_later = lam
        tanh_c = torch.tanh(state[1])
        dm = dh if w.hr is None else dh @ w.hr  # m = o * tanh(c), what the projection reads
        do = dm * tanh_c
        dc = dc_later + dm * o * (1 - tanh_c * tanh_c)
        df = dc * prev[1]
        di = dc * g
        dg = dc * i
        da = torch.cat([di * i * (1 - i), df * f * (1 - f), dg * (1 - g * g), do * o * (1 - o)], -1)
        return Pullback(da, total=(dh, dc), carried=(dc * f,))

    def projected(self, gates: Tensor, state: State) -> Tensor:
        return parts(gates, 4)[3] * torch.tanh(state[1])
