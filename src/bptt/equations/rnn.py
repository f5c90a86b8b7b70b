"""Chapter 3: the simple RNN in torch's convention, and the softmax network with index input.

Legend: T steps, B lanes, I inputs, H hidden units, K vocabulary. One lane is one column vector.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from . import recurrence
from .chain import Array


def sigmoid(a: Array) -> Array:
    """1 / (1 + exp(-a)), written so that no exponential overflows; also for complex a.

    >>> sigmoid(np.array([0.0, -1000.0])).tolist()
    [0.5, 0.0]
    """
    return 0.5 * (1 + np.tanh(0.5 * a))


class Activation(NamedTuple):
    """phi, and phi' written on its output."""

    f: Callable[[Array], Array]
    derivative: Callable[[Array], Array]


ACTIVATIONS = {
    "tanh": Activation(np.tanh, lambda h: 1 - h * h),
    "relu": Activation(lambda a: np.where(a.real > 0, a, 0), lambda h: np.where(h.real > 0, 1.0, 0.0)),
    "sigmoid": Activation(sigmoid, lambda h: h * (1 - h)),
    "identity": Activation(lambda a: a, np.ones_like),
}


class StepValues(NamedTuple):
    """What one step leaves for its adjoint: x_t, h_{t-1}, h_t."""

    x: Array
    h_before: Array
    h: Array


@dataclass(frozen=True)
class RNN:
    """h_t = phi(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh): (3.1), (3.2), adjoint (3.4) to (3.9).

    W_ih `[H, I]`, W_hh `[H, H]`, b_ih and b_hh `[H]`. Source: Elman 1990; two biases as in torch.nn.RNN.
    """

    W_ih: Array
    W_hh: Array
    b_ih: Array
    b_hh: Array
    activation: str = "tanh"

    @property
    def state_size(self) -> int:
        return len(self.W_hh)

    @property
    def output_size(self) -> int:
        return len(self.W_hh)

    def step(self, x: Array, h_before: Array) -> tuple[Array, StepValues]:
        a = self.W_ih @ x + self.b_ih + self.W_hh @ h_before + self.b_hh  # (3.1)
        h = ACTIVATIONS[self.activation].f(a)  # (3.2)
        return h, StepValues(x, h_before, h)

    def step_adjoint(self, values: StepValues, lam: Array) -> tuple[Array, Array, dict[str, Array]]:
        da = ACTIVATIONS[self.activation].derivative(values.h) * lam  # (3.4)
        dh_before = self.W_hh.T @ da  # (3.5)
        dx = self.W_ih.T @ da  # (3.6)
        dw = {
            "W_ih": np.outer(da, values.x),  # (3.7)
            "W_hh": np.outer(da, values.h_before),  # (3.8)
            "b_ih": da,  # (3.9)
            "b_hh": da,
        }
        return dx, dh_before, dw


def adjoint(cell: RNN, x: Array, h_0: Array, dy: Array, dh_T: Array) -> dict[str, Array]:
    """The full gradient of sum_t dy_t . h_t + dh_T . h_T: (3.3) to (3.10).

    x: `[T, B, I]`. h_0, dh_T: `[B, H]`. dy: `[T, B, H]`.
    Returns "lambda" `[T, B, H]`, "x", "h_0", "W_ih", "W_hh", "b_ih", "b_hh".
    """
    out = recurrence.adjoint(cell, x, h_0, recurrence.local_error(cell, dy, dh_T))
    out["h_0"] = out.pop("s_0")
    return out


@dataclass(frozen=True)
class SoftmaxNetwork:
    """s_t = phi(U x_t + W s_{t-1}), y_t = softmax(V s_t), x_t an index into a vocabulary: (3.11), (3.12).

    U `[H, K]`, V `[K, H]`, W `[H, H]`. U x_t is column x_t of U. The loss is a sum over steps, (3.13), not a mean.

    Source: Britz 2015, "Recurrent Neural Networks Tutorial, Part 3".
    """

    U: Array
    V: Array
    W: Array
    activation: str = "tanh"

    def forward(self, x: Array, s_0: Array) -> tuple[Array, Array]:
        """(s `[T, H]`, y `[T, K]`: one output for each input, y_1 ... y_T) from indices x `[T]`: (3.11), (3.12)."""
        s = np.zeros((len(x), len(self.W)))
        y = np.zeros((len(x), len(self.V)))
        before = s_0
        for t in range(len(x)):
            s[t] = ACTIVATIONS[self.activation].f(self.U[:, x[t]] + self.W @ before)
            o = self.V @ s[t]
            odds = np.exp(o - np.max(o))
            y[t] = odds / np.sum(odds)
            before = s[t]
        return s, y

    def loss(self, x: Array, targets: Array, s_0: Array) -> float:
        """E = - sum_t log y_t[target_t]: (3.13)."""
        _, y = self.forward(x, s_0)
        return float(-sum(np.log(y[t, targets[t]]) for t in range(len(x))))

    def gradients(self, x: Array, targets: Array, s_0: Array) -> dict[str, Array]:
        """Gradients of E in "U", "V", "W" and "s_0": (3.14) to (3.18)."""
        s, y = self.forward(x, s_0)
        dU, dV, dW = np.zeros_like(self.U), np.zeros_like(self.V), np.zeros_like(self.W)
        carried = np.zeros_like(s_0)
        for t in range(len(x) - 1, -1, -1):
            do = y[t].copy()
            do[targets[t]] -= 1  # (3.14)
            dV += np.outer(do, s[t])  # (3.15)
            lam = self.V.T @ do + carried  # (3.16)
            da = ACTIVATIONS[self.activation].derivative(s[t]) * lam
            dU[:, x[t]] += da  # (3.17)
            dW += np.outer(da, s_0 if t == 0 else s[t - 1])  # (3.18)
            carried = self.W.T @ da
        return {"U": dU, "V": dV, "W": dW, "s_0": carried}
