"""The simple RNN: h_t = f(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh). Numbers are those of equations/README.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ._cell import Cell, Pullback, State, Weights

__all__ = ["NONLINEARITIES", "RNN"]


class Nonlinearity(NamedTuple):
    """f, and its adjoint: dL/da from dL/dh and h."""

    f: Callable[[Tensor], Tensor]
    pull: Callable[[Tensor, Tensor], Tensor]


NONLINEARITIES = {
    "tanh": Nonlinearity(torch.tanh, lambda dh, h: dh * (1 - h * h)),
    "relu": Nonlinearity(torch.relu, lambda dh, h: dh.masked_fill(h <= 0, 0)),
    "sigmoid": Nonlinearity(torch.sigmoid, lambda dh, h: dh * h * (1 - h)),
    "identity": Nonlinearity(lambda a: a, lambda dh, _: dh),
}


class RNN(Cell):
    """f is one of `NONLINEARITIES`. The state is the tape: f' is written on f's output."""

    name = "rnn"
    gates_per_unit = 1
    taped_per_unit = 0

    def __init__(self, nonlinearity: str) -> None:
        self.nonlinearity = nonlinearity

    def gates(self, gx: Tensor, h: Tensor, w: Weights) -> Tensor:
        return gx + functional.linear(h, w.hh)  # (3.1)

    def advance(self, gates: Tensor, prev: State, w: Weights) -> State:
        return (NONLINEARITIES[self.nonlinearity].f(gates),)  # (3.2)

    def pull(self, lam: State, gates: Tensor, prev: State, state: State, w: Weights) -> Pullback:
        (dh,), (h,) = lam, state
        da = NONLINEARITIES[self.nonlinearity].pull(dh, h)  # (3.4)
        return Pullback(da)
