"""Policies compared: against the equations, autograd with detach, and joint enumeration."""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from clock import Clock
from numpy.testing import assert_allclose
from torch.nn.utils.rnn import pack_sequence

import bptt
from bptt.equations import randomized
from bptt.flow import _compare, _moments
from bptt.flow._allocations import peak_bytes
from bptt.flow._comparable import OfLayer, contraction
from bptt.flow._compare import Comparison, compare
from bptt.flow._recording import record


def linear(W: torch.Tensor) -> bptt.nn.RNN:
    """h_t = W h_{t-1} + b: with zero input and bias every parameter but the biases has gradient 0."""
    layer = bptt.nn.RNN(1, len(W), nonlinearity="identity", dtype=torch.float64)
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
        layer.weight_hh_l0.copy_(W)
    return layer


def chain(a: float) -> bptt.nn.RNN:
    return linear(torch.tensor([[a]], dtype=torch.float64))


def still(T: int) -> torch.Tensor:
    return torch.zeros(T, 1, 1, dtype=torch.float64)


def last(y: torch.Tensor) -> torch.Tensor:
    return y[-1].sum()


def only(comparison: Comparison) -> _compare.Row:
    """The one that was asked for; the layer's own comes after it."""
    row, *own = comparison.rows
    assert [other.policy for other in own] in ([], [comparison.own])
    return row


@pytest.mark.parametrize(("a", "p"), [(0.5, 0.8), (0.3, 0.3), (0.7, 0.6)])
def test_scalar_chain_is_the_recursion_and_tends_to_its_limit(a: float, p: float) -> None:
    T = 12
    row = only(compare(chain(a), still(T), last, policies=[f"randomized:{p}"]))
    assert row.exact
    assert row.bias < 1e-12
    mean, moment = randomized.second_moments(np.ones((T, 1)), np.full((T, 1, 1), a), p)
    assert_allclose(row.variance, moment[-1, 0, 0] / mean[-1, 0] ** 2 - 1, rtol=1e-12)
    limit_mean, limit = randomized.scalar_chain(a, p)
    assert_allclose(row.variance, limit / limit_mean**2, rtol=3 * T * max(a, a * a / p) ** (T - 1))


def test_long_chain_sampled_is_the_limit() -> None:
    row = only(compare(chain(0.5), still(120), last, policies=["randomized:0.8"], draws=2000))
    mean, variance = randomized.scalar_chain(0.5, 0.8)
    assert not row.exact
    assert row.draws == 2000
    assert 0 < row.variance_error < 0.1 * row.variance
    assert abs(row.variance - variance / mean**2) < 4 * row.variance_error
    assert row.bias < 3 * row.bias_error


def test_variance_stays_finite_only_above_the_critical_p() -> None:
    variances = {
        (p, T): only(compare(chain(0.7), still(T), last, policies=[f"randomized:{p}"])).variance
        for p in (0.3, 0.9)
        for T in (6, 10)
    }
    assert contraction(record(chain(0.7), still(12), last)) ** 2 == pytest.approx(0.49)
    assert variances[0.3, 10] > 3 * variances[0.3, 6]
    assert variances[0.9, 10] < 1.4 * variances[0.9, 6]


def test_linear_net_of_vectors() -> None:
    T, H, p = 9, 3, 0.7
    generator = torch.Generator().manual_seed(1)
    W = torch.randn(H, H, dtype=torch.float64, generator=generator) * 0.4
    e = torch.randn(H, dtype=torch.float64, generator=generator)
    row = only(compare(linear(W), still(T), lambda y: y[-1, 0] @ e, policies=[f"randomized:{p}"]))
    variance = square = 0.0
    for unit in np.eye(H):  # the gradient of one bias, at every step
        mean, moment = randomized.second_moments(np.tile(unit, (T, 1)), np.tile(W.numpy(), (T, 1, 1)), p)
        first = e.numpy() @ mean[-1]
        variance += e.numpy() @ moment[-1] @ e.numpy() - first**2
        square += first**2
    assert_allclose(row.variance, variance / square, rtol=1e-12)


def by_hand(
    layer: torch.nn.LSTM, x: torch.Tensor, loss: Callable[[torch.Tensor], torch.Tensor], k: int
) -> torch.Tensor:
    """torch's gradient with the state detached every k steps."""
    ys, state = [], None
    for chunk in x.split(k):
        y, state = layer(chunk, state)
        state = tuple(s.detach() for s in state)
        ys.append(y)
    grads = torch.autograd.grad(loss(torch.cat(ys)), list(layer.parameters()))
    return torch.cat([g.flatten() for g in grads])


