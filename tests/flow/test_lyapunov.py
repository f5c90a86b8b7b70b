"""Lyapunov exponents where they are known, and against explicit products."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

import bptt

from . import explicit
from .explicit import DOUBLE, LAYERS, layer_of

I = 3


def linear(W: Tensor) -> bptt.nn.RNN:
    layer = bptt.nn.RNN(1, len(W), nonlinearity="identity", dtype=DOUBLE)
    layer.weight_hh_l0.data = W.to(DOUBLE)
    return layer


def zeros(T: int, B: int = 1) -> Tensor:
    return torch.zeros(T, B, 1, dtype=DOUBLE)


def test_linear_net() -> None:
    """log |eigenvalue|, for real ones that are apart."""
    V = torch.linalg.qr(torch.randn(5, 5, dtype=DOUBLE))[0] + 0.3 * torch.randn(5, 5, dtype=DOUBLE)
    values = torch.tensor([1.3, -1.0, 0.7, -0.5, 0.2], dtype=DOUBLE)
    W = V @ torch.diag(values) @ torch.linalg.inv(V)
    found = bptt.flow.lyapunov(linear(W), zeros(260, 2), warmup=200)
    assert_allclose(found.exponents, np.log(np.abs(values.numpy())), atol=1e-10)
    assert_allclose(found.error, 0, atol=1e-10)
    assert (found.steps, found.warmup, found.lanes, found.running.shape) == (60, 200, 2, (60, 5))
    assert_allclose(found.running, np.tile(found.exponents, (60, 1)), atol=1e-9)
    largest = bptt.flow.lyapunov(linear(W), zeros(260), warmup=200, count=2)
    assert_allclose(largest.exponents, found.exponents[:2], atol=1e-10)


def test_complex_pair() -> None:
    """A turn by 0.3 rad, stretched: both exponents are log 0.9, over whole turns."""
    a = 2 * np.pi / 20
    M = torch.tensor([[1.0, 0.4], [0.0, 0.8]], dtype=DOUBLE)
    R = 0.9 * torch.tensor([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]], dtype=DOUBLE)
    found = bptt.flow.lyapunov(linear(M @ R @ torch.linalg.inv(M)), zeros(220), warmup=20)
    assert_allclose(found.exponents, np.log([0.9, 0.9]), atol=1e-10)


@pytest.mark.parametrize("B", [1, 3])
def test_orthogonal_net(B: int) -> None:
    W = torch.linalg.qr(torch.randn(6, 6, dtype=DOUBLE))[0]
    found = bptt.flow.lyapunov(linear(W), torch.randn(500, B, 1, dtype=DOUBLE))
    assert_allclose(found.exponents, 0, atol=1e-10)
    assert_allclose(found.error, 0, atol=1e-10)


@pytest.mark.parametrize("name", [n for n in LAYERS if n != "relu"])
def test_sum_is_the_mean_log_determinant(name: str) -> None:
    T, B = 30, 2
    layer, x = layer_of(name), torch.randn(T, B, I, dtype=DOUBLE)
    found = bptt.flow.lyapunov(layer, x, warmup=4)
    J = explicit.jacobians(layer, x, torch.zeros(B, len(found.exponents), dtype=DOUBLE))
    expected = torch.linalg.slogdet(J)[1][4:].mean()
    assert_allclose(found.exponents.sum(), expected, rtol=1e-9)
    assert np.all(np.diff(found.exponents) <= 0)
    mean = torch.linalg.slogdet(J)[1][4:].mean(1).cumsum(0).numpy() / np.arange(1, T - 3)
    assert_allclose(found.running.sum(1), mean, rtol=1e-9)


def test_growth_of_volumes_against_the_explicit_product() -> None:
    """The first n columns of R_T ... R_1 span what J_T ... J_1 makes of the first frame: its volumes are the sums."""
    T = 12
    layer, x = layer_of("gru"), torch.randn(T, 1, I, dtype=DOUBLE)
    found = bptt.flow.lyapunov(layer, x, warmup=0)
    J = explicit.jacobians(layer, x, torch.zeros(1, 4, dtype=DOUBLE))[:, 0]
    first = torch.linalg.qr(torch.randn(1, 4, 4, dtype=DOUBLE, generator=torch.Generator().manual_seed(0)))[0][0]
    moved = torch.linalg.multi_dot([*J.flip(0), first])
    for n in range(1, 5):
        volume = torch.linalg.slogdet(moved[:, :n].T @ moved[:, :n])[1] / 2
        assert_allclose(found.running[-1, :n].sum() * T, volume, rtol=1e-8)


def test_logistic_map() -> None:
    """s -> 4 s (1 - s) has the exponent log 2."""
    s = torch.linspace(0.05, 0.6, 40, dtype=DOUBLE)[:, None]
    chain = bptt.flow.steps(lambda s, _: (4 * s * (1 - s), s), s, length=400, rows="independent")
    found = bptt.flow.lyapunov(chain)
    assert (found.layer, found.lanes, found.steps) == ("carry", 40, 360)
    assert abs(found.exponents[0] - np.log(2)) < 4 * found.error[0]
    assert 1e-4 < found.error[0] < 0.02


def test_standard_error_is_the_spread_of_repetitions() -> None:
    """Independent factors e^g, g normal: the error of the mean over N of them is sd(g)/sqrt(N)."""
    g = 0.3 * torch.randn(200, 30, dtype=DOUBLE)
    chain = bptt.flow.steps(
        lambda s, x: (s * x[:, None].exp(), s), torch.ones(30, 1, dtype=DOUBLE), g, rows="independent"
    )
    found = bptt.flow.lyapunov(chain, warmup=0)
    assert_allclose(found.exponents[0], g.mean(), rtol=1e-10)
    assert_allclose(found.error[0], 0.3 / np.sqrt(6000), rtol=0.4)
    lanes = torch.linspace(-1, 1, 30, dtype=DOUBLE).expand(200, 30)
    chain = bptt.flow.steps(
        lambda s, x: (s * x[:, None].exp(), s), torch.ones(30, 1, dtype=DOUBLE), lanes, rows="independent"
    )
    found = bptt.flow.lyapunov(chain, warmup=0)  # lanes that differ for good count as 30 samples, not as 600
    assert_allclose(found.error[0], lanes[0].std() / np.sqrt(30), rtol=1e-10)


def test_running_converges_and_stacks_have_their_layers() -> None:
    layer, x = layer_of("tanh", num_layers=2), torch.randn(80, 4, I, dtype=DOUBLE)
    found = bptt.flow.lyapunov(layer, x, layer=1)
    assert_allclose(found.running[-1], found.exponents)
    upper = bptt.nn.RNN(4, 4, dtype=DOUBLE)
    upper.load_state_dict({k.replace("l1", "l0"): v for k, v in layer.state_dict().items() if "l1" in k})
    below = bptt.nn.RNN(I, 4, dtype=DOUBLE)
    below.load_state_dict({k: v for k, v in layer.state_dict().items() if "l0" in k})
    alone = bptt.flow.lyapunov(upper, below(x)[0].detach())
    assert_allclose(found.exponents, alone.exponents, rtol=1e-10)
    assert found.layer == "layer 1"


def test_steps_that_are_closed_do_not_count() -> None:
    W = torch.diag(torch.tensor([0.9, 0.5], dtype=DOUBLE))
    lanes = [torch.zeros(n, 1, dtype=DOUBLE) for n in (100, 60)]
    found = bptt.flow.lyapunov(linear(W), pack_sequence(lanes), warmup=50)
    assert_allclose(found.exponents, np.log([0.9, 0.5]), atol=1e-10)
    assert np.isfinite(found.running).all()


def test_a_direction_that_is_lost() -> None:
    found = bptt.flow.lyapunov(linear(torch.diag(torch.tensor([0.9, 0.0], dtype=DOUBLE))), zeros(60), warmup=20)
    assert_allclose(found.exponents, [np.log(0.9), -np.inf])
    assert_array_equal(np.isnan(found.error), [False, True])


def test_not_finite() -> None:
    layer, x = layer_of("gru"), torch.randn(20, 1, I, dtype=DOUBLE)
    x[10] = torch.nan
    assert np.isnan(bptt.flow.lyapunov(layer, x).exponents).all()


def test_wrong_arguments() -> None:
    layer, x = layer_of("gru"), torch.randn(20, 1, I, dtype=DOUBLE)
    with pytest.raises(ValueError, match=r"count must be 1..4, the numbers in a state: got 5"):
        bptt.flow.lyapunov(layer, x, count=5)
    with pytest.raises(ValueError, match=r"warmup must be 0..19, fewer than the steps: got 20"):
        bptt.flow.lyapunov(layer, x, warmup=20)


def test_all_steps_closed() -> None:
    layer = layer_of("gru")

    class Closed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x, resets=torch.ones(x.shape[:2], dtype=torch.bool))[0]

    with pytest.raises(ValueError, match="no step counts"):
        bptt.flow.lyapunov(Closed(), torch.randn(5, 2, I, dtype=DOUBLE), lambda y: y.sum())


def test_a_frame_that_still_turns_shows_in_the_error():
    """Rates 0.5 and 0.95, and one that grows first: in a few steps the mean is not the rate of the long run."""
    grows = np.triu(np.full((6, 6), 0.7), 1) + np.diag(np.linspace(0.5, 0.9, 6))
    for W, rate in ((np.diag([0.5, 0.5, 0.5, 0.95]), 0.95), (grows, 0.9)):
        layer = linear(torch.tensor(W))
        for T in (12, 20, 40):
            found = bptt.flow.lyapunov(layer, torch.zeros(T, 1, 1, dtype=torch.float64))
            assert abs(found.exponents[0] - np.log(rate)) <= 3 * found.error[0], (T, found.exponents, found.error)


def test_what_dies_within_rounding_has_died():
    """A nilpotent Jacobian: the frame turns away from the zero by rounding, and would go on with what is left of it."""
    layer = linear(torch.diag(torch.ones(7, dtype=DOUBLE), -1))
    for count in (2, 8):
        found = bptt.flow.lyapunov(layer, torch.zeros(100, 1, 1, dtype=torch.float64), count=count)
        assert np.isneginf(found.exponents).all()


def test_no_advice_from_an_exponent_that_is_rounding():
    """An orthogonal matrix in float32: the exponent is 1e-9 with an error that is smaller still."""
    layer = bptt.nn.init.orthogonal_(bptt.nn.RNN(1, 8, nonlinearity="identity"))
    found = bptt.flow.lyapunov(layer, torch.zeros(100, 1, 1))
    assert bptt.flow.conclusion(found).startswith("At the edge")
    assert bptt.flow.verdict(found).advice == ()
