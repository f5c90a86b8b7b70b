"""Chapter 4: the GRU, torch's variant (the reset gate is applied after the matrix product).

Legend: T steps, B lanes, I inputs, H hidden units. Gate order r, z, n. One lane is one column vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from . import recurrence
from .chain import Array
from .rnn import sigmoid


class StepValues(NamedTuple):
    """What one step leaves for its adjoint; m is the hidden part of the candidate, before the reset gate."""

    x: Array
    h_before: Array
    r: Array
    z: Array
    n: Array
    m: Array


@dataclass(frozen=True)
class GRU:
    """Forward (4.1) to (4.5), adjoint (4.6) to (4.18).

    W_ih `[3H, I]`, W_hh `[3H, H]`, b_ih and b_hh `[3H]`, rows r, z, n. Source: Cho et al. 2014 (arXiv 1406.1078); the
    variant, with b_hn inside the reset product, is that of torch.nn.GRU and cuDNN.
    """

    W_ih: Array
    W_hh: Array
    b_ih: Array
    b_hh: Array

    @property
    def state_size(self) -> int:
        return self.W_hh.shape[1]

    @property
    def output_size(self) -> int:
        return self.W_hh.shape[1]

    def step(self, x: Array, h_before: Array) -> tuple[Array, StepValues]:
        W_ir, W_iz, W_in = np.split(self.W_ih, 3)
        W_hr, W_hz, W_hn = np.split(self.W_hh, 3)
        b_ir, b_iz, b_in = np.split(self.b_ih, 3)
        b_hr, b_hz, b_hn = np.split(self.b_hh, 3)
        r = sigmoid(W_ir @ x + b_ir + W_hr @ h_before + b_hr)  # (4.1)
        z = sigmoid(W_iz @ x + b_iz + W_hz @ h_before + b_hz)  # (4.2)
        m = W_hn @ h_before + b_hn  # (4.3)
        n = np.tanh(W_in @ x + b_in + r * m)  # (4.4)
        h = (1 - z) * n + z * h_before  # (4.5)
        return h, StepValues(x, h_before, r, z, n, m)

    def step_adjoint(self, values: StepValues, lam: Array) -> tuple[Array, Array, dict[str, Array]]:
        x, h_before, r, z, n, m = values
        W_ir, W_iz, W_in = np.split(self.W_ih, 3)
        W_hr, W_hz, W_hn = np.split(self.W_hh, 3)
        dz = lam * (h_before - n)  # (4.6)
        dn = lam * (1 - z)  # (4.7)
        da_n = dn * (1 - n * n)  # (4.8)
        dr = da_n * m  # (4.9)
        dm = da_n * r  # (4.10)
        da_r = dr * r * (1 - r)  # (4.11)
        da_z = dz * z * (1 - z)  # (4.12)
        dh_before = lam * z + W_hr.T @ da_r + W_hz.T @ da_z + W_hn.T @ dm  # (4.13)
        dx = W_ir.T @ da_r + W_iz.T @ da_z + W_in.T @ da_n  # (4.14)
        da_i = np.concatenate([da_r, da_z, da_n])
        da_h = np.concatenate([da_r, da_z, dm])
        dw = {
            "W_ih": np.outer(da_i, x),  # (4.15)
            "W_hh": np.outer(da_h, h_before),  # (4.16)
            "b_ih": da_i,  # (4.17)
            "b_hh": da_h,  # (4.18)
        }
        return dx, dh_before, dw


def adjoint(cell: GRU, x: Array, h_0: Array, dy: Array, dh_T: Array) -> dict[str, Array]:
    """The full gradient of sum_t dy_t . h_t + dh_T . h_T: (4.6) to (4.18) along (1.16).

    x: `[T, B, I]`. h_0, dh_T: `[B, H]`. dy: `[T, B, H]`.
    Returns "lambda" `[T, B, H]`, "x", "h_0", "W_ih", "W_hh", "b_ih", "b_hh".
    """
    out = recurrence.adjoint(cell, x, h_0, recurrence.local_error(cell, dy, dh_T))
    out["h_0"] = out.pop("s_0")
    return out
