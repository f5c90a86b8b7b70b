"""The window chosen by a bound on the bias: against known tails, autograd, and what training does with it."""

import math

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch.nn.utils.rnn import pack_sequence

import bptt
from bptt.flow._adaptive import adapt, adapted, contributions, smallest_window
from bptt.flow._recording import record
from bptt.policies import Adaptive

GEOMETRIC = [(0.5, 0.9), (0.5, 0.1), (0.8, 0.5), (0.95, 0.3), (0.05, 0.01)]


@pytest.mark.parametrize(("rate", "bound"), GEOMETRIC)
@pytest.mark.parametrize("least", [1, 3])
def test_geometric_tail(rate: float, bound: float, least: int) -> None:
    """All in one direction: a window w leaves out the part rate**w."""
    phi = 3.0 * rate ** np.arange(200)
    found = smallest_window(phi, phi.cumsum(), bound, least=least)
    assert found.satisfied
    assert found.window == max(least, math.ceil(math.log(bound) / math.log(rate)))
    assert_allclose(found.rate, rate, rtol=1e-9)
    assert_allclose(found.bias, rate**found.window, rtol=1e-3)


def test_the_tail_beyond_what_was_measured_counts() -> None:
    phi = 0.9 ** np.arange(10)
    found = smallest_window(phi, phi.cumsum(), 0.99)
    total, beyond = 10.0, 10 * 0.9 ** np.arange(1, 11)
    assert_allclose(found.biases, beyond / max(phi.cumsum() - beyond), rtol=1e-12)
    assert total > phi.sum()


def test_two_ranges_and_cancellation() -> None:
    """Every number by the sums that define it."""
    generator = np.random.default_rng(1)
    phi = np.concatenate([np.ones(10), 0.6 ** np.arange(1, 21)])
    partial = phi.cumsum() * generator.uniform(0.6, 1.0, len(phi))
    found = smallest_window(phi, partial, 0.4)
    assert_allclose(found.rate, 0.6, rtol=1e-12)
    left = [sum(phi[w:]) + phi[-1] * 0.6 / 0.4 for w in range(1, 31)]
    least_norm = max(g - e for g, e in zip(partial, left, strict=True))
    biases = [e / least_norm for e in left]
    assert_allclose(found.biases, biases, rtol=1e-12)
    assert found.window == next(w for w, bias in enumerate(biases, start=1) if bias <= 0.4)
    assert 1 < found.window < 30


@pytest.mark.parametrize("rate", [1.0, 1.2])
def test_without_decay_nothing_is_good_enough(rate: float) -> None:
    phi = rate ** np.arange(20.0)
    found = smallest_window(phi, phi.cumsum(), 0.9)
    assert (found.window, found.satisfied, found.bias) == (20, False, math.inf)


def test_a_gradient_that_cancels_bounds_nothing() -> None:
    phi = 0.5 ** np.arange(20)
    found = smallest_window(phi, np.zeros(20), 0.9)
    assert (found.window, found.satisfied, found.bias) == (20, False, math.inf)


def test_short_arrays() -> None:
    one = smallest_window(np.ones(1), np.ones(1), 0.9)
    assert (one.window, one.satisfied) == (1, False)
    assert math.isnan(one.rate)
    nothing_behind = smallest_window(np.array([2.0, 0, 0, 0]), np.full(4, 2.0), 0.1)
    assert (nothing_behind.window, nothing_behind.satisfied, nothing_behind.bias) == (1, True, 0)


@pytest.mark.parametrize(
    ("phi", "partial", "least"),
    [
        ([], [], 1),
        ([1.0, 2], [1.0], 1),
        ([[1.0]], [[1.0]], 1),
        ([1.0, -1], [1.0, 1], 1),
        ([1.0, math.nan], [1.0, 1], 1),
        ([1.0, 1], [1.0, math.inf], 1),
        ([1.0, 1], [1.0, 1], 3),
    ],
)
def test_arrays_that_are_none(phi: list[float], partial: list[float], least: int) -> None:
    with pytest.raises(ValueError, match=r"must (be|hold).*got"):
        smallest_window(np.array(phi), np.array(partial), 0.5, least=least)


