"""The cell path and the full Jacobian of an LSTM, against the NumPy equations."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from torch.nn.utils.rnn import pack_sequence

import bptt
from bptt.equations import bounds
from bptt.equations.lstm import LSTM

from .explicit import DOUBLE, layer_of

T, B, I, H = 8, 3, 3, 4


def by_equations(layer, x: torch.Tensor, b: int) -> tuple[np.ndarray, np.ndarray]:
    """(f `[T, H]`, J `[T, S, S]`) of one lane."""
    p = {name.removesuffix("_l0"): p.detach().numpy() for name, p in layer.named_parameters()}
    cell = LSTM(p["weight_ih"], p["weight_hh"], p["bias_ih"], p["bias_hh"], p.get("weight_hr"))
    s, f, J = np.zeros(cell.state_size), [], []
    for x_t in x[:, b].numpy():
        s, tape = cell.step(x_t, s)
        f.append(tape.f)
        J.append(bounds.lstm_jacobian(cell, tape))
    return np.array(f), np.array(J)


@pytest.mark.parametrize("name", ["lstm", "lstm_proj"])
@pytest.mark.parametrize("k", [0, 3])
def test_against_the_equations(name: str, k: int) -> None:
    layer, x = layer_of(name), torch.randn(T, B, I, dtype=DOUBLE)
    found = bptt.flow.cell_path(layer, x, start=k)
    lanes = [by_equations(layer, x, b) for b in range(B)]
    assert_array_equal(found.n, np.arange(T - k))
    assert (found.layer, found.start) == ("layer 0", k)
    for n in found.n:
        paths = np.array([bounds.cell_path(f, k, k + n) for f, _ in lanes])
        inner = [bounds.full_cell_jacobian(J, k, k + n, H) for _, J in lanes]
        outer = [bounds.product(J, k, k + n) for _, J in lanes]
        assert_allclose(found.path[n], paths.max(1).mean(), rtol=1e-10)
        assert_allclose(found.path_mean[n], paths.mean(), rtol=1e-10)
        assert_allclose(found.full_c[n], np.mean([np.linalg.norm(J, 2) for J in inner]), rtol=1e-10)
        assert_allclose(found.full[n], np.mean([np.linalg.norm(J, 2) for J in outer]), rtol=1e-10)
    f = np.array([f for f, _ in lanes])
    assert_allclose(found.memory, 1 / (1 - f.mean((0, 1))), rtol=1e-10)
    first, alone = bptt.flow.cell_path(layer, x, start=k, lanes=1), bptt.flow.cell_path(layer, x[:, :1], start=k)
    assert_allclose(first.path, alone.path)
    assert_allclose(first.full, alone.full)
    assert_allclose(first.memory, found.memory)


def test_without_recurrent_weights_the_cell_path_is_all() -> None:
    layer = layer_of("lstm")
    torch.nn.init.zeros_(layer.weight_hh_l0)
    found = bptt.flow.cell_path(layer, torch.randn(T, B, I, dtype=DOUBLE))
    assert_allclose(found.full_c, found.path, rtol=1e-10)


def test_explodes_through_h_although_no_gate_exceeds_1() -> None:
    layer = layer_of("lstm", hidden=8)
    layer.weight_hh_l0.data *= 12
    found = bptt.flow.cell_path(layer, 0.1 * torch.randn(60, 2, I, dtype=DOUBLE))
    assert np.all(found.path <= 1)
    assert found.full_c[-1] > 1e3 * found.path[-1]


def test_long_products_are_finite() -> None:
    layer = layer_of("lstm")
    found = bptt.flow.cell_path(layer, torch.randn(1001, 1, I, dtype=DOUBLE), steps=1000)
    for values in (found.path, found.path_mean, found.full_c, found.full):
        assert np.isfinite(values).all()
    assert found.full[300] > 0
    assert len(found.n) == 1001


def test_lanes_that_end() -> None:
    layer = layer_of("lstm")
    lanes = [torch.randn(n, I, dtype=DOUBLE) for n in (6, 3)]
    both = bptt.flow.cell_path(layer, pack_sequence(lanes))
    long, short = (bptt.flow.cell_path(layer, lane[:, None]) for lane in lanes)
    for name in ("path", "path_mean", "full_c", "full"):
        expected = getattr(long, name).copy()
        expected[:3] = (expected[:3] + getattr(short, name)) / 2  # behind its end a lane is no part of the mean
        assert_allclose(getattr(both, name), expected, rtol=1e-10)
    assert_array_equal(both.lanes, [2, 2, 2, 1, 1, 1])
    assert_allclose(1 - 1 / both.memory, (6 * (1 - 1 / long.memory) + 3 * (1 - 1 / short.memory)) / 9, rtol=1e-10)


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match="subject must hold an LSTM: got GRU"):
        bptt.flow.cell_path(layer_of("gru"), torch.randn(T, B, I, dtype=DOUBLE))
    with pytest.raises(ValueError, match=r"start must be a state that steps follow, 0..7: got 8"):
        bptt.flow.cell_path(layer_of("lstm"), torch.randn(T, B, I, dtype=DOUBLE), start=8)
    with pytest.raises(ValueError, match=r"steps must be 0..7"):
        bptt.flow.cell_path(layer_of("lstm"), torch.randn(T, B, I, dtype=DOUBLE), steps=8)
    with pytest.raises(ValueError, match="lanes must be at least 1: got 0"):
        bptt.flow.cell_path(layer_of("lstm"), torch.randn(T, B, I, dtype=DOUBLE), lanes=0)


def test_not_finite() -> None:
    x = torch.randn(T, 1, I, dtype=DOUBLE)
    x[4] = torch.nan
    found = bptt.flow.cell_path(layer_of("lstm"), x)
    for values in (found.path, found.path_mean, found.full_c, found.full):
        assert_array_equal(np.isnan(values), found.n >= 4)
