"""The GRU of torch.nn: the reset gate acts after the matrix product. Numbers are those of equations/README.md."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ._cell import Cell, Pullback, State, Weights, parts

__all__ = ["GRU"]


class GRU(Cell):
    """The GRU of torch.nn. Taped: r, z, n and m = W_hn h_{t-1} + b_hn, in this order."""

    name, mode = "gru", "GRU"
    gate_names = ("r", "z", "n")
    activations = ("sigmoid", "sigmoid", "tanh")
    tape_names = ("r", "z", "n", "n")
    keeps, inner = "z", "n"
    onnx, onnx_gates, onnx_attributes = "GRU", ("z", "r", "n"), {"linear_before_reset": 1}

    def project(self, x: Tensor, w: Weights) -> Tensor:
        # b_hn is inside the reset gate's product (4.3), so only the other recurrent biases may join beforehand.
        if w.b_ih is None or w.b_hh is None:
            return functional.linear(x, w.ih)
        early = torch.cat([*parts(w.b_hh, 3)[:2], torch.zeros_like(parts(w.b_hh, 3)[2])])
        return functional.linear(x, w.ih, w.b_ih + early)

    def gates(self, gx: Tensor, h: Tensor, w: Weights) -> Tensor:
        gr, gz, gn = parts(gx, 3)
        ar, az, m = parts(functional.linear(h, w.hh), 3)
        if w.b_hh is not None:
            m = m + parts(w.b_hh, 3)[2]  # (4.3)
        r = torch.sigmoid(gr + ar)  # (4.1)
        z = torch.sigmoid(gz + az)  # (4.2)
        n = torch.tanh(gn + r * m)  # (4.4)
        return torch.cat([r, z, n, m], -1)

    def advance(self, gates: Tensor, prev: State, w: Weights) -> State:
        _, z, n, _ = parts(gates, 4)
        return (n + z * (prev[0] - n),)  # (4.5)

    def pull(self, lam: State, gates: Tensor, prev: State, state: State, w: Weights) -> Pullback:
        r, z, n, m = parts(gates, 4)
        (dh,), (h,) = lam, prev
        dz = dh * (h - n)  # (4.6)
        dn = dh * (1 - z)  # (4.7)
        da_n = dn * (1 - n * n)  # (4.8)
        dr = da_n * m  # (4.9)
        da_r = dr * r * (1 - r)  # (4.11)
        da_z = dz * z * (1 - z)  # (4.12)
        return Pullback(torch.cat([da_r, da_z, da_n], -1), direct=dh * z)  # (4.13), first term

    def recurrent(self, da: Tensor, gates: Tensor) -> Tensor:
        da_r, da_z, da_n = parts(da, 3)
        dm = da_n * parts(gates, 4)[0]  # (4.10)
        return torch.cat([da_r, da_z, dm], -1)

    def push(
        self, da: Tensor, dr: Tensor, tangent: State, gates: Tensor, prev: State, state: State, w: Weights
    ) -> State:
        (dh,), (h,), (r, z, n, m) = tangent, prev, parts(gates, 4)
        (gr, gz, gn), (ar, az, dm) = parts(da, 3), parts(dr, 3)
        d_r = (gr + ar) * r * (1 - r)  # (6.26)
        dz = (gz + az) * z * (1 - z)  # (6.27)
        dn = (gn + d_r * m + r * dm) * (1 - n * n)  # (6.28)
        return ((1 - z) * dn + z * dh + dz * (h - n),)  # (6.29)
