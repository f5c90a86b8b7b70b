"""Chapter 1, second half: any step, its partials, its outputs."""

from __future__ import annotations

import numpy as np
import pytest

from bptt import equations
from bptt.equations import chain, recurrence

from .numeric import CELLS, Array, build, central, close, complex_step, data, generator, losses_of


def f(x: Array, s: Array, w: Array) -> Array:
    return np.sin(w[:3] @ s) * x.sum() + w[3] * s**2 / 5


def any_cell() -> recurrence.AnyStep:
    return recurrence.AnyStep(f, generator(3).normal(size=(4, 3)), state_size=3)


def test_every_cell_is_among_the_cells_of_these_tests() -> None:
    assert {type(build(name)) for name in CELLS} == set(equations.CELLS.values())


@pytest.mark.parametrize("name", CELLS)
def test_partials_are_what_the_adjoint_of_the_step_transposes(name: str) -> None:
    cell = build(name)
    x, s_0, _, ds_T = data(cell)
    s, tape = cell.step(x[0, 0], s_0[0])
    assert s.shape == (cell.state_size,)
    lam = ds_T[0]
    dx, ds, dw = cell.step_adjoint(tape, lam)
    K, J, b = recurrence.partials(cell, x[0, 0], s_0[0])
    close(dx, K.T @ lam)
    close(ds, J.T @ lam)
    assert list(dw) == list(b) == list(recurrence.weights(cell))
    for weight in dw:
        close(dw[weight], np.tensordot(lam, b[weight], 1))


def test_any_step_by_finite_differences_and_complex_steps() -> None:
    cell = any_cell()
    rng = generator()
    x, s_0, e = rng.normal(size=(4, 2, 2)), rng.normal(size=(2, 3)), rng.normal(size=(4, 2, 3))
    got = recurrence.adjoint(cell, x, s_0, e)
    for key, (function, at) in losses_of(cell, x, s_0, e).items():
        close(got[key], complex_step(function, at))
        close(got[key], central(function, at), 1e-7)


def test_adjoint_is_recursion_is_sum_over_pairs() -> None:
    cell = any_cell()
    rng = generator()
    x, s_0, e = rng.normal(size=(5, 1, 2)), rng.normal(size=(1, 3)), rng.normal(size=(5, 1, 3))
    states, _ = recurrence.run(cell, x, s_0)
    J, b = np.zeros((5, 3, 3)), np.zeros((5, 3, cell.w.size))
    for t in range(5):
        _, J[t], parts = recurrence.partials(cell, x[t, 0], s_0[0] if t == 0 else states[t - 1, 0])
        b[t] = parts["w"].reshape(3, -1)
    got = recurrence.adjoint(cell, x, s_0, e)
    dw = got["w"].ravel()
    a = chain.by_recursion(b, J)
    close(dw, sum(e[t, 0] @ a[t] for t in range(5)))
    close(dw, chain.pair_contributions(e[:, 0], J, b).sum((0, 1)))
    close(dw, sum(b[t].T @ got["lambda"][t, 0] for t in range(5)))


def test_outputs_of_any_g() -> None:
    rng = generator()
    h, v, y = rng.normal(size=(4, 3)), rng.normal(size=(2, 3)), rng.normal(size=(4, 2))

    def g(h_t: Array, v: Array) -> Array:
        return np.tanh(v @ h_t) + h_t[0]

    def mean_loss(h: Array, v: Array) -> float:
        return float(np.mean([np.sum((g(h[t], v) - y[t]) ** 2) / 2 for t in range(4)]))

    dl_do = np.array([g(h[t], v) - y[t] for t in range(4)]) / 4
    dv, e = recurrence.output_gradients(g, h, v, dl_do)
    close(dv, central(lambda z: mean_loss(h, z), v), 1e-7)
    close(e, central(lambda z: mean_loss(z, v), h), 1e-7)


def test_final_state_counts_as_loss_of_the_last_step() -> None:
    cell = build("lstm")
    _, _, dy, ds_T = data(cell)
    e = recurrence.local_error(cell, dy, ds_T)
    np.testing.assert_array_equal(e[:-1, :, :3], dy[:-1])
    np.testing.assert_array_equal(e[:-1, :, 3:], 0)
    close(e[-1], ds_T + np.concatenate([dy[-1], np.zeros((2, 3))], axis=1))
