"""Chapter 6, second half: randomized truncation, its expectation and its variance.

Legend: T steps, H size of a state, N number of weights; steps from 0, edge t joins step t-1 to step t.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product as cartesian

import numpy as np

from .chain import Array


def forward_form(b: Array, J: Array, xi: Array) -> Array:
    """z_t = b_t + xi_t J_t z_{t-1}, an estimate of dh_t/dw: (6.10). b `[T, H, N]`, J `[T, H, H]`, xi `[T]`.

    xi = 1 gives dh_t/dw itself; xi_t = 0 forgets all before step t.

    >>> b, J = np.ones((3, 1, 1)), np.full((3, 1, 1), 2.0)
    >>> forward_form(b, J, np.array([1.0, 0.0, 1.0])).ravel().tolist()
    [1.0, 1.0, 3.0]
    """
    z = np.zeros_like(b)
    z[0] = b[0]
    for t in range(1, len(b)):
        z[t] = b[t] + xi[t] * (J[t] @ z[t - 1])
    return z


def adjoint_form(e: Array, J: Array, xi: Array) -> Array:
    """lambda_t = e_t + xi_{t+1} J_{t+1}' lambda_{t+1}, with sum_t lambda_t' b_t = sum_t e_t' z_t: (6.11).

    e `[T, H]`. Returns `[T, H]`.
    """
    lam = np.zeros_like(e)
    T = len(e)
    lam[T - 1] = e[T - 1]
    for t in range(T - 2, -1, -1):
        lam[t] = e[t] + xi[t + 1] * (J[t + 1].T @ lam[t + 1])
    return lam


def cut_patterns(keep: Callable[[int], float], T: int) -> Iterator[tuple[Array, float]]:
    """Every (xi `[T]`, its probability) of a chain of T steps, 2^(T-1) of them: (6.12), (6.14), (6.15).

    keep: the probability that an edge is kept when the last cut (or the start) lies d = 1, 2, ... steps back. A
    constant is plain randomized truncation; growing with d, it is anticipated reweighting (Tallec and Ollivier 2017).

    >>> [(xi.tolist(), p) for xi, p in cut_patterns(lambda d: 0.25, 2)]
    [([1.0, 0.0], 0.75), ([1.0, 4.0], 0.25)]
    """
    for kept in cartesian((False, True), repeat=T - 1):
        xi, probability, distance = np.ones(T), 1.0, 1
        for t, keeps in enumerate(kept, start=1):
            p = keep(distance)
            xi[t] = 1 / p if keeps else 0.0
            probability *= p if keeps else 1 - p
            distance = distance + 1 if keeps else 1
        yield xi, probability


def expectation(estimate: Callable[[Array], Array], keep: Callable[[int], float], T: int) -> Array:
    """E[estimate(xi)], the exact sum over all cut patterns: (6.13)."""
    total = None
    for xi, probability in cut_patterns(keep, T):
        term = probability * estimate(xi)
        total = term if total is None else total + term
    assert total is not None
    return total


def second_moments(b: Array, J: Array, p: float) -> tuple[Array, Array]:
    """(E[z_t] `[T, H]`, E[z_t z_t'] `[T, H, H]`) for one weight and a constant keep probability p: (6.16).

    b: `[T, H]`. J: `[T, H, H]`. The factor 1/p = E[xi^2] at every edge is what randomness costs.
    """
    T, H = b.shape
    mean, moment = np.zeros((T, H)), np.zeros((T, H, H))
    mean[0], moment[0] = b[0], np.outer(b[0], b[0])
    for t in range(1, T):
        moved = J[t] @ mean[t - 1]
        mean[t] = b[t] + moved
        cross = np.outer(b[t], moved)
        moment[t] = np.outer(b[t], b[t]) + cross + cross.T + J[t] @ moment[t - 1] @ J[t].T / p
    return mean, moment


def scalar_chain(a: float, p: float) -> tuple[float, float]:
    """(mean, variance) of z_t as t grows, for J = a, b = 1, 0 <= a < 1: (6.17). Infinite variance unless p > a^2.

    >>> mean, variance = scalar_chain(0.5, 0.5)
    >>> mean, round(variance / mean**2, 12)
    (2.0, 0.5)
    """
    mean = 1 / (1 - a)
    if p <= a * a:
        return mean, float("inf")
    return mean, (1 + a) / ((1 - a) * (1 - a * a / p)) - mean**2


def variance_is_bounded(J: Array, p: float) -> bool:
    """Whether the variance stays finite as T grows, rho(J (x) J) = rho(J)^2 < p for a constant J: (6.18)."""
    return float(np.max(np.abs(np.linalg.eigvals(np.kron(J, J))))) < p
