"""Chapter 8: Jacobians, their products against the bound, powers of a matrix, the LSTM's cell path."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bptt.equations import bounds, chain, linear, recurrence, rnn

from .numeric import CELLS, Array, build, close, complex_step, data, generator

ACTIVATIONS = list(rnn.ACTIVATIONS)


def jacobians(cell: Any, T: int = 6) -> tuple[Array, list[Any], Array]:
    """(J `[T, S, S]`, tapes, states) of one lane."""
    x, s_0, _, _ = data(cell, T, B=1)
    states, tapes = recurrence.run(cell, x, s_0)
    lane = [tape[0] for tape in tapes]
    return np.array([bounds.jacobian(cell, tape) for tape in lane]), lane, states[:, 0]


@pytest.mark.parametrize("name", CELLS)
def test_jacobian_of_any_cell_by_complex_steps(name: str) -> None:
    cell = build(name)
    x, s_0, _, _ = data(cell)
    _, tape = cell.step(x[0, 0], s_0[0])
    _, J, _ = recurrence.partials(cell, x[0, 0], s_0[0])
    close(bounds.jacobian(cell, tape), J)
    if name in ACTIVATIONS:
        close(bounds.rnn_jacobian(cell, tape), J)
    if name.startswith("lstm"):
        close(bounds.lstm_jacobian(cell, tape), J)


def test_the_derivative_is_taken_at_the_pre_activation_of_the_step_itself() -> None:
    cell = build("sigmoid")
    x, h_0, _, _ = data(cell)
    _, tape = cell.step(x[0, 0], h_0[0])
    a = cell.W_ih @ x[0, 0] + cell.b_ih + cell.W_hh @ h_0[0] + cell.b_hh
    slope = np.exp(-a) / (1 + np.exp(-a)) ** 2
    close(bounds.rnn_jacobian(cell, tape), np.diag(slope) @ cell.W_hh)
    at_the_state_before = np.exp(-h_0[0]) / (1 + np.exp(-h_0[0])) ** 2
    _, J, _ = recurrence.partials(cell, x[0, 0], h_0[0])
    assert np.abs(J - np.diag(at_the_state_before) @ cell.W_hh).max() > 1e-2
    assert np.abs(J - cell.W_hh.T @ np.diag(slope)).max() > 1e-2


@pytest.mark.parametrize("name", ["tanh", "gru", "lstm_proj"])
def test_products_are_derivatives_of_later_states(name: str) -> None:
    cell = build(name)
    x, _, _, _ = data(cell, 6, B=1)
    J, _, states = jacobians(cell)
    for k, t in ((0, 1), (1, 4), (0, 5)):

        def later(z: Array, k: int = k, t: int = t) -> Array:
            return recurrence.run(cell, x[k + 1 : t + 1], z[None])[0][-1, 0]

        numeric = np.array([complex_step(lambda z, i=i, f=later: f(z)[i], states[k]) for i in range(cell.state_size)])
        close(chain.product(J, k, t), numeric)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_beta_h_is_the_largest_slope(name: str) -> None:
    a = np.linspace(-8, 8, 1601)
    slope = rnn.ACTIVATIONS[name].derivative(rnn.ACTIVATIONS[name].f(a))
    assert np.abs(slope).max() == pytest.approx(bounds.BETA_H[name], abs=1e-12)


@pytest.mark.parametrize("name", ACTIVATIONS)
@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), scale=st.floats(0.1, 3))
def test_products_never_exceed_the_bound(name: str, seed: int, scale: float) -> None:
    cell = build(name, seed=seed)
    cell = rnn.RNN(cell.W_ih, scale * cell.W_hh, cell.b_ih, cell.b_hh, name)
    J, _, _ = jacobians(cell)
    measured = bounds.measured(J, 0)
    for lag, value in enumerate(measured):
        assert value <= bounds.bound(cell.W_hh, name, lag) * (1 + 1e-12)


def test_the_bound_is_reached() -> None:
    rng = generator()
    Q, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    for name, slope in (("identity", 1.0), ("sigmoid", 0.25)):
        cell = rnn.RNN(np.zeros((3, 2)), 2 * Q, np.zeros(3), np.zeros(3), name)
        h = np.zeros(3) if name == "identity" else np.full(3, 0.5)
        tape = rnn.StepValues(np.zeros(2), np.zeros(3), h)
        J = np.array([bounds.rnn_jacobian(cell, tape)] * 5)
        close(bounds.measured(J, 0), (2 * slope) ** np.arange(5))
        close(np.array([bounds.bound(cell.W_hh, name, lag) for lag in range(5)]), (2 * slope) ** np.arange(5))


def test_radius_and_norm_say_different_things() -> None:
    W = np.array([[0.5, 10.0], [0.0, 0.5]])
    assert bounds.spectral_radius(W) < 1 < bounds.beta_w(W)
    norms = [np.linalg.norm(np.linalg.matrix_power(W, n), 2) for n in range(60)]
    assert max(norms) > 10
    assert norms[-1] < 1e-10
    close(np.array(norms[-1] ** (1 / 59)), np.array(bounds.spectral_radius(W)), 0.2)
    for seed in range(5):
        V = generator(seed).normal(size=(4, 4))
        assert bounds.spectral_radius(V) <= bounds.beta_w(V)
        power = np.linalg.matrix_power(V, 200)
        assert np.linalg.norm(power, 2) ** (1 / 200) == pytest.approx(bounds.spectral_radius(V), rel=0.05)


def test_products_of_different_matrices_can_grow_though_every_radius_is_below_1() -> None:
    A, B = np.array([[0.5, 2.0], [0.0, 0.5]]), np.array([[0.5, 0.0], [2.0, 0.5]])
    assert bounds.spectral_radius(A) < 1
    assert bounds.spectral_radius(B) < 1
    J = np.array([A, B] * 10)
    assert bounds.measured(J, 0)[-1] > 1e6


def test_powers_turn_toward_the_dominant_eigenvector() -> None:
    rng = generator()
    W = rng.normal(size=(4, 4))
    W = W + W.T
    mu, V = np.linalg.eigh(W)
    dominant = V[:, np.argmax(np.abs(mu))]
    directions = bounds.power_directions(W, rng.normal(size=4), 300)
    close(np.abs(directions[-1] @ dominant), np.array(1.0))
    gap = 1 - np.abs(directions @ dominant)
    assert gap[0] > 0.1
    assert gap[10] < gap[0]


def test_a_dominant_complex_pair_rotates_for_ever() -> None:
    W = np.array([[0.0, -2.0], [2.0, 0.0]])
    directions = bounds.power_directions(W, np.array([1.0, 0.0]), 101)
    close(np.abs(np.sum(directions[1:] * directions[:-1], axis=1)) + 1, np.ones(101))


def test_without_paths_through_h_the_cell_path_is_the_jacobian() -> None:
    cell = build("lstm")
    plain = type(cell)(cell.W_ih, np.zeros_like(cell.W_hh), cell.b_ih, cell.b_hh)
    J, tapes, _ = jacobians(plain)
    f = np.array([tape.f for tape in tapes])
    for k, t in ((0, 1), (1, 4), (0, 5)):
        close(bounds.full_cell_jacobian(J, k, t, 3), np.diag(bounds.cell_path(f, k, t)))


def test_with_paths_through_h_it_is_not() -> None:
    J, tapes, _ = jacobians(build("lstm"))
    f = np.array([tape.f for tape in tapes])
    path, full = np.diag(bounds.cell_path(f, 0, 5)), bounds.full_cell_jacobian(J, 0, 5, 3)
    assert np.abs(full - path).max() > 1e-2
    close(bounds.full_cell_jacobian(J, 0, 1, 3), np.diag(f[1]))  # over one step there is no other path


def test_the_full_path_can_explode_though_no_forget_gate_exceeds_1() -> None:
    cell = build("lstm")
    zero = np.zeros_like(cell.b_ih)
    W_hh = np.concatenate([np.zeros((6, 3)), 12 * np.eye(3), np.zeros((3, 3))])
    loop = type(cell)(np.zeros_like(cell.W_ih), W_hh, zero, zero)
    _, tape = loop.step(np.zeros(2), np.zeros(6))
    J = np.array([bounds.jacobian(loop, tape)] * 20)
    assert tape.f.max() == 0.5
    assert np.linalg.norm(bounds.full_cell_jacobian(J, 0, 19, 3), 2) > 1e6


def test_a_large_forget_bias_keeps_the_cell_path_near_1() -> None:
    cell = build("lstm")
    bias = cell.b_ih.copy()
    bias[3:6] += 12
    _, tapes, _ = jacobians(type(cell)(cell.W_ih, cell.W_hh, bias, cell.b_hh), T=50)
    f = np.array([tape.f for tape in tapes])
    assert bounds.cell_path(f, 0, 49).min() > 0.9
    _, tapes, _ = jacobians(cell, T=50)
    assert bounds.cell_path(np.array([tape.f for tape in tapes]), 0, 49).max() < 0.1


def test_explosion_overflows_and_vanishing_is_silent() -> None:
    dL_do = np.zeros((400, 1))
    dL_do[-1] = 1
    with np.errstate(over="raise"), pytest.raises(FloatingPointError):
        linear.state_adjoints(dL_do, np.array([[10.0]]), np.eye(1))
    vanished = linear.state_adjoints(dL_do, np.array([[0.1]]), np.eye(1))
    assert vanished[0, 0] == 0
    assert np.isfinite(vanished).all()