def test_chunked_is_detach() -> None:
    torch.manual_seed(2)
    layer, x = torch.nn.LSTM(3, 4, num_layers=2, dtype=torch.float64), torch.randn(11, 2, 3, dtype=torch.float64)
    loss = torch.Tensor.norm
    full, cut = by_hand(layer, x, loss, 11), by_hand(layer, x, loss, 3)
    found = compare(layer, x, loss, policies=["full", "chunked:3"])
    assert_allclose(found.full_norm, full.norm().item(), rtol=1e-12)
    assert_allclose(found.rows[1].bias, ((cut - full).norm() / full.norm()).item(), rtol=1e-10)
    assert_allclose(found.rows[1].cosine, (cut @ full / cut.norm() / full.norm()).item(), rtol=1e-12)
    assert found.rows[0].bias < 1e-14
    assert [(row.variance, row.bias_error, row.draws, row.exact) for row in found.rows] == [(0, 0, 1, True)] * 2


def test_truncated_reaches_each_loss_by_itself() -> None:
    torch.manual_seed(3)
    layer, x = torch.nn.LSTM(3, 4, dtype=torch.float64), torch.randn(8, 2, 3, dtype=torch.float64)
    total = torch.zeros(sum(p.numel() for p in layer.parameters()), dtype=torch.float64)
    for t in range(8):  # a loss at a time, the states before its window held
        start = max(0, t - 2)
        with torch.no_grad():
            state = layer(x[:start])[1] if start else None
        y, _ = layer(x[start : t + 1], state)
        grads = torch.autograd.grad(y[-1].square().sum(), list(layer.parameters()))
        total += torch.cat([g.flatten() for g in grads])
    full = by_hand(layer, x, lambda y: y.square().sum(), 8)
    row = only(compare(layer, x, lambda y: y.square().sum(), policies=[bptt.Truncated(3)]))
    assert_allclose(row.bias, ((total - full).norm() / full.norm()).item(), rtol=1e-10)


def patterns(p: float, T: int, B: int) -> Iterator[tuple[torch.Tensor, float]]:
    """Every xi `[T, B]` with its probability, lanes jointly."""
    single = list(randomized.cut_patterns(lambda distance: p, T))
    for lanes in product(single, repeat=B):
        xi = torch.from_numpy(np.stack([xi for xi, _ in lanes], axis=1))
        yield xi, float(np.prod([probability for _, probability in lanes]))


