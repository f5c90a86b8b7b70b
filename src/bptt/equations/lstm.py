"""Chapter 5: the LSTM, delta by delta, with or without a projection of h.

Legend: T steps, B lanes, I inputs, H hidden units, P numbers in h (H, or less with a projection).
The state is the pair, written as one vector [h; c] of P + H numbers. One lane is one column vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from . import recurrence
from .chain import Array
from .rnn import sigmoid


class StepValues(NamedTuple):
    """What one step leaves for its adjoint."""

    x: Array
    h_before: Array
    c_before: Array
    i: Array
    f: Array
    g: Array
    o: Array
    tanh_c: Array


class Deltas(NamedTuple):
    """dE/d(each value) of one step, in the order they are found: (5.8) to (5.19)."""

    h: Array
    m: Array
    o: Array
    c: Array
    f: Array
    i: Array
    g: Array
    c_before: Array
    a_i: Array
    a_f: Array
    a_g: Array
    a_o: Array


@dataclass(frozen=True)
class LSTM:
    """Forward (5.1) to (5.7), adjoint (5.8) to (5.28).

    W_ih `[4H, I]`, W_hh `[4H, P]`, b_ih and b_hh `[4H]`, rows i, f, g, o; W_hr `[P, H]` or None. g is the candidate,
    C-tilde in other notations. Sources: Hochreiter and Schmidhuber 1997; forget gate, Gers, Schmidhuber, Cummins 2000;
    projection, Sak, Senior, Beaufays 2014 (arXiv 1402.1128).
    """

    W_ih: Array
    W_hh: Array
    b_ih: Array
    b_hh: Array
    W_hr: Array | None = None

    @property
    def output_size(self) -> int:
        return self.W_hh.shape[1]

    @property
    def state_size(self) -> int:
        return self.output_size + len(self.W_hh) // 4

    def step(self, x: Array, s: Array) -> tuple[Array, StepValues]:
        h_before, c_before = s[: self.output_size], s[self.output_size :]
        W_ii, W_if, W_ig, W_io = np.split(self.W_ih, 4)
        W_hi, W_hf, W_hg, W_ho = np.split(self.W_hh, 4)
        b_i, b_f, b_g, b_o = np.split(self.b_ih + self.b_hh, 4)
        i = sigmoid(W_ii @ x + W_hi @ h_before + b_i)  # (5.1)
        f = sigmoid(W_if @ x + W_hf @ h_before + b_f)  # (5.2)
        g = np.tanh(W_ig @ x + W_hg @ h_before + b_g)  # (5.3)
        o = sigmoid(W_io @ x + W_ho @ h_before + b_o)  # (5.4)
        c = f * c_before + i * g  # (5.5)
        tanh_c = np.tanh(c)
        m = o * tanh_c  # (5.6)
        h = m if self.W_hr is None else self.W_hr @ m  # (5.7)
        return np.concatenate([h, c]), StepValues(x, h_before, c_before, i, f, g, o, tanh_c)

    def deltas(self, values: StepValues, dh: Array, dc_later: Array) -> Deltas:
        """Every delta of one step from dE/dh_t `[P]` (5.8) and dE/dC_t through step t+1 `[H]`: (5.9) to (5.19)."""
        _, _, c_before, i, f, g, o, tanh_c = values
        dm = dh if self.W_hr is None else self.W_hr.T @ dh  # (5.9)
        do = dm * tanh_c  # (5.10)
        dc = dc_later + dm * o * (1 - tanh_c * tanh_c)  # (5.11)
        df = dc * c_before  # (5.12)
        di = dc * g  # (5.13)
        dg = dc * i  # (5.14)
        dc_before = dc * f  # (5.15)
        da_i = di * i * (1 - i)  # (5.16)
        da_f = df * f * (1 - f)  # (5.17)
        da_g = dg * (1 - g * g)  # (5.18)
        da_o = do * o * (1 - o)  # (5.19)
        return Deltas(dh, dm, do, dc, df, di, dg, dc_before, da_i, da_f, da_g, da_o)

    def step_adjoint(self, values: StepValues, lam: Array) -> tuple[Array, Array, dict[str, Array]]:
        d = self.deltas(values, lam[: self.output_size], lam[self.output_size :])
        W_ii, W_if, W_ig, W_io = np.split(self.W_ih, 4)
        W_hi, W_hf, W_hg, W_ho = np.split(self.W_hh, 4)
        da = np.concatenate([d.a_i, d.a_f, d.a_g, d.a_o])
        dw = {
            "W_ih": np.outer(da, values.x),  # (5.22)
            "W_hh": np.outer(da, values.h_before),  # (5.23)
            "b_ih": da,  # (5.24)
            "b_hh": da,
        }
        if self.W_hr is not None:
            dw["W_hr"] = np.outer(d.h, values.o * values.tanh_c)  # (5.25)
        dh_before = W_hi.T @ d.a_i + W_hf.T @ d.a_f + W_hg.T @ d.a_g + W_ho.T @ d.a_o  # (5.26)
        dx = W_ii.T @ d.a_i + W_if.T @ d.a_f + W_ig.T @ d.a_g + W_io.T @ d.a_o  # (5.27)
        return dx, np.concatenate([dh_before, d.c_before]), dw


def concatenated_gradients(values: StepValues, d: Deltas) -> dict[str, Array]:
    """One step's gradients of W_f, W_i, W_c, W_o, each p x (m + n) = `[H, P + I]`: (5.20).

    Each W_* multiplies the concatenation [h_{t-1}; x_t]; p = H hidden units, m = P, n = I; without a projection p = m.
    """
    z = np.concatenate([values.h_before, values.x])
    return {"W_f": np.outer(d.a_f, z), "W_i": np.outer(d.a_i, z), "W_c": np.outer(d.a_g, z), "W_o": np.outer(d.a_o, z)}


def torch_layout(concatenated: dict[str, Array], P: int) -> dict[str, Array]:
    """W_ih `[4H, I]` and W_hh `[4H, P]`, rows i, f, g, o, from W_f, W_i, W_c, W_o `[H, P + I]`: (5.21)."""
    stacked = np.concatenate([concatenated[name] for name in ("W_i", "W_f", "W_c", "W_o")])
    return {"W_ih": stacked[:, P:], "W_hh": stacked[:, :P]}


def adjoint(cell: LSTM, x: Array, h_0: Array, c_0: Array, dy: Array, dh_T: Array, dc_T: Array) -> dict[str, Array]:
    """The full gradient of sum_t dy_t . h_t + dh_T . h_T + dc_T . c_T: (5.8) to (5.28) along (1.16).

    x: `[T, B, I]`. h_0, dh_T: `[B, P]`. c_0, dc_T: `[B, H]`. dy: `[T, B, P]`.
    Returns "lambda_h" `[T, B, P]` (dE/dh_t), "lambda_c" `[T, B, H]` (dE/dC_t through step t+1 and later, and through
    dc_T, not through h_t), "x", "h_0", "c_0", "W_ih", "W_hh", "b_ih", "b_hh", and "W_hr" with a projection.
    """
    P = cell.output_size
    e = recurrence.local_error(cell, dy, np.concatenate([dh_T, dc_T], axis=1))
    out = recurrence.adjoint(cell, x, np.concatenate([h_0, c_0], axis=1), e)
    s_0, lam = out.pop("s_0"), out.pop("lambda")
    out |= {"h_0": s_0[:, :P], "c_0": s_0[:, P:], "lambda_h": lam[:, :, :P], "lambda_c": lam[:, :, P:]}
    return out