def by_autograd(
    layer: bptt.nn.LSTM, x: torch.Tensor, loss: torch.Tensor, losses: list[int], K: int
) -> tuple[np.ndarray, np.ndarray]:
    """phi and |g_w| from one gradient per loss and lane, states as leaves of a loop over torch's own cell."""
    T, B, _ = x.shape
    H, L = layer.hidden_size, layer.num_layers
    states = [torch.zeros(B, H, dtype=x.dtype) for _ in range(2 * L)]
    kept, tops = [], []
    for t in range(T):
        below, here = x[t], []
        for i in range(L):
            w = [getattr(layer, f"{name}_l{i}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
            h, c = torch.lstm_cell(below, (states[2 * i], states[2 * i + 1]), *w)
            states[2 * i], states[2 * i + 1] = h, c.clone()  # c by the way to the next step alone
            below = h
            here += states[2 * i : 2 * i + 2]
        kept.append(here)
        tops.append(below)
    parts: list[list[torch.Tensor]] = [[] for _ in range(K)]
    for s in losses:
        for b in range(B):
            for k in range(min(K, s + 1)):
                grads = torch.autograd.grad(
                    (tops[s][b] * loss[s, b]).sum(), kept[s - k], retain_graph=True, allow_unused=True
                )
                flat = [torch.zeros(H, dtype=x.dtype) if g is None else g[b] for g in grads]
                parts[k].append(torch.cat(flat))
    phi = [torch.stack(part).norm(dim=1).mean().item() for part in parts]
    means = torch.stack([torch.stack(part).mean(0) for part in parts])
    return np.array(phi), means.cumsum(0).norm(dim=1).numpy()


@pytest.mark.parametrize("layers", [1, 2])
def test_contributions_are_autograds(layers: int) -> None:
    torch.manual_seed(0)
    layer = bptt.nn.LSTM(2, 3, num_layers=layers, dtype=torch.float64)
    x, dy = torch.randn(9, 2, 2, dtype=torch.float64), torch.randn(9, 2, 3, dtype=torch.float64)
    dy[7] = 0  # a step without a loss
    recording = record(layer, x, lambda y: (y * dy).sum())
    phi, partial, count = contributions(recording, 6, 3)
    expected = by_autograd(layer, x, dy, [5, 6, 8], 6)
    assert_allclose(phi, expected[0], rtol=1e-10)
    assert_allclose(partial, expected[1], rtol=1e-10)
    assert count.tolist() == [6] * 6
    phi, partial, count = contributions(recording, 100, 100)
    expected = by_autograd(layer, x, dy, [0, 1, 2, 3, 4, 5, 6, 8], 9)
    assert_allclose(phi, expected[0], rtol=1e-10)
    assert_allclose(partial, expected[1], rtol=1e-10)
    assert count.tolist() == [16, 14, 12, 10, 8, 6, 4, 2, 2]


def test_packed_lanes_end_where_they_end() -> None:
    torch.manual_seed(1)
    layer = bptt.nn.GRU(2, 3, dtype=torch.float64)
    lanes = [torch.randn(n, 2, dtype=torch.float64) for n in (7, 4)]
    parts = [contributions(record(layer, lane[:, None], lambda y: y.sum()), 9, 9) for lane in lanes]
    phi, _, count = contributions(record(layer, pack_sequence(lanes), lambda y: y.data.sum()), 9, 9)
    weights = np.zeros((2, 7))
    sums = np.zeros(7)
    for row, (own, _, number) in zip(weights, parts, strict=True):
        row[: len(own)] = number
        sums[: len(own)] += own * number
    assert_allclose(count, weights.sum(0))
    assert_allclose(phi, sums / weights.sum(0), rtol=1e-10)


def linear(rate: float, gradient: str = "full") -> bptt.nn.RNN:
    layer = bptt.nn.RNN(1, 4, nonlinearity="identity", dtype=torch.float64, gradient=gradient)
    with torch.no_grad():
        layer.weight_hh_l0.copy_(rate * torch.eye(4, dtype=torch.float64))
    return layer


def same_error(y: torch.Tensor) -> torch.Tensor:
    return y.sum()


@pytest.mark.parametrize(("rate", "bound"), [(0.5, 0.9), (0.5, 0.1), (0.8, 0.5)])
def test_linear_net_of_known_decay(rate: float, bound: float) -> None:
    x = torch.randn(100, 2, 1, dtype=torch.float64)
    found = adapted(linear(rate), x, same_error, policy=Adaptive(bound, 60))
    assert found.satisfied
    assert_allclose(found.rate, rate, rtol=1e-9)
    assert_allclose(found.phi, 2 * rate ** np.arange(60), rtol=1e-9)
    assert found.window == math.ceil(math.log(bound) / math.log(rate))
    assert_allclose(found.bias, rate**found.window, rtol=1e-3)


def test_the_bias_estimated_is_at_least_the_bias() -> None:
    """Of the adjoint summed over steps, which the norms bound: measured under the policy itself."""
    torch.manual_seed(2)
    layer, x = bptt.nn.LSTM(3, 8, dtype=torch.float64), torch.randn(60, 4, 3, dtype=torch.float64)

    def loss(y: torch.Tensor) -> torch.Tensor:
        return y[-1].sum()

    recording = record(layer, x, loss)
    found = adapted(recording, policy=Adaptive(0.2, 40))
    sums = [
        bptt.gradients(layer, x, recording.dy, gradient=policy).adjoints.sum((0, 1))
        for policy in ("full", bptt.Truncated(found.window))
    ]
    assert found.satisfied
    assert ((sums[1] - sums[0]).norm() / sums[0].norm()).item() < found.bias <= 0.2


def test_adapt_sets_the_window_and_nothing_else() -> None:
    layer = linear(0.5, "adaptive:0.3,max=40,every=2")
    x = torch.randn(60, 2, 1, dtype=torch.float64)
    random, before = torch.get_rng_state(), {n: p.detach().clone() for n, p in layer.named_parameters()}
    found = adapt(layer, x, same_error)
    assert found.window == 2
    assert layer.gradient == Adaptive(0.3, 40, every=2, window=2)
    assert str(layer.gradient) == "adaptive:0.3,max=40,every=2,window=2"
    torch.testing.assert_close(torch.get_rng_state(), random)
    for name, p in layer.named_parameters():
        torch.testing.assert_close(p.detach(), before[name], rtol=0, atol=0)
        assert p.grad is None
    with torch.no_grad():
        layer.weight_hh_l0.copy_(0.9 * torch.eye(4, dtype=torch.float64))
    assert adapt(layer, x, same_error).window == math.ceil(math.log(0.3) / math.log(0.9))  # up again
    assert layer.gradient.window == 12


def test_explosion_asks_for_all_that_is_allowed() -> None:
    layer, x = linear(1.1, "adaptive:0.9,max=40,window=3"), torch.randn(60, 2, 1, dtype=torch.float64)
    found = adapt(layer, x, same_error)
    assert (found.window, found.satisfied, found.bias) == (40, False, math.inf)
    assert layer.gradient.window == 40
    with torch.no_grad():
        layer.weight_hh_l0.fill_(math.inf)
    found = adapted(layer, x, same_error, policy=Adaptive(0.9, 40))
    assert (found.window, found.satisfied) == (40, False)
    assert math.isnan(found.rate)
    found = adapted(linear(0.5), x, lambda y: 0 * y.sum(), policy=Adaptive(0.9, 40))  # no error comes back
    assert (found.window, found.satisfied, len(found.phi)) == (40, False, 0)


def test_a_sequence_shorter_than_the_window() -> None:
    layer = linear(0.9, "adaptive:0.5,max=40,every=8")
    assert adapt(layer, torch.randn(5, 1, 1, dtype=torch.float64), same_error).window == 40
    assert layer.gradient.window == 40
    layer = linear(0.1, "adaptive:0.5,max=40,every=8")
    adapt(layer, torch.randn(5, 1, 1, dtype=torch.float64), same_error)
    assert layer.gradient.window == 8


def test_only_early_losses() -> None:
    x = torch.randn(60, 1, 1, dtype=torch.float64)
    found = adapted(linear(0.5), x, lambda y: y[:5].sum(), policy=Adaptive(0.3, 40))
    assert_allclose(found.phi, 2 * 0.5 ** np.arange(5), rtol=1e-9)
    assert found.window == 2


@pytest.mark.parametrize("kind", [bptt.nn.RNN, bptt.nn.GRU, bptt.nn.LSTM])
@pytest.mark.parametrize("shape", [{}, {"num_layers": 2}, {"bidirectional": True, "num_layers": 2}])
def test_every_layer_and_its_gradient_is_that_of_truncated(kind: type, shape: dict) -> None:
    torch.manual_seed(3)
    layer, x = kind(2, 3, gradient="adaptive:0.9,max=30", **shape), torch.randn(40, 2, 2)
    window = adapt(layer, x).window
    assert layer.gradient.window == window < 30
    dy = torch.ones_like(layer(x)[0])
    own, truncated = (
        bptt.gradients(layer, x, dy, gradient=policy).parameters for policy in (None, bptt.Truncated(window))
    )
    torch.testing.assert_close(own, truncated, rtol=0, atol=0)


def test_bad_arguments() -> None:
    layer, x = linear(0.5), torch.randn(6, 1, 1, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"the layer's gradient must be an Adaptive policy: got full"):
        adapt(layer, x)
    with pytest.raises(TypeError, match=r"policy must be an Adaptive policy: got 'adaptive:0.5,max=5'"):
        adapted(layer, x, policy="adaptive:0.5,max=5")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"losses must be at least 1: got 0"):
        adapted(layer, x, policy=Adaptive(0.5, 5), losses=0)
