"""A horizon is told as the net's only where the window does not make it: linear nets whose horizon is known."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

import bptt
from bptt.flow import Lags, by_lag, conclusion, lag_map, verdict


def measured(rates: dict[float, int], T: int) -> Lags:
    """A linear net with so many directions of each rate, in a window of T steps."""
    return _measured(tuple(rates.items()), T)


@cache
def _measured(rates: tuple[tuple[float, int], ...], T: int) -> Lags:
    diagonal = [rate for rate, count in rates for _ in range(count)]
    layer = bptt.nn.RNN(1, len(diagonal), nonlinearity="identity", dtype=torch.float64)
    with torch.no_grad():
        layer.weight_hh_l0.copy_(torch.diag(torch.tensor(diagonal, dtype=torch.float64)))
    return by_lag(lag_map(layer, torch.zeros(T, 2, 1, dtype=torch.float64), lambda y: y.sum(), lags=T))


def true_horizon(rates: dict[float, int], part: float) -> int:
    lag = np.arange(200_000.0)
    norm = np.sqrt(sum(count * rate ** (2 * lag) for rate, count in rates.items()))
    return int(np.argmax(np.cumsum(norm) >= part * norm.sum() * (1 - 1e-9)))


NETS = [
    *({rate: 1} for rate in (0.3, 0.5, 0.8, 0.9, 0.95, 0.97, 0.99, 0.995)),
    {0.5: 8, 0.97: 1},
    {0.5: 100, 0.99: 1},
    {0.9: 20, 0.99: 2},
    {0.2: 1, 0.4: 1, 0.6: 1, 0.8: 1, 0.9: 1, 0.95: 1, 0.98: 1},
]


@pytest.mark.parametrize("part", [0.9, 0.99])
@pytest.mark.parametrize("rates", NETS, ids=str)
def test_a_settled_horizon_is_the_nets_and_another_is_a_bound(rates: dict[float, int], part: float) -> None:
    truth, told = true_horizon(rates, part), []
    for T in (3, 10, 20, 40, 64, 128, 256, 512):
        lags = measured(rates, T)
        found = int((lags.horizon_90 if part == 0.9 else lags.horizon_99)[0])
        settled = bool(lags.settled(part)[0])
        assert found <= truth
        if settled:
            assert truth - found <= max(1.0, 0.05 * truth)
        told.append(settled)
        if 6 * truth < T and T >= 40:
            assert settled, (T, truth)  # what can be known is said
        if truth >= T:
            assert not settled


@pytest.mark.parametrize("rate", [1.0, 0.9999, 1.05])
def test_a_net_that_does_not_forget_has_no_horizon(rate: float) -> None:
    for T in (10, 100, 300):
        assert not measured({rate: 2}, T).settled().any()


def test_the_sentence_carries_its_window() -> None:
    assert "90 % arises within at least 48 steps (measured in 64 steps; measure longer)" in conclusion(
        measured({0.97: 3}, 64)
    )
    assert conclusion(measured({0.97: 3}, 512)).endswith("; 90 % arises within 75 steps (measured in 512 steps)")


def test_a_rate_is_told_where_the_decay_is_a_straight_line() -> None:
    straight, bent = measured({0.97: 3}, 128), measured({0.5: 100, 0.99: 1}, 128)
    assert straight.straight.all()
    assert not bent.straight.any()
    assert conclusion(straight).startswith("Gradients vanish: half is lost every 22.8 steps")
    said = conclusion(bent)
    assert said.startswith("Gradients vanish, at no steady rate: half is lost within 2 steps")
    assert ", 2.8 % is left after 127" in said
    assert "every" not in said


def test_a_product_that_keeps_most_does_not_vanish() -> None:
    layer = bptt.nn.init.identity_(bptt.nn.RNN(1, 3, nonlinearity="identity"), 0.795 ** (1 / 63))
    said = conclusion(bptt.flow.products(layer, torch.zeros(64, 1, 1)))
    assert "vanish" not in said
    assert said.startswith("The product of 63 Jacobians keeps lengths to within a factor of 2: its norm is 0.795")
    assert said.endswith("(along lane 0)")


def test_two_rates_are_told_apart() -> None:
    x = torch.zeros(128, 2, 1, dtype=torch.float64)
    layer = bptt.nn.init.identity_(bptt.nn.RNN(1, 3, nonlinearity="identity", dtype=torch.float64), 0.97)
    found = verdict(by_lag(lag_map(layer, x)), bptt.flow.lyapunov(layer, x))
    (said,) = (text for topic, text in found.findings if topic == "rates")
    assert re.match(r"by lag 0\.97 a step, .*; exponent 0\.97, .*: they agree, as they must where", said)
    with torch.no_grad():
        layer.weight_hh_l0.copy_(torch.diag(torch.tensor([0.5, 0.5, 0.99], dtype=torch.float64)))
        layer.weight_hh_l0[2, 2] = 0.99
    mixed = verdict(by_lag(lag_map(layer, x, lambda y: (y * torch.tensor([50.0, 50.0, 1.0])).sum())),
                    bptt.flow.lyapunov(layer, x))  # fmt: skip
    (said,) = (text for topic, text in mixed.findings if topic == "rates")
    assert said.startswith("by lag no one rate")
    assert "they differ, as they may" in said


def test_a_gru_that_remembers_is_not_told_to_learn_more_slowly() -> None:
    """Update gates at 1 on every step: gradients hold, and there is nothing to change."""
    layer = bptt.nn.GRU(2, 4)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.mul_(0.01)
        layer.bias_ih_l0[4:8] = 9.0  # z
    found = bptt.flow.survey(layer, torch.randn(60, 3, 2), policies=[])
    assert found.gates is not None
    assert "which is memory" in conclusion(found.gates)
    assert found.verdict.advice == ()
    assert "\nNothing to change\n" in str(found.verdict)


@pytest.mark.parametrize("rate", [0.8, 0.97])
def test_the_doctor_says_whether_the_window_made_its_horizon(rate: float) -> None:
    layer = bptt.nn.init.identity_(bptt.nn.RNN(2, 4, nonlinearity="identity"), rate)
    with bptt.flow.watch(layer, tell=lambda finding: None) as doctor:
        loss: Tensor = layer(torch.zeros(64, 3, 2))[0].sum()
        loss.backward()
        doctor.check(loss)
        found = doctor.examine()
    assert found.settled == (rate == 0.8)
    if found.settled:
        assert found.horizon == math.ceil(math.log(0.1) / math.log(rate)) - 1


def test_advice_goes_by_the_horizon_and_not_by_the_first_halving() -> None:
    """Halved at once, and yet 90 % takes some 90 steps: no reason to begin anew, saturated gates or not."""
    lags = measured({0.5: 100, 0.98: 1}, 512)
    assert lags.settled().all()
    assert lags.horizon_90[0] >= 66
    gates = bptt.flow.gates(bptt.nn.init.identity_(bptt.nn.RNN(1, 2), 0.0), torch.full((9, 1, 1), 1e6))
    assert conclusion(gates).startswith("Saturated: 100 %")
    assert verdict(lags, gates).advice == ()
    assert len(verdict(measured({0.5: 1}, 512), gates).advice) == 3


@pytest.mark.parametrize("distance", [2, 5, 20])
@pytest.mark.parametrize("nonlinearity", ["identity", "relu"])
def test_a_copy_over_a_known_distance_ends_there(distance: int, nonlinearity: str) -> None:
    """A shift register: the loss reads what came in `distance` - 1 steps ago. Gradients hold on the way, and end."""
    layer = bptt.nn.RNN(1, distance, nonlinearity=nonlinearity, bias=False)
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
        layer.weight_ih_l0[0] = 1.0
        layer.weight_hh_l0[range(1, distance), range(distance - 1)] = 1.0
    found = bptt.flow.survey(layer, torch.ones(64, 2, 1), lambda y: y[distance:, :, -1].sum(), policies=[])
    assert found.verdict.headline == (
        f"Gradients end at lag {distance - 1}: nothing arrives beyond it; "
        f"90 % arises within {math.ceil(0.9 * distance) - 1} step{'s' if distance > 2 else ''} (measured in 64 steps)"
    )
    assert found.lyapunov is not None
    assert conclusion(found.lyapunov) == "Every perturbation dies completely"


def test_a_line_is_told_only_where_the_curve_keeps_to_it() -> None:
    """The lower of two layers: what comes down from above grows first. A rate fitted behind that is not the whole."""
    lag = np.arange(100.0)
    norm = np.where(lag < 10, 1 + 0.2 * lag, 2.8 * 0.98 ** (lag - 10))[None]
    lags = Lags(("h",), lag.astype(int), norm, np.full(100, 9), np.array([0.98]), np.zeros(1), np.array([80]),
                np.array([97]), np.array([False]))  # fmt: skip
    assert not lags.straight.any()
    assert "every" not in conclusion(lags)


@pytest.mark.parametrize(("rate", "T"), [(0.8, 10), (0.95, 12), (0.97, 64)])
def test_nothing_to_change_is_not_said_of_what_is_not_known(rate: float, T: int) -> None:
    (advice,) = verdict(measured({rate: 3}, T)).advice
    said = f"In {T} steps the horizon has not settled: measure longer sequences before anything is changed"
    assert advice == said
    assert said not in verdict(measured({rate: 3}, 512)).advice
    assert verdict(measured({1.0: 3}, T)).advice == ()


def test_a_window_is_recommended_only_where_the_weights_lose_little() -> None:
    """Losses of both signs: their near parts cancel in the weights' gradient, and what is left came from afar."""
    layer = bptt.nn.init.identity_(bptt.nn.RNN(1, 1, nonlinearity="identity", dtype=torch.float64), 0.8)
    with torch.no_grad():
        layer.weight_ih_l0.fill_(1.0)
    x = torch.zeros(200, 1, 1, dtype=torch.float64)
    x[0] = 1e6
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(100)[:, None, None]

    def loss(y: Tensor) -> Tensor:
        return (y[60:] * signs[60:]).sum()

    found = bptt.flow.survey(layer, x, loss, policies=[])
    windows = re.findall(r"truncated:(\d+)", str(found.verdict))
    full = gradient_of(layer, x, loss, "full")
    for window in windows:
        assert abs(gradient_of(layer, x, loss, f"truncated:{window}") / full - 1) <= 0.05
    assert "truncated:21" in str(verdict(measured({0.8: 1}, 200)))  # by lag alone


def gradient_of(layer: torch.nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor], policy: str) -> float:
    with bptt.using(layer, gradient=policy):
        (found,) = torch.autograd.grad(loss(layer(x)[0]), [layer.weight_hh_l0])
    return float(found)
