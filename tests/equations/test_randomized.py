"""Chapter 6, second half: expectation and variance, by enumerating every cut pattern."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch

import bptt
from bptt.equations import chain, policies, randomized, recurrence

from .numeric import Array, build, close, data, generator

POLYNOMIAL = bptt.policies.PolynomialTail(mean=3.0, tail=4.0)
KEEPS: dict[str, Callable[[int], float]] = {
    "half": lambda d: 0.5,
    "often": lambda d: 0.9,
    "always": lambda d: 1.0,
    "by distance": lambda d: [0.3, 0.6, 0.8, 0.95][min(d, 4) - 1],
    "polynomial": POLYNOMIAL.keep,
}


def case(T: int = 6, H: int = 3, N: int = 4) -> tuple[Array, Array, Array]:
    rng = generator()
    return rng.normal(size=(T, H)), rng.normal(size=(T, H, H)), rng.normal(size=(T, H, N))


@pytest.mark.parametrize("name", KEEPS)
def test_probabilities_add_up_and_every_xi_has_mean_1(name: str) -> None:
    patterns = list(randomized.cut_patterns(KEEPS[name], 6))
    assert len(patterns) == 32
    assert sum(p for _, p in patterns) == pytest.approx(1, abs=1e-12)
    close(randomized.expectation(lambda xi: xi, KEEPS[name], 6), np.ones(6), 1e-12)


@pytest.mark.parametrize("name", KEEPS)
def test_expectation_of_the_forward_form_is_the_full_derivative(name: str) -> None:
    _, J, b = case()
    mean = randomized.expectation(lambda xi: randomized.forward_form(b, J, xi), KEEPS[name], 6)
    close(mean, chain.by_recursion(b, J), 1e-12)


@pytest.mark.parametrize("name", KEEPS)
def test_adjoint_form_is_the_forward_form(name: str) -> None:
    e, J, b = case()
    for xi, _ in randomized.cut_patterns(KEEPS[name], 6):
        z, lam = randomized.forward_form(b, J, xi), randomized.adjoint_form(e, J, xi)
        close(sum(lam[t] @ b[t] for t in range(6)), sum(e[t] @ z[t] for t in range(6)))


@pytest.mark.parametrize("name", KEEPS)
@pytest.mark.parametrize("cell_name", ["tanh", "gru", "lstm_proj"])
def test_expectation_of_every_gradient_is_the_full_gradient(cell_name: str, name: str) -> None:
    T = 5
    cell = build(cell_name)
    x, s_0, dy, ds_T = data(cell, T, B=1)
    e = recurrence.local_error(cell, dy, ds_T)
    full = recurrence.adjoint(cell, x, s_0, e)
    for key in full:

        def estimate(xi: Array, key: str = key) -> Array:
            return policies.sweep(cell, x, s_0, e, policies.blocks(T, T, T), xi[:, None])[key]

        close(randomized.expectation(estimate, KEEPS[name], T), full[key], 1e-12)


def test_exact_derivative_in_place_of_z_never_truncates() -> None:
    """What the notes print, z_t = b_t + xi_t J_t dh_{t-1}/dw, needs the full derivative: no cut but the last edge's."""
    _, J, b = case()
    a = chain.by_recursion(b, J)
    xi = np.array([1.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    printed = b[5] + xi[5] * J[5] @ a[4]
    close(printed, a[5])
    z = randomized.forward_form(b, J, xi)[5]
    close(z, chain.by_recursion(b[1:], J[1:])[-1])
    assert np.abs(z - a[5]).max() > 0.1


def test_the_policies_draw_is_one_of_the_patterns() -> None:
    for policy, keep in ((bptt.Randomized(0.5), KEEPS["half"]), (bptt.Randomized(POLYNOMIAL), KEEPS["polynomial"])):
        for kept, (xi, _) in zip(
            itertools.product((False, True), repeat=4), randomized.cut_patterns(keep, 5), strict=True
        ):
            uniform = torch.tensor([[0.0 if keeps else 1 - 1e-12] for keeps in kept], dtype=torch.float64)
            close(policy.weights(uniform)[:, 0].numpy(), xi)


@pytest.mark.parametrize("p", [0.3, 0.6, 1.0])
def test_second_moments_by_enumeration(p: float) -> None:
    _, J, b = case(N=1)
    mean, moment = randomized.second_moments(b[:, :, 0], J, p)

    def square(xi: Array) -> Array:
        z = randomized.forward_form(b, J, xi)[:, :, 0]
        return np.einsum("ti,tj->tij", z, z)

    close(mean, randomized.expectation(lambda xi: randomized.forward_form(b, J, xi)[:, :, 0], lambda d: p, 6), 1e-12)
    close(moment, randomized.expectation(square, lambda d: p, 6), 1e-12)


@pytest.mark.parametrize(("a", "p"), [(0.5, 0.5), (0.9, 0.95), (0.9, 0.9), (0.3, 0.2)])
def test_scalar_chain_is_the_limit(a: float, p: float) -> None:
    T = 400
    mean, moment = randomized.second_moments(np.ones((T, 1)), np.full((T, 1, 1), a), p)
    expected_mean, expected_variance = randomized.scalar_chain(a, p)
    assert mean[-1, 0] == pytest.approx(expected_mean, rel=1e-9)
    assert moment[-1, 0, 0] - mean[-1, 0] ** 2 == pytest.approx(expected_variance, rel=1e-7)
    if p == a:
        assert expected_variance / expected_mean**2 == pytest.approx(a)


def test_variance_grows_without_bound_unless_p_exceeds_the_squared_contraction() -> None:
    a = 0.9
    assert randomized.scalar_chain(a, 0.81)[1] == float("inf")
    for p, bounded in ((0.80, False), (0.82, True)):
        _, moment = randomized.second_moments(np.ones((4000, 1)), np.full((4000, 1, 1), a), p)
        grown = moment[-1, 0, 0] / moment[2000, 0, 0]
        assert (grown < 1.001) == bounded
        assert randomized.variance_is_bounded(np.array([[a]]), p) == bounded


def test_variance_of_a_vector_chain_is_bounded_by_the_kronecker_square() -> None:
    J = np.array([[0.6, 0.5], [-0.4, 0.5]])
    rho = np.abs(np.linalg.eigvals(J)).max()
    T = 2000
    b = generator().normal(size=(1, 2)).repeat(T, 0)
    for p, bounded in ((rho**2 * 0.98, False), (rho**2 * 1.02, True)):
        _, moment = randomized.second_moments(b, np.broadcast_to(J, (T, 2, 2)), p)
        assert (np.trace(moment[-1]) / np.trace(moment[T // 2]) < 1.001) == bounded
        assert randomized.variance_is_bounded(J, p) == bounded
