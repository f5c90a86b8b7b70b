"""Chapter 6, its last part: tangents, carried forward with the states, of every cell in closed form.

Legend: T steps, B lanes, I inputs, S numbers in a state. A tangent has the shape of what it belongs to, and d in front
of its name. One lane is one column vector.
"""

from __future__ import annotations

from functools import singledispatch
from typing import Any

import numpy as np

from . import gru, lstm, recurrence, rnn
from .chain import Array

__all__ = ["push", "step_tangent"]


def push(
    cell: Any, x: Array, s_0: Array, dx: Array, ds_0: Array, dw: dict[str, Array], resets: Array | None = None
) -> Array:
    """The tangents of the states `[T, B, S]`, (6.23), whose transpose is `recurrence.adjoint`, (6.34).

    No policy is asked for: a cut edge is the identity forward.

    x, dx: `[T, B, I]`. s_0, ds_0: `[B, S]`. dw: the tangent of each weight by its name. resets: bool `[T, B]`.
    """
    T, B, _ = x.shape
    _, tapes = recurrence.run(cell, x, s_0, resets)
    tangents = np.zeros((T, B, cell.state_size))
    for b in range(B):
        ds = ds_0[b]
        for t in range(T):
            if resets is not None and resets[t, b]:
                ds = np.zeros_like(ds)
            ds = step_tangent(cell, tapes[t][b], dx[t, b], ds, dw)  # (6.23)
            tangents[t, b] = ds
    return tangents


@singledispatch
def step_tangent(cell: Any, values: Any, dx: Array, ds: Array, dw: dict[str, Array]) -> Array:
    """The tangent of the state after a step, from those of x_t, of the state before it and of the weights: (6.23)."""
    K, J, b = recurrence.partials(cell, *values)
    return K @ dx + J @ ds + sum(np.tensordot(part, dw[name], dw[name].ndim) for name, part in b.items())


def _products(cell: Any, values: Any, dx: Array, dh: Array, dw: dict[str, Array]) -> tuple[Array, Array]:
    """The tangents of the input product and of the recurrent one, with their biases: (6.24)."""
    of_input = cell.W_ih @ dx + dw["W_ih"] @ values.x + dw["b_ih"]  # (6.24)
    recurrent = cell.W_hh @ dh + dw["W_hh"] @ values.h_before + dw["b_hh"]
    return of_input, recurrent


@step_tangent.register
def _(cell: rnn.RNN, values: rnn.StepValues, dx: Array, ds: Array, dw: dict[str, Array]) -> Array:
    u, v = _products(cell, values, dx, ds, dw)
    slope: Array = rnn.ACTIVATIONS[cell.activation].derivative(values.h)
    return slope * (u + v)  # (6.25)


@step_tangent.register
def _(cell: gru.GRU, values: gru.StepValues, dx: Array, ds: Array, dw: dict[str, Array]) -> Array:
    _, h_before, r, z, n, m = values
    u, v = _products(cell, values, dx, ds, dw)
    (u_r, u_z, u_n), (v_r, v_z, dm) = np.split(u, 3), np.split(v, 3)
    dr = r * (1 - r) * (u_r + v_r)  # (6.26)
    dz = z * (1 - z) * (u_z + v_z)  # (6.27)
    dn = (1 - n * n) * (u_n + dr * m + r * dm)  # (6.28)
    return (1 - z) * dn + z * ds + dz * (h_before - n)  # (6.29)


@step_tangent.register
def _(cell: lstm.LSTM, values: lstm.StepValues, dx: Array, ds: Array, dw: dict[str, Array]) -> Array:
    _, _, c_before, i, f, g, o, tanh_c = values
    dh_before, dc_before = ds[: cell.output_size], ds[cell.output_size :]
    u, v = _products(cell, values, dx, dh_before, dw)
    a_i, a_f, a_g, a_o = np.split(u + v, 4)
    di, df, dg, do = i * (1 - i) * a_i, f * (1 - f) * a_f, (1 - g * g) * a_g, o * (1 - o) * a_o  # (6.30)
    dc = f * dc_before + df * c_before + i * dg + di * g  # (6.31)
    dm = do * tanh_c + o * (1 - tanh_c * tanh_c) * dc  # (6.32)
    dh = dm if cell.W_hr is None else cell.W_hr @ dm + dw["W_hr"] @ (o * tanh_c)  # (6.33)
    return np.concatenate([dh, dc])
