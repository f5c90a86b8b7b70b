"""The LSTM, with or without a projection of h. Numbers are those of equations/README.md."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ._cell import Cell, Pullback, State, Weights, parts

__all__ = ["LSTM"]


class LSTM(Cell):
    """The LSTM of torch.nn. Taped: i, f, g, o, in this order (torch's)."""

    name, mode = "lstm", "LSTM"
    gate_names = tape_names = ("i", "f", "g", "o")
    activations = ("sigmoid", "sigmoid", "tanh", "sigmoid")
    state_names = ("h", "c")
    keeps, admits, projects = "f", "i", True
    onnx, onnx_gates = "LSTM", ("i", "o", "f", "g")

    def gates(self, gx: Tensor, h: Tensor, w: Weights) -> Tensor:
        a_i, a_f, a_g, a_o = parts(gx + functional.linear(h, w.hh), 4)
        return torch.cat([torch.sigmoid(a_i), torch.sigmoid(a_f), torch.tanh(a_g), torch.sigmoid(a_o)], -1)  # (5.1-5.4)

    def advance(self, gates: Tensor, prev: State, w: Weights) -> State:
        i, f, g, o = parts(gates, 4)
        c = f * prev[1] + i * g  # (5.5)
        m = o * torch.tanh(c)  # (5.6)
        return (m if w.hr is None else functional.linear(m, w.hr), c)  # (5.7)

    def pull(self, lam: State, gates: Tensor, prev: State, state: State, w: Weights) -> Pullback:
        i, f, g, o = parts(gates, 4)
        dh, dc_later = lam  # (5.8)
        tanh_c = torch.tanh(state[1])
        dm = dh if w.hr is None else dh @ w.hr  # (5.9)
        do = dm * tanh_c  # (5.10)
        dc = dc_later + dm * o * (1 - tanh_c * tanh_c)  # (5.11)
        df = dc * prev[1]  # (5.12)
        di = dc * g  # (5.13)
        dg = dc * i  # (5.14)
        dc_before = dc * f  # (5.15)
        da = torch.cat([di * i * (1 - i), df * f * (1 - f), dg * (1 - g * g), do * o * (1 - o)], -1)  # (5.16-5.19)
        return Pullback(da, carried=(dc_before,))

    def push(
        self, da: Tensor, dr: Tensor, tangent: State, gates: Tensor, prev: State, state: State, w: Weights
    ) -> State:
        i, f, g, o = parts(gates, 4)
        a_i, a_f, a_g, a_o = parts(da + dr, 4)
        di, df, dg, do = a_i * i * (1 - i), a_f * f * (1 - f), a_g * (1 - g * g), a_o * o * (1 - o)  # (6.30)
        dc = f * tangent[1] + df * prev[1] + i * dg + di * g  # (6.31)
        tanh_c = torch.tanh(state[1])
        dm = do * tanh_c + o * (1 - tanh_c * tanh_c) * dc  # (6.32)
        return (dm if w.hr is None else functional.linear(dm, w.hr), dc)  # (6.33)

    def linear(self, gates: Tensor) -> tuple[Tensor, Tensor]:
        i, f, g, _ = parts(gates, 4)
        return f, i * g  # (5.5)

    def projected(self, gates: Tensor, state: State) -> Tensor:
        return parts(gates, 4)[3] * torch.tanh(state[1])  # (5.6)
