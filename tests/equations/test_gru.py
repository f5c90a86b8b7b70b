"""Chapter 4: the GRU against torch and finite differences."""

from __future__ import annotations

import torch

from bptt.equations import gru, recurrence

from .numeric import build, central, close, complex_step, data, losses_of, torch_gradients, torch_layer


def test_every_gradient_by_finite_differences() -> None:
    cell = build("gru")
    x, h_0, dy, dh_T = data(cell)
    got = gru.adjoint(cell, x, h_0, dy, dh_T)
    e = recurrence.local_error(cell, dy, dh_T)
    for key, (function, at) in losses_of(cell, x, h_0, e).items():
        close(got["h_0" if key == "s_0" else key], central(function, at), 1e-7)
        close(got["h_0" if key == "s_0" else key], complex_step(function, at))


def test_every_output_by_torch() -> None:
    cell = build("gru", I=3, H=5)
    x, h_0, dy, dh_T = data(cell, T=7, B=3)
    expected = torch_gradients("gru", cell, x, h_0, dy, dh_T)
    states, _ = recurrence.run(cell, x, h_0)
    close(states, expected.pop("y"))
    close(states[-1], expected.pop("final"))
    got = gru.adjoint(cell, x, h_0, dy, dh_T)
    for key in expected:
        close(got["h_0" if key == "s_0" else key], expected[key])


def test_the_state_of_torchs_gru_is_a_tensor() -> None:
    cell = build("gru")
    _, state = torch_layer("gru", cell)(torch.zeros(2, 1, 2, dtype=torch.float64))
    assert isinstance(state, torch.Tensor)
