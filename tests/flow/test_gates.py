"""Histograms and saturation of gates, against gates computed from the states by torch.nn's formulas."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from torch.nn.functional import linear
from torch.nn.utils.rnn import pack_sequence

import bptt

from .explicit import DOUBLE, LAYERS, layer_of

T, B, I, H = 9, 4, 3, 4

SIGMOID, TANH = (0.0, 1.0), (-1.0, 1.0)
ENDS = {
    "tanh": {"h": TANH},
    "sigmoid": {"h": SIGMOID},
    "gru": {"r": SIGMOID, "z": SIGMOID, "n": TANH},
    "lstm": {"i": SIGMOID, "f": SIGMOID, "g": TANH, "o": SIGMOID},
    "lstm_proj": {"i": SIGMOID, "f": SIGMOID, "g": TANH, "o": SIGMOID},
}


def values_of(layer, x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    before = torch.cat([torch.zeros_like(y[:1]), y[:-1]])
    a = linear(x, layer.weight_ih_l0, layer.bias_ih_l0)
    b = linear(before, layer.weight_hh_l0, layer.bias_hh_l0)
    if layer.mode == "GRU":
        (ar, az, an), (br, bz, bn) = a.chunk(3, -1), b.chunk(3, -1)
        r = torch.sigmoid(ar + br)
        return [r, torch.sigmoid(az + bz), torch.tanh(an + r * bn)]
    if layer.mode == "LSTM":
        i, f, g, o = (a + b).chunk(4, -1)
        return [torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)]
    return [y]


@pytest.mark.parametrize("name", ENDS)
def test_every_gate(name: str) -> None:
    layer, x = layer_of(name), 4 * torch.randn(T, B, I, dtype=DOUBLE)
    found = bptt.flow.gates(layer, x, margin=0.1, bins=10)
    with torch.no_grad():
        expected = [v.numpy().ravel() for v in values_of(layer, x, layer(x)[0])]
    assert found.names == tuple(ENDS[name])
    assert (found.margin, found.layer) == (0.1, "layer 0")
    for g, (values, (a, b)) in enumerate(zip(expected, ENDS[name].values(), strict=True)):
        assert_allclose(found.mean[g], values.mean(), rtol=1e-10)
        assert_allclose(found.low[g], np.mean(values < a + 0.1 * (b - a)))
        assert_allclose(found.high[g], np.mean(values > b - 0.1 * (b - a)))
        assert_allclose(found.bin_edges[g], np.linspace(a, b, 11))
        assert_array_equal(found.counts[g], np.histogram(values, np.linspace(a, b, 11))[0])
    assert found.low.sum() + found.high.sum() > 0


def test_all_saturated() -> None:
    layer = layer_of("lstm")
    torch.nn.init.zeros_(layer.weight_ih_l0)
    torch.nn.init.zeros_(layer.weight_hh_l0)
    layer.bias_ih_l0.data = torch.tensor([-50.0, 50.0, -50.0, 0.0], dtype=DOUBLE).repeat_interleave(H)
    torch.nn.init.zeros_(layer.bias_hh_l0)
    found = bptt.flow.gates(layer, torch.zeros(T, B, I, dtype=DOUBLE))
    assert_array_equal(found.low, [1, 0, 1, 0])
    assert_array_equal(found.high, [0, 1, 0, 0])


def test_relu_counts_zeros_and_identity_nothing() -> None:
    layer, x = layer_of("relu"), torch.randn(T, B, I, dtype=DOUBLE)
    y = layer(x)[0].detach().numpy()
    found = bptt.flow.gates(layer, x)
    assert 0 < np.mean(y == 0) < 1
    assert_allclose(found.low, [np.mean(y == 0)])
    assert_array_equal(found.high, [0])
    assert_allclose(found.bin_edges[0, [0, -1]], [y.min(), y.max()])
    found = bptt.flow.gates(layer_of("identity"), x)
    assert (found.low[0], found.high[0], found.counts.sum()) == (0, 0, T * B * H)


@pytest.mark.parametrize("name", LAYERS)
def test_padding_does_not_count(name: str) -> None:
    lanes = [torch.randn(n, I, dtype=DOUBLE) for n in (5, 2, 4)]
    layer = layer_of(name, bidirectional=True)
    for k in (0, 1):
        found = bptt.flow.gates(layer, pack_sequence(lanes, enforce_sorted=False), layer=k)
        alone = [bptt.flow.gates(layer, lane[:, None], layer=k) for lane in lanes]
        assert_array_equal(found.counts.sum(1), 11 * (layer.proj_size or H if name in ("tanh", "relu") else H))
        weights = np.array([5, 2, 4]) / 11
        assert_allclose(found.mean, sum(w * a.mean for w, a in zip(weights, alone, strict=True)), rtol=1e-10)


def test_nan_counts_as_neither() -> None:
    layer, x = layer_of("gru"), torch.randn(T, 1, I, dtype=DOUBLE)
    x[T - 1] = torch.nan
    found = bptt.flow.gates(layer, x)
    assert_array_equal(found.counts.sum(1), (T - 1) * H)
    assert np.isnan(found.mean).all()
    nowhere = bptt.flow.gates(layer_of("relu"), torch.full((2, 1, I), torch.nan, dtype=DOUBLE))
    assert (nowhere.counts.sum(), nowhere.low[0]) == (0, 0)


def test_wrong_arguments() -> None:
    layer, x = layer_of("gru"), torch.randn(T, B, I, dtype=DOUBLE)
    with pytest.raises(ValueError, match=r"margin must be above 0 and below 0.5: got 0.5"):
        bptt.flow.gates(layer, x, margin=0.5)
    with pytest.raises(ValueError, match="bins must be at least 1: got 0"):
        bptt.flow.gates(layer, x, bins=0)
    with pytest.raises(ValueError, match=r"layer must be one of 0..0: got 1"):
        bptt.flow.gates(layer, x, layer=1)
