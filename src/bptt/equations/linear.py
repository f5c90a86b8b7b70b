"""Chapter 2: the linear RNN in closed form, steps 1 to 4 of the textbook's derivation.

h_t = W_hx x_t + W_hh h_{t-1},  o_t = W_qh h_t,  L = (1/T) sum_t l(o_t, y_t)

Source: Zhang, Lipton, Li, Smola, Dive into Deep Learning, "Backpropagation Through Time in Detail".
Legend: T steps, d inputs, H hidden units, q outputs; one lane.
"""

from __future__ import annotations

import numpy as np

from .chain import Array


def forward(x: Array, h_0: Array, W_hx: Array, W_hh: Array, W_qh: Array) -> tuple[Array, Array]:
    """(h `[T, H]`, o `[T, q]`) from x `[T, d]`: (2.1), (2.2)."""
    h = np.zeros((len(x), len(W_hh)))
    o = np.zeros((len(x), len(W_qh)))
    before = h_0
    for t in range(len(x)):
        h[t] = W_hx @ x[t] + W_hh @ before
        o[t] = W_qh @ h[t]
        before = h[t]
    return h, o


def mean_loss(o: Array, y: Array) -> float:
    """L = (1/T) sum_t |o_t - y_t|^2 / 2: (2.3) with a squared error, so that dl/do_t = o_t - y_t.

    >>> mean_loss(np.array([[1.0], [3.0]]), np.array([[0.0], [0.0]]))
    2.5
    """
    T = len(o)
    return float(sum(np.sum((o[t] - y[t]) ** 2) / 2 for t in range(T)) / T)


def output_errors(dl_do: Array) -> Array:
    """Step 1, dL/do_t = (1/T) dl/do_t: (2.4). `[T, q]` in and out."""
    return dl_do / len(dl_do)


def output_weights(dL_do: Array, h: Array) -> Array:
    """Step 2, dL/dW_qh = sum_t dL/do_t h_t': (2.5). Returns `[q, H]`."""
    out = np.zeros((dL_do.shape[1], h.shape[1]))
    for t in range(len(h)):
        out += np.outer(dL_do[t], h[t])
    return out


def state_adjoints(dL_do: Array, W_hh: Array, W_qh: Array) -> Array:
    """Step 3 by recursion, dL/dh_t = W_hh' dL/dh_{t+1} + W_qh' dL/do_t: (2.6), (2.7). Returns `[T, H]`."""
    T = len(dL_do)
    lam = np.zeros((T, len(W_hh)))
    lam[T - 1] = W_qh.T @ dL_do[T - 1]  # (2.6)
    for t in range(T - 2, -1, -1):
        lam[t] = W_hh.T @ lam[t + 1] + W_qh.T @ dL_do[t]  # (2.7)
    return lam


def state_adjoints_by_powers(dL_do: Array, W_hh: Array, W_qh: Array) -> Array:
    """Step 3 in closed form, dL/dh_t = sum_{j=t}^T (W_hh')^{j-t} W_qh' dL/do_j: (2.8). Returns `[T, H]`."""
    T = len(dL_do)
    lam = np.zeros((T, len(W_hh)))
    for t in range(T):
        for j in range(t, T):
            lam[t] += np.linalg.matrix_power(W_hh.T, j - t) @ W_qh.T @ dL_do[j]
    return lam


def state_adjoints_by_eigenvalues(dL_do: Array, W_hh: Array, W_qh: Array) -> Array:
    """(2.8) with (W_hh')^n = V diag(mu^n) V^-1, mu the eigenvalues: (2.9). W_hh must be diagonalisable.

    The size of |mu|^n decides what explodes and what vanishes: mu = -1.1 explodes although it is below 1.
    """
    T = len(dL_do)
    mu, V = np.linalg.eig(W_hh.T)
    V_inverse = np.linalg.inv(V)
    lam = np.zeros((T, len(W_hh)))
    for t in range(T):
        for j in range(t, T):
            lam[t] += (V @ (mu ** (j - t) * (V_inverse @ (W_qh.T @ dL_do[j])))).real
    return lam


def hidden_weights(lam: Array, x: Array, h: Array, h_0: Array) -> tuple[Array, Array]:
    """Step 4 from the stored dL/dh_t: (2.10), (2.11).

    Returns (dL/dW_hx = sum_t dL/dh_t x_t' `[H, d]`, dL/dW_hh = sum_t dL/dh_t h_{t-1}' `[H, H]`).
    """
    dW_hx = np.zeros((lam.shape[1], x.shape[1]))
    dW_hh = np.zeros((lam.shape[1], lam.shape[1]))
    for t in range(len(x)):
        dW_hx += np.outer(lam[t], x[t])
        dW_hh += np.outer(lam[t], h_0 if t == 0 else h[t - 1])
    return dW_hx, dW_hh
