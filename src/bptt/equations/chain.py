"""Chapter 1, first half: the chain rule, with every shared factor computed once.

Legend: n layers or steps, H size of a state, N number of weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def update(w: Array, gradient: Array, rate: float) -> Array:
    """One step of gradient descent, w - alpha dE/dw: (1.1).

    >>> update(np.array([1.0, 2.0]), np.array([10.0, -10.0]), rate=0.1).tolist()
    [0.0, 3.0]
    """
    return w - rate * gradient


def perceptron_forward(weights: Sequence[Array], x: Array) -> list[Array]:
    """Values z_0 = x, ..., z_n of the layers z_l = tanh(W_l z_{l-1}): (1.2)."""
    z = [x]
    for W in weights:
        z.append(np.tanh(W @ z[-1]))
    return z


def perceptron_gradients(weights: Sequence[Array], x: Array, target: Array) -> tuple[list[Array], int]:
    """Gradients of E = |z_n - target|^2 / 2 in every W_l, each shared factor once: (1.3), (1.4).

    Returns ([dE/dW_1, ..., dE/dW_n], number of products with a matrix: n - 1).
    """
    z = perceptron_forward(weights, x)
    n = len(weights)
    gradients = [np.zeros_like(W) for W in weights]
    products = 0
    delta = (1 - z[n] ** 2) * (z[n] - target)  # (1.3), l = n
    for layer in range(n, 0, -1):
        gradients[layer - 1] = np.outer(delta, z[layer - 1])  # (1.4)
        if layer > 1:
            delta = (1 - z[layer - 1] ** 2) * (weights[layer - 1].T @ delta)  # (1.3), l < n
            products += 1
    return gradients, products


def perceptron_gradients_unshared(weights: Sequence[Array], x: Array, target: Array) -> tuple[list[Array], int]:
    """The same gradients, every W_l's product of factors multiplied out from the loss anew: (1.5).

    Returns (gradients, number of products with a matrix: n (n - 1) / 2).
    """
    z = perceptron_forward(weights, x)
    n = len(weights)
    gradients = []
    products = 0
    for layer in range(1, n + 1):
        delta = (1 - z[n] ** 2) * (z[n] - target)
        for m in range(n, layer, -1):
            delta = (1 - z[m - 1] ** 2) * (weights[m - 1].T @ delta)
            products += 1
        gradients.append(np.outer(delta, z[layer - 1]))
    return gradients, products


def by_recursion(b: Array, J: Array) -> Array:
    """a_t = dh_t/dw for every t by a_t = b_t + J_t a_{t-1}, a_0 = 0: (1.8).

    b: `[T, H, N]` immediate partials. J: `[T, H, H]` step Jacobians; J[0] is not used. Returns a `[T, H, N]`.

    >>> by_recursion(np.ones((3, 1, 1)), np.full((3, 1, 1), 2.0)).ravel().tolist()
    [1.0, 3.0, 7.0]
    """
    a = np.zeros_like(b)
    a[0] = b[0]
    for t in range(1, len(b)):
        a[t] = b[t] + J[t] @ a[t - 1]
    return a


def by_expansion(b: Array, J: Array) -> Array:
    """The same a_t as the sum the recursion expands to, a_t = b_t + sum_{i<t} J_t J_{t-1} ... J_{i+1} b_i: (1.9).

    Shapes as in `by_recursion`.
    """
    T = len(b)
    a = np.zeros_like(b)
    for t in range(T):
        for i in range(t + 1):
            a[t] = a[t] + product(J, i, t) @ b[i]
    return a


def product(J: Array, k: int, t: int) -> Array:
    """dh_t/dh_k = J_t J_{t-1} ... J_{k+1}, the later factor on the left; the identity for t = k: (1.10).

    J: `[T, H, H]`. Returns `[H, H]`.
    """
    out = np.eye(J.shape[-1], dtype=J.dtype)
    for j in range(k + 1, t + 1):
        out = J[j] @ out
    return out


def pair_contributions(e: Array, J: Array, b: Array) -> Array:
    """The share of the loss of step t in dL/dw by way of the use of w at step k, C[t, k] = e_t' dh_t/dh_k b_k: (1.11).

    e: `[T, H]` local errors. J: `[T, H, H]`. b: `[T, H, N]`. Returns C `[T, T, N]`, zero where k > t; its sum over all
    pairs is dL/dw, (1.12).
    """
    T, _, N = b.shape
    C = np.zeros((T, T, N))
    for t in range(T):
        error = e[t]
        for k in range(t, -1, -1):
            C[t, k] = error @ b[k]
            error = J[k].T @ error
    return C


def by_lag(C: Array) -> Array:
    """Contributions at lag d = t - k summed over t, S[d] = sum_t C[t, t-d]: (1.13). C `[T, T, N]`, returns `[T, N]`."""
    S = np.zeros_like(C[0])
    for t in range(len(C)):
        for k in range(t + 1):
            S[t - k] = S[t - k] + C[t, k]
    return S


def nested(w: float = 2.0, x: float = 1.0, times: int = 4) -> tuple[float, float]:
    """f(f(...f(x))) for f(x) = (1 + w x)^2, `times` times nested, and its derivative in w: (1.14) by (1.8).

    Four times from 1 with w = 2, every number is whole and below 2^53, so float64 is exact.

    >>> nested()
    (1092984520681.0, 12926834988414.0)
    """
    value, derivative = x, 0.0
    for _ in range(times):
        b = 2 * value * (1 + w * value)
        J = 2 * w * (1 + w * value)
        value, derivative = (1 + w * value) ** 2, b + J * derivative
    return value, derivative
