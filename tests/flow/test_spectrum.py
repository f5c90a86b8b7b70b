"""Eigenvalues and singular values of W_hh, and the directions its powers turn to."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal

import bptt
from bptt.equations import bounds

from .explicit import DOUBLE, LAYERS, layer_of

GATES = {"gru": ("r", "z", "n"), "lstm": ("i", "f", "g", "o")}


@pytest.mark.parametrize("name", [n for n in LAYERS if n != "lstm_proj"])
def test_gate_by_gate(name: str) -> None:
    layer = layer_of(name, hidden=5)
    found = bptt.flow.spectrum(layer)
    gates = GATES.get(name, ("h",))
    assert (found.gates, found.layer) == (gates, "layer 0")
    for g in range(len(gates)):
        W = layer.weight_hh_l0.detach()[5 * g : 5 * g + 5]
        values = torch.linalg.eigvals(W).numpy()
        assert_allclose(np.sort_complex(found.eigenvalues[g]), np.sort_complex(values), atol=1e-12)
        assert np.all(np.diff(np.abs(found.eigenvalues[g])) <= 1e-12)
        assert_allclose(found.singular[g], torch.linalg.svdvals(W).numpy(), rtol=1e-12)
        assert_allclose(found.radius[g], bounds.spectral_radius(W.numpy()), rtol=1e-12)
        assert_allclose(found.norm[g], bounds.beta_w(W.numpy()), rtol=1e-12)


def test_a_rotation_and_a_scaling() -> None:
    layer = bptt.nn.RNN(2, 3)
    layer.weight_hh_l0.data = torch.tensor([[0.0, -0.8, 0.0], [0.8, 0.0, 0.0], [0.0, 0.0, -0.9]])
    found = bptt.flow.spectrum(layer)
    assert_allclose(found.eigenvalues[0][0], -0.9, rtol=1e-6)
    assert_allclose(np.sort(found.eigenvalues[0][1:].imag), [-0.8, 0.8], rtol=1e-6)
    assert_allclose(found.singular[0], [0.9, 0.8, 0.8], rtol=1e-6)


def test_projection_takes_the_map_from_cell_to_gate() -> None:
    layer = layer_of("lstm_proj")
    found = bptt.flow.spectrum(layer)
    P = layer.proj_size
    for g in range(4):
        W = layer.weight_hh_l0.detach()[4 * g : 4 * g + 4]
        own = torch.linalg.eigvals(layer.weight_hr_l0.detach() @ W).numpy()  # h to h, which is [P, P]
        assert_allclose(np.sort_complex(found.eigenvalues[g, :P]), np.sort_complex(own), atol=1e-10)
        assert_allclose(np.abs(found.eigenvalues[g, P:]), 0, atol=1e-7)
        assert_allclose(found.singular[g], np.linalg.svd((W @ layer.weight_hr_l0.detach()).numpy())[1], atol=1e-12)


def test_which_layer() -> None:
    layer = layer_of("tanh", num_layers=2, bidirectional=True)
    found = bptt.flow.spectrum(layer, layer=3)
    assert found.layer == "layer 1 reversed"
    W = layer.weight_hh_l1_reverse.detach()
    assert_allclose(found.singular[0], torch.linalg.svdvals(W).numpy())
    assert_allclose(
        bptt.flow.spectrum(bptt.flow.record(layer, torch.randn(3, 1, 3, dtype=DOUBLE)), layer=3).radius, found.radius
    )
    plain = torch.nn.RNN(3, 4, num_layers=2, bidirectional=True, dtype=DOUBLE)
    plain.load_state_dict(layer.state_dict())
    model = torch.nn.ModuleDict({"a": plain, "b": torch.nn.GRU(1, 1)})
    assert_array_equal(bptt.flow.spectrum(model, layer=3, name="a").singular, found.singular)
    with pytest.raises(ValueError, match="several recurrent layers"):
        bptt.flow.spectrum(model)
    with pytest.raises(ValueError, match=r"layer must be one of 0..3: got 4"):
        bptt.flow.spectrum(layer, layer=4)
    with pytest.raises(TypeError, match="must hold an RNN"):
        bptt.flow.spectrum(torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match="subject must be a layer, a model or a Recording: got int"):
        bptt.flow.spectrum(3)


def test_not_finite() -> None:
    layer = layer_of("gru")
    layer.weight_hh_l0.data[0, 0] = torch.nan
    found = bptt.flow.spectrum(layer)
    assert_array_equal(np.isnan(found.radius), [True, False, False])
    assert_array_equal(np.isnan(found.singular).any(1), [True, False, False])


# Directions of powers


def test_directions_turn_to_the_dominant_eigenvector() -> None:
    V = torch.randn(4, 4, dtype=DOUBLE)
    W = V @ torch.diag(torch.tensor([0.9, -0.6, 0.3, 0.1], dtype=DOUBLE)) @ torch.linalg.inv(V)
    v = torch.randn(4, dtype=DOUBLE)
    found = bptt.flow.directions(W, v, 40)
    powers = np.array([np.linalg.matrix_power(W.numpy(), n) @ v.numpy() for n in range(41)])
    assert_allclose(found.vectors, powers / np.linalg.norm(powers, axis=1, keepdims=True), atol=1e-10)
    assert found.eigenvalue == pytest.approx(0.9)
    line = V[:, 0].numpy() / np.linalg.norm(V[:, 0].numpy())
    assert_allclose(np.abs(found.eigenvector @ line), 1, rtol=1e-12)
    assert_allclose(np.cos(found.angle), np.abs(found.vectors @ line), atol=1e-10)
    assert_allclose(found.angle[31:] / found.angle[30:-1], 0.6 / 0.9, rtol=1e-3)  # by the ratio of magnitudes


def test_magnitude_decides_and_a_negative_eigenvalue_flips() -> None:
    found = bptt.flow.directions(np.diag([0.5, -2.0]), [1.0, 0.1], 30)
    assert found.eigenvalue == -2
    assert_allclose(found.vectors[29:, 1] * found.vectors[28:-1, 1], -1, atol=1e-10)
    assert_allclose(found.angle[-1], 0, atol=1e-10)


def test_a_complex_pair_rotates_for_ever() -> None:
    a = 0.3
    W = 1.5 * np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])
    found = bptt.flow.directions(W, [1.0, 0.0], 50)
    assert found.eigenvector is None
    assert found.angle is None
    assert abs(found.eigenvalue) == pytest.approx(1.5)
    n = np.arange(51)
    assert_allclose(found.vectors, np.stack([np.cos(a * n), np.sin(a * n)], 1), atol=1e-12)


@pytest.mark.parametrize(
    ("W", "v", "steps", "words"),
    [
        (np.ones((2, 3)), np.ones(3), 1, "square matrix"),
        (np.eye(2), np.ones(3), 1, "vector of its size"),
        (np.eye(2), np.ones(2), -1, "steps must not be negative: got -1"),
        (np.array([[0.0, 1.0], [0.0, 0.0]]), np.ones(2), 3, "at n = 2"),
        (np.eye(2), np.zeros(2), 3, "at n = 0"),
    ],
)
def test_wrong_directions(W, v, steps: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        bptt.flow.directions(W, v, steps)
