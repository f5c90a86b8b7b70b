"""The GRU of torch.nn: the reset gate acts after the matrix product. Equations: chapter 4 of equations/README.md.

r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)          q = W_hn h + b_hn
z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)          n = tanh(W_in x + b_in + r * q)
h_t = (1 - z) * n + z * h_{t-1}
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ._cell import Cell, Pullback, State, Weights, parts

__all__ = ["GRU"]


class GRU(Cell):
    """Taped: r, z, n, q, in this order."""

    name = "gru"
    gates_per_unit = 3
    taped_per_unit = 4

    def project(self, x: Tensor, w: Weights) -> Tensor:
        # b_hn is inside the reset gate's product, so only the other recurrent biases may join beforehand.
        if w.b_ih is None or w.b_hh is None:
            return functional.linear(x, w.ih)
        hidden = w.hh.shape[0] // 3
        early = torch.cat([w.b_hh[: 2 * hidden], torch.zeros_like(w.b_hh[2 * hidden :])])
        return functional.linear(x, w.ih, w.b_ih + early)

    def gates(self, gx: Tensor, h: Tensor, w: Weights) -> Tensor:
        gr, gz, gn = parts(gx, 3)
        ar, az, q = parts(functional.linear(h, w.hh), 3)
        if w.b_hh is not None:
            q = q + parts(w.b_hh, 3)[2]
        r = torch.sigmoid(gr + ar)
        z = torch.sigmoid(gz + az)
        n = torch.tanh(gn + r * q)
        return torch.cat([r, z, n, q], -1)

    def advance(self, gates: Tensor, prev: State, w: Weights) -> State:
        _, z, n, _ = parts(gates, 4)
        return (n + z * (prev[0] - n),)

    def pull(self, lam: State, gates: Tensor, prev: State, state: State, w: Weights) -> Pullback:
        r, z, n, q = parts(gates, 4)
        (dh,), (h,) = lam, prev
        dn = dh * (1 - z)
        dan = dn * (1 - n * n)
        daz = dh * (h - n) * z * (1 - z)
        dar = dan * q * r * (1 - r)
        return Pullback(torch.cat([dar, daz, dan], -1), total=(dh,), direct=dh * z)

    def recurrent(self, da: Tensor, gates: Tensor) -> Tensor:
        dar, daz, dan = parts(da, 3)
        r = parts(gates, 4)[0]
        return torch.cat([dar, daz, dan * r], -1)
