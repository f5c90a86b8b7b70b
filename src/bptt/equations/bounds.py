"""Chapter 8: how large the factors of the chain are. Step Jacobians, their products, and bounds on them.

Legend: T steps, H hidden units, S numbers in a state; one lane.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .chain import Array, product
from .lstm import LSTM
from .lstm import StepValues as LSTMStep
from .recurrence import Cell
from .rnn import ACTIVATIONS, RNN
from .rnn import StepValues as RNNStep

BETA_H = {"tanh": 1.0, "relu": 1.0, "sigmoid": 0.25, "identity": 1.0}
"""The largest |phi'|: (8.4). That of the sigmoid is phi'(0) = 1/4, that of tanh is tanh'(0) = 1."""


def rnn_jacobian(cell: RNN, values: RNNStep) -> Array:
    """J_t = diag(phi'(a_t)) W_hh, the derivative taken at the pre-activation of step t itself: (8.1). `[H, H]`."""
    return np.diag(ACTIVATIONS[cell.activation].derivative(values.h)) @ cell.W_hh


def lstm_jacobian(cell: LSTM, values: LSTMStep) -> Array:
    """d(h_t, c_t)/d(h_{t-1}, c_{t-1}) block by block: (8.8). `[P + H, P + H]`, h first."""
    W_hi, W_hf, W_hg, W_ho = np.split(cell.W_hh, 4)
    i, f, g, o = values.i, values.f, values.g, values.o
    c_by_c = np.diag(f)
    c_by_h = (
        np.diag(values.c_before * f * (1 - f)) @ W_hf
        + np.diag(g * i * (1 - i)) @ W_hi
        + np.diag(i * (1 - g * g)) @ W_hg
    )
    m_by_c = np.diag(o * (1 - values.tanh_c**2)) @ c_by_c
    m_by_h = np.diag(values.tanh_c * o * (1 - o)) @ W_ho + np.diag(o * (1 - values.tanh_c**2)) @ c_by_h
    R = np.eye(len(f)) if cell.W_hr is None else cell.W_hr
    return np.block([[R @ m_by_h, R @ m_by_c], [c_by_h, c_by_c]])


def jacobian(cell: Cell, values: Any) -> Array:
    """J_t `[S, S]` of any cell, row by row: row i of J is J' applied to unit vector i."""
    return np.array([cell.step_adjoint(values, unit)[1] for unit in np.eye(cell.state_size)])


def beta_w(W_hh: Array) -> float:
    """beta_W = |W_hh|, the spectral norm (largest singular value): (8.3)."""
    return float(np.linalg.norm(W_hh, 2))


def bound(W_hh: Array, activation: str, lag: int) -> float:
    """(beta_W beta_h)^(t-k), which |dh_t/dh_k| never exceeds, lag = t - k: (8.3), (8.4).

    Source: Pascanu, Mikolov, Bengio 2013 (arXiv 1211.5063), section 2.1.

    >>> bound(2 * np.eye(3), "sigmoid", lag=3)
    0.125
    """
    return float((beta_w(W_hh) * BETA_H[activation]) ** lag)


def measured(J: Array, k: int) -> Array:
    """|dh_t/dh_k| for t = k, ..., T-1, spectral norm: (8.2). J `[T, S, S]`, returns `[T - k]`."""
    return np.array([np.linalg.norm(product(J, k, t), 2) for t in range(k, len(J))])


def spectral_radius(W: Array) -> float:
    """rho(W), the largest |eigenvalue|, which decides the growth of W^n: (8.5).

    Never above any norm; below 1 with a norm above 1, powers grow first and vanish later.

    >>> W = np.array([[0.5, 10.0], [0.0, 0.5]])
    >>> spectral_radius(W), beta_w(W) > 10
    (0.5, True)
    """
    return float(np.max(np.abs(np.linalg.eigvals(W))))


def power_directions(W: Array, v: Array, n: int) -> Array:
    """v, W v, ..., W^n v, each at length 1: they turn toward the dominant eigenvector, (8.6). `[n + 1, H]`.

    If one eigenvalue is strictly largest in magnitude; a dominant complex pair rotates for ever, and a negative one
    flips the sign at each step.
    """
    directions = [v / np.linalg.norm(v)]
    for _ in range(n):
        moved = W @ directions[-1]
        directions.append(moved / np.linalg.norm(moved))
    return np.array(directions)


def cell_path(f: Array, k: int, t: int) -> Array:
    """prod_{j=k+1}^t f_j, the part of dc_t/dc_k that never leaves the cell: (8.7). f `[T, H]`, returns `[H]`.

    It ignores every path through h: see `full_cell_jacobian`.
    """
    out = np.ones(f.shape[1])
    for j in range(k + 1, t + 1):
        out = f[j] * out
    return out


def full_cell_jacobian(J: Array, k: int, t: int, H: int) -> Array:
    """dc_t/dc_k `[H, H]`, all paths: the (c, c) block of the product of the pair's Jacobians, (8.9). J `[T, S, S]`."""
    return product(J, k, t)[-H:, -H:]
