"""The simple RNN: h_t = f(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh). Numbers are those of equations/README.md."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from ._activations import ACTIVATIONS
from ._cell import Cell, Pullback, State, Weights

__all__ = ["RNN"]


class RNN(Cell):
    """A simple RNN: f is one of `ACTIVATIONS`. The state is the tape: f' is written on f's output."""

    name = "rnn"
    gate_names = onnx_gates = ("h",)
    onnx = "RNN"

    def __init__(self, nonlinearity: str) -> None:
        self.nonlinearity = nonlinearity
        self.mode, self.activations = f"RNN_{nonlinearity.upper()}", (nonlinearity,)
        self.slope = ACTIVATIONS[nonlinearity].slope

    def gates(self, gx: Tensor, h: Tensor, w: Weights) -> Tensor:
        return gx + functional.linear(h, w.hh)  # (3.1)

    def advance(self, gates: Tensor, prev: State, w: Weights) -> State:
        return (ACTIVATIONS[self.nonlinearity].f(gates),)  # (3.2)

    def pull(self, lam: State, gates: Tensor, prev: State, state: State, w: Weights) -> Pullback:
        (dh,), (h,) = lam, state
        da = ACTIVATIONS[self.nonlinearity].pull(dh, h)  # (3.4)
        return Pullback(da)

    def push(
        self, da: Tensor, dr: Tensor, tangent: State, gates: Tensor, prev: State, state: State, w: Weights
    ) -> State:
        return (ACTIVATIONS[self.nonlinearity].pull(da + dr, state[0]),)  # (6.25): f' is its own transpose
