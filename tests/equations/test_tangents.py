"""Chapter 6, its last part: tangents against complex steps, and against the adjoint, whose transpose they are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bptt.equations import recurrence, tangents

from .numeric import CELLS, Array, build, close, data, generator

STEP = 1e-100


def moving(cell: Any, x: Array, s_0: Array) -> tuple[Array, Array, dict[str, Array]]:
    rng = generator(5)
    dw = {name: rng.normal(size=w.shape) for name, w in recurrence.weights(cell).items()}
    return rng.normal(size=x.shape), rng.normal(size=s_0.shape), dw


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("reset", [False, True])
def test_tangents_by_complex_steps(name: str, reset: bool) -> None:
    cell = build(name)
    x, s_0, _, _ = data(cell)
    resets = generator(3).random(x.shape[:2]) < 0.4 if reset else None
    dx, ds_0, dw = moving(cell, x, s_0)
    moved = replace(cell, **{n: w + 1j * STEP * dw[n] for n, w in recurrence.weights(cell).items()})
    states, _ = recurrence.run(moved, x + 1j * STEP * dx, s_0 + 1j * STEP * ds_0, resets)
    close(tangents.push(cell, x, s_0, dx, ds_0, dw, resets), states.imag / STEP)


@pytest.mark.parametrize("name", CELLS)
def test_the_adjoint_is_the_transpose_of_the_tangent(name: str) -> None:
    """<e, push(v)> = <pull(e), v>: (6.34)."""
    cell = build(name)
    x, s_0, dy, ds_T = data(cell)
    dx, ds_0, dw = moving(cell, x, s_0)
    e = recurrence.local_error(cell, dy, ds_T)
    back = recurrence.adjoint(cell, x, s_0, e)
    forward = (e * tangents.push(cell, x, s_0, dx, ds_0, dw)).sum()
    close(forward, (back["x"] * dx).sum() + (back["s_0"] * ds_0).sum() + sum((back[n] * dw[n]).sum() for n in dw))


def test_a_step_without_a_closed_form() -> None:
    cell = recurrence.AnyStep(lambda x, s, w: np.sin(w * s + x), w=np.array([0.5]), state_size=1)
    x, s_0 = np.array([[[0.3]], [[-0.2]]]), np.array([[0.1]])
    got = tangents.push(cell, x, s_0, np.ones_like(x), np.ones_like(s_0), {"w": np.ones(1)})
    moved = replace(cell, w=cell.w + 1j * STEP)
    close(got, recurrence.run(moved, x + 1j * STEP, s_0 + 1j * STEP)[0].imag / STEP)
