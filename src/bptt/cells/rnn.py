"""The simple RNN: h_t = f(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh). Numbers are those of equations/README.md."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from ._cell import Cell, Pullback, State, Weights

__all__ = ["RNN"]


class RNN(Cell):
    """f is tanh or relu. The state is the tape: f' is written on f's output."""

    name = "rnn"
    gates_per_unit = 1
    taped_per_unit = 0

    def __init__(self, nonlinearity: Literal["tanh", "relu"]) -> None:
        self.nonlinearity = nonlinearity

    def gates(self, gx: Tensor, h: Tensor, w: Weights) -> Tensor:
        return gx + functional.linear(h, w.hh)  # (3.1)

    def advance(self, gates: Tensor, prev: State, w: Weights) -> State:
        return (torch.tanh(gates) if self.nonlinearity == "tanh" else torch.relu(gates),)  # (3.2)

    def pull(self, lam: State, gates: Tensor, prev: State, state: State, w: Weights) -> Pullback:
        (dh,), (h,) = lam, state
        da = dh * (1 - h * h) if self.nonlinearity == "tanh" else dh * (h > 0)  # (3.4)
        return Pullback(da, total=(dh,))
