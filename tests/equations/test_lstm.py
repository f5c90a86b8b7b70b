"""Chapter 5: the LSTM against torch and finite differences; the two layouts of its weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bptt.equations import lstm, recurrence

from .numeric import Array, build, central, close, complex_step, data, losses_of, torch_gradients, torch_layer

NAMES = ["lstm", "lstm_proj"]


def joined(got: dict[str, Array]) -> dict[str, Array]:
    """`lstm.adjoint`'s result with the pair as one vector."""
    return got | {"s_0": np.concatenate([got["h_0"], got["c_0"]], axis=1)}


def adjoint(cell: lstm.LSTM, x: Array, s_0: Array, dy: Array, ds_T: Array) -> dict[str, Array]:
    P = cell.output_size
    return joined(lstm.adjoint(cell, x, s_0[:, :P], s_0[:, P:], dy, ds_T[:, :P], ds_T[:, P:]))


@pytest.mark.parametrize("name", NAMES)
def test_every_gradient_by_finite_differences(name: str) -> None:
    cell = build(name)
    x, s_0, dy, ds_T = data(cell)
    got = adjoint(cell, x, s_0, dy, ds_T)
    e = recurrence.local_error(cell, dy, ds_T)
    for key, (function, at) in losses_of(cell, x, s_0, e).items():
        close(got[key], central(function, at), 1e-7)
        close(got[key], complex_step(function, at))


@pytest.mark.parametrize("name", NAMES)
def test_every_output_by_torch(name: str) -> None:
    cell = build(name, I=3, H=5)
    x, s_0, dy, ds_T = data(cell, T=7, B=3)
    expected = torch_gradients(name, cell, x, s_0, dy, ds_T)
    states, _ = recurrence.run(cell, x, s_0)
    close(states[:, :, : cell.output_size], expected.pop("y"))
    close(states[-1], expected.pop("final"))
    got = adjoint(cell, x, s_0, dy, ds_T)
    for key in expected:
        close(got[key], expected[key])


@pytest.mark.parametrize("name", NAMES)
def test_every_delta_by_finite_differences(name: str) -> None:
    cell = build(name)
    x, s_0, _, ds_T = data(cell)
    _, tape = cell.step(x[0, 0], s_0[0])
    P = cell.output_size
    dh, dc = ds_T[0, :P], ds_T[0, P:]

    def error(m: Array | None = None, **values: Array) -> Array:
        i, f, g, o, before = (values.get(k, getattr(tape, k)) for k in ("i", "f", "g", "o", "c_before"))
        c = values.get("c", f * before + i * g)
        m = o * np.tanh(c) if m is None else m
        h = m if cell.W_hr is None else cell.W_hr @ m
        return dh @ h + dc @ c

    d = cell.deltas(tape, dh, dc)
    close(d.h, dh)
    close(d.m, complex_step(lambda z: error(m=z), tape.o * tape.tanh_c))
    close(d.c, complex_step(lambda z: error(c=z), tape.f * tape.c_before + tape.i * tape.g))
    for name in ("o", "f", "i", "g", "c_before"):
        close(getattr(d, name), complex_step(lambda z, name=name: error(**{name: z}), getattr(tape, name)))
    for name in ("i", "f", "o"):
        gate = getattr(tape, name)
        close(getattr(d, f"a_{name}"), getattr(d, name) * gate * (1 - gate))
    close(d.a_g, d.g * (1 - tape.g**2))


@pytest.mark.parametrize("name", NAMES)
def test_concatenated_weights_are_torchs_weights_rearranged(name: str) -> None:
    cell = build(name)
    x, s_0, _, ds_T = data(cell)
    _, tape = cell.step(x[0, 0], s_0[0])
    P, I, H = cell.output_size, 2, 3
    d = cell.deltas(tape, ds_T[0, :P], ds_T[0, P:])
    concatenated = lstm.concatenated_gradients(tape, d)
    assert list(concatenated) == ["W_f", "W_i", "W_c", "W_o"]
    assert {g.shape for g in concatenated.values()} == {(H, P + I)}
    _, _, dw = cell.step_adjoint(tape, ds_T[0])
    layout = lstm.torch_layout(concatenated, P)
    close(layout["W_ih"], dw["W_ih"])
    close(layout["W_hh"], dw["W_hh"])


def test_total_gradient_is_the_sum_over_losses_of_each_step() -> None:
    cell = build("lstm")
    x, s_0, dy, ds_T = data(cell)
    whole = adjoint(cell, x, s_0, dy, ds_T)
    total = {key: np.zeros_like(value) for key, value in whole.items()}
    for t in range(len(dy)):
        one = np.zeros_like(dy)
        one[t] = dy[t]
        part = adjoint(cell, x, s_0, one, ds_T if t == len(dy) - 1 else np.zeros_like(ds_T))
        total = {key: total[key] + part[key] for key in total}
    for key in whole:
        close(total[key], whole[key])


def test_the_state_of_torchs_lstm_is_a_pair() -> None:
    cell = build("lstm")
    _, state = torch_layer("lstm", cell)(torch.zeros(2, 1, 2, dtype=torch.float64))
    assert isinstance(state, tuple)
    assert len(state) == 2