def test_lanes_enumerated_one_by_one_are_all_lanes_jointly() -> None:
    T, B, p = 5, 2, 0.6
    torch.manual_seed(4)
    layer, x = bptt.nn.RNN(2, 3, dtype=torch.float64), torch.randn(T, B, 2, dtype=torch.float64)
    parameters = list(layer.parameters())
    W, R, b, c = parameters
    first, second = torch.zeros(sum(w.numel() for w in parameters), dtype=torch.float64), 0.0
    for xi, probability in patterns(p, T, B):
        h, loss = torch.zeros(B, 3, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for t in range(T):
            scaled = xi[t, :, None] * h + ((1 - xi[t, :, None]) * h).detach()
            h = torch.tanh(x[t] @ W.T + b + scaled @ R.T + c)
            loss = loss + h.pow(3).sum()
        g = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
        first, second = first + probability * g, second + probability * g.square().sum().item()
    row = only(compare(layer, x, lambda y: y.pow(3).sum(), policies=[f"randomized:{p}"]))
    assert row.draws == B * 2 ** (T - 1)
    assert_allclose(row.variance, second / first.square().sum().item() - 1, rtol=1e-10)


@pytest.mark.parametrize("policy", ["randomized:0.6", "randomized:0.3,0.9", "randomized:mean=3,tail=4"])
def test_sampled_agrees_with_exact(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    recording = record(bptt.nn.GRU(2, 4), torch.randn(6, 3, 2), lambda y: y.sum())
    exact = only(compare(recording, policies=[policy]))
    monkeypatch.setattr(_moments, "PATTERNS", 0)
    sampled = only(compare(recording, policies=[policy], draws=600))
    assert (exact.exact, sampled.exact) == (True, False)
    assert exact.bias < 1e-12
    assert abs(sampled.variance - exact.variance) < 4 * sampled.variance_error
    assert sampled.bias < 3 * sampled.bias_error
    assert_allclose(sampled.bias_error, (sampled.variance / 600) ** 0.5, rtol=1e-12)


def test_noise_is_not_taken_for_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    """About half of the estimates of a squared bias of 0 are below 0; |m - g|^2 never is."""
    monkeypatch.setattr(_moments, "PATTERNS", 0)
    recording = record(chain(0.5), still(30), last)
    found = [only(compare(recording, policies=["randomized:0.8"], draws=20, seed=seed)).bias for seed in range(10)]
    assert 2 <= sum(bias == 0 for bias in found) <= 9


def test_a_bias_is_found_beneath_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Factors that are not 1 on average: the estimate of the bias is the true one, not that plus the noise."""
    monkeypatch.setattr(_moments, "PATTERNS", 0)
    weights = bptt.Randomized.weights
    monkeypatch.setattr(bptt.Randomized, "weights", lambda self, uniform: 0.8 * weights(self, uniform))
    T, a = 40, 0.9
    row = only(compare(chain(a), still(T), last, policies=["randomized:0.9"], draws=500))
    biased, full = (sum(factor**k for k in range(T)) for factor in (0.8 * a, a))
    assert abs(row.bias - (1 - biased / full)) < 3 * row.bias_error


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (bptt.nn.GRU(2, 3, bidirectional=True), torch.randn(4, 2, 2)),
        (bptt.nn.LSTM(2, 3, num_layers=2, bidirectional=True), torch.randn(3, 1, 2)),
        (bptt.nn.LSTM(2, 3, num_layers=2, proj_size=2), torch.randn(7, 2, 2)),
        (bptt.nn.RNN(2, 3), pack_sequence([torch.randn(6, 2), torch.randn(3, 2)])),
    ],
    ids=["bidirectional", "two bidirectional", "projected", "packed"],
)
def test_every_kind_of_layer_is_unbiased(layer: torch.nn.Module, x: torch.Tensor) -> None:
    row = only(compare(layer, x, policies=["randomized:0.5"]))
    assert row.exact
    assert row.bias < 1e-12
    assert row.variance > 0


def test_contraction() -> None:
    for a in (0.5, 1.1):
        found = compare(chain(a), still(30), last, policies=["full"])
        assert_allclose([found.contraction, found.critical_p], [a, a * a], rtol=1e-6)
    stacked = bptt.nn.RNN(2, 2, num_layers=2, nonlinearity="identity", dtype=torch.float64)
    with torch.no_grad():
        stacked.weight_hh_l0.copy_(0.9 * torch.eye(2))
        stacked.weight_hh_l1.copy_(0.2 * torch.eye(2))
    x = torch.zeros(60, 1, 2, dtype=torch.float64)
    assert_allclose(contraction(record(stacked, x, lambda y: y.sum())), 0.9, rtol=1e-3)  # the slower layer's


def test_without_a_fit_the_contraction_is_nan() -> None:
    found = compare(chain(0.5), still(1), last, policies=["full", "randomized:0.5"])
    assert np.isnan(found.contraction)
    assert [row.variance for row in found.rows] == [0, 0]  # no edge, nothing drawn


def test_nothing_is_touched() -> None:
    layer, generator = bptt.nn.GRU(2, 3, dropout=0.5, num_layers=2), torch.Generator().manual_seed(7)
    own = torch.get_rng_state().clone(), generator.get_state().clone()
    before = [p.detach().clone() for p in layer.parameters()]
    x = torch.ones(20, 2, 2)
    rows = [compare(layer, x, policies=[bptt.Randomized(0.9, generator=generator)], draws=5).rows[0]] * 2
    assert rows[0].variance == rows[1].variance
    torch.testing.assert_close(torch.get_rng_state(), own[0])
    torch.testing.assert_close(generator.get_state(), own[1])
    torch.testing.assert_close(list(layer.parameters()), before, rtol=0, atol=0)
    assert all(p.grad is None for p in layer.parameters())
    assert str(layer.gradient) == "full"
    assert layer.training


def test_a_seed_repeats_itself_and_another_differs() -> None:
    x = torch.ones(30, 2, 2)
    layer = bptt.nn.RNN(2, 3)
    variance = [only(compare(layer, x, policies=["randomized:0.9"], draws=5, seed=seed)).variance for seed in (1, 1, 2)]
    assert variance[0] == variance[1] != variance[2]


def test_times_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine where a step takes as long whenever it is walked."""
    Clock(monkeypatch, ahead=1.0, back=2.0)
    found = compare(
        bptt.nn.LSTM(4, 16, num_layers=2, kernel="cpu"),
        torch.randn(60, 4, 4),
        policies=["full", "chunked:10", "truncated:30", "randomized:0.9"],
        draws=2,
    )
    rows = {row.policy: row for row in found.rows}
    assert (found.T, found.B) == (60, 4)
    assert found.layer.startswith("LSTM(4, 16")
    assert list(rows) == ["full", "chunked:10", "truncated:30", "randomized:0.9"]
    tape = 2 * 4 * 60 * 4 * 16 * 6  # layers, bytes, T, B, H: h, c, and four gates
    assert tape < rows["full"].bytes < 3 * tape
    assert rows["truncated:30"].bytes > 2 * rows["full"].bytes
    steps = 4 * 2 * 60  # lanes, layers, T
    assert rows["full"].seconds == rows["chunked:10"].seconds == rows["randomized:0.9"].seconds == 3 * steps
    assert rows["truncated:30"].seconds == steps + 2 * 4 * 2 * (30 * 60 - 30 * 29 / 2)  # less before the first step


def test_the_layers_own_policy_is_among_them() -> None:
    layer, x = bptt.nn.GRU(2, 3, gradient="chunked:7"), torch.randn(20, 1, 2)
    found = compare(layer, x, policies=["full", "truncated:4"])
    assert [row.policy for row in found.rows] == ["full", "truncated:4", "chunked:7"]
    assert (found.own, found.trained_with) == ("chunked:7", found.rows[2])
    named = compare(layer, x, policies=["chunked:7", "full"])
    assert [row.policy for row in named.rows] == ["chunked:7", "full"]
    assert compare(torch.nn.GRU(2, 3), x, policies=["chunked:7"]).own == "full"


def test_policies_are_timed_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is ten times as slow for a while makes no policy look slow."""
    clock, passed = Clock(monkeypatch), OfLayer.training_pass
    order: list[str] = []

    def noted(of: OfLayer, policy: Any, seed: int) -> Callable[[], torch.Tensor]:
        run = passed(of, policy, seed)

        def once() -> torch.Tensor:
            before = clock.now
            result = run()
            order.append(str(policy))
            clock.now += 9 * (clock.now - before) if 8 < len(order) <= 14 else 0
            return result

        return once

    monkeypatch.setattr(OfLayer, "training_pass", noted)
    found = compare(bptt.nn.GRU(2, 8, kernel="cpu"), torch.randn(50, 2, 2), policies=["full", "chunked:10"], repeats=9)
    assert [row.time.samples for row in found.rows] == [9, 9]
    assert found.rows[0].seconds == pytest.approx(found.rows[1].seconds)
    assert not found.rows[0].time.apart(found.rows[1].time)


def test_a_disturbed_machine_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch, cores=0.6)
    found = compare(bptt.nn.GRU(2, 8, kernel="cpu"), torch.randn(50, 2, 2), policies=["full", "chunked:10"])
    assert (found.threads, found.cores, found.disturbed) == (1, 0.6, True)
    assert "nothing is said of time: the machine was disturbed" in bptt.flow.conclusion(found)


def test_peak_bytes() -> None:
    kept = torch.ones(1000)

    def steps() -> torch.Tensor:
        a = kept + 1  # 4000
        b = a * 2  # 8000
        del a
        view = b[10:]
        del b  # its memory lives on
        c = torch.ones(500)  # 6000
        return view.sum() + c.sum()

    assert peak_bytes(steps) == 8000
    assert peak_bytes(lambda: kept.add_(1).view(10, 100)) == 0


def test_bad_arguments() -> None:
    layer, x = bptt.nn.RNN(2, 3), torch.randn(4, 1, 2)
    with pytest.raises(ValueError, match=r"policies must name at least one: got none"):
        compare(layer, x, policies=[])
    with pytest.raises(ValueError, match=r"draws must be at least 2.*got 1"):
        compare(layer, x, draws=1)
    with pytest.raises(ValueError, match=r"repeats must be at least 5, for a median with its quartiles: got 4"):
        compare(layer, x, repeats=4)
    with pytest.raises(ValueError, match=r"gradient must be one of.*got 'half'"):
        compare(layer, x, policies=["half"])
    with pytest.raises(ValueError, match=r"the full gradient must be finite and not 0.*its norm is 0"):
        compare(layer, x, lambda y: 0 * y.sum())


def test_an_adaptive_policy_gets_the_window_that_the_batch_asks_for():
    torch.manual_seed(0)
    layer, x = bptt.nn.RNN(3, 8), torch.randn(40, 4, 3)
    row = only(compare(layer, x, policies="adaptive:0.5,max=30"))
    window = bptt.flow.adapted(layer, x, policy=bptt.Adaptive(0.5, 30)).window
    assert row.policy == f"adaptive:0.5,max=30,window={window}"
    assert window < 30
    assert row.bias == pytest.approx(compare(layer, x, policies=[f"truncated:{window}"]).rows[0].bias)


def test_a_sample_of_infinite_variance_is_marked():
    layer = bptt.nn.RNN(1, 1, nonlinearity="identity", dtype=torch.float64)
    layer.weight_hh_l0.data.fill_(0.9)
    rows = compare(
        layer, torch.ones(60, 1, 1, dtype=torch.float64), policies=["randomized:0.5", "randomized:0.95"]
    ).rows
    assert [row.reliable for row in rows] == [False, True, True]
