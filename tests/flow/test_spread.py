"""The headline's rate: one quantity, with its spread over lanes and losses, and what it means in plain words."""

import datetime
import re

import numpy as np
import torch
from numpy.testing import assert_allclose

import bptt
from bptt.flow import by_lag, conclusion, lag_map, survey, verdict
from bptt.flow._spread import halves, rates

T = 40


def two_rates(*kept: float) -> bptt.nn.RNN:
    """Unit i keeps kept[i] of itself a step."""
    layer = bptt.nn.RNN(1, len(kept), nonlinearity="identity", dtype=torch.float64)
    with torch.no_grad():
        layer.weight_hh_l0.copy_(torch.diag(torch.tensor(kept, dtype=torch.float64)))
    return layer


def weighed(weights: torch.Tensor):
    return lambda y: (y * weights).sum()


def test_each_lane_has_its_own_rate() -> None:
    """Lane 0 asks for the unit that keeps 0.9, lane 1 for the one that keeps 0.8."""
    ask = torch.eye(2, dtype=torch.float64)
    map = lag_map(two_rates(0.9, 0.8), torch.zeros(T, 2, 1, dtype=torch.float64), weighed(ask))
    lags = by_lag(map)
    assert_allclose(map.lane_norm[0], np.array([[0.9], [0.8]]) ** np.arange(T), rtol=1e-12)
    assert_allclose(rates(lags, 0).lanes, [0.9, 0.8])
    assert "half is lost every 6" in conclusion(lags)
    assert "(mean of this batch; lanes 3.11 to 6.58, 8 in 10 late losses" in conclusion(lags)


def test_each_loss_has_its_own_half_life() -> None:
    """Of the 20 losses that reach 20 lags, half ask for what is halved in 14 steps, half for what is halved in one."""
    late = torch.eye(2, dtype=torch.float64)[(torch.arange(T) % 2)][:, None]
    x = torch.zeros(T, 2, 1, dtype=torch.float64)
    lags = by_lag(lag_map(two_rates(0.5, 0.95), x, weighed(late), lags=20))
    found = halves(lags, 0)
    half = int(np.flatnonzero(lags.norm[0] <= 0.5 * lags.norm[0, 0])[0])
    assert len(found.losses) == T - 2 * half  # the first ones end before twice the mean's half-life
    assert set(found.losses.tolist()) == {1.0, 14.0 if 2 * half >= 14 else np.inf}
    assert (found.all_lanes, found.all_losses) == (True, False)


def test_lanes_and_losses_that_are_alike_are_said_to_be() -> None:
    lags = by_lag(lag_map(two_rates(0.9, 0.9), torch.zeros(T, 3, 1, dtype=torch.float64)))
    assert "half is lost every 6.58 steps (mean of this batch, lanes and late losses alike)" in conclusion(lags)


def test_a_scan_has_lanes_too() -> None:
    kept = torch.tensor([[0.9], [0.8]]).expand(T, 2, 1)
    loss = torch.sum  # of outputs that are read off the carry before the step
    chain = bptt.flow.steps(lambda h, x: (h * x, h * x), torch.ones(2, 1), kept, loss, rows="independent")
    assert_allclose(lag_map(chain).lane_norm[0], np.array([[0.9], [0.8]]) ** np.arange(1, T + 1), rtol=1e-4)


def test_a_line_that_begins_behind_lag_0_says_so() -> None:
    """Half of it is gone at once, and then 5 % a step: the rate is the line's, and where that begins is said."""
    layer = two_rates(0.0, 0.95)
    ask = torch.tensor([3.0, 1.0], dtype=torch.float64)
    lags = by_lag(lag_map(layer, torch.zeros(120, 2, 1, dtype=torch.float64), weighed(ask)))
    assert conclusion(lags).startswith("Gradients vanish: from lag 1 on half is lost every 13.5 steps")
    assert "from one step back on half is lost every 13.5 steps" in verdict(lags).plain


def test_rates_of_steps_that_are_alike_agree_and_those_that_are_not_may_differ() -> None:
    layer = two_rates(0.9, 0.9)
    x = torch.zeros(T, 2, 1, dtype=torch.float64)
    said = dict(survey(layer, x, policies=[]).verdict.findings)["rates"]
    assert re.match(r"by lag 0\.9 a step, .*; exponent 0\.9, .*; product 0\.9, .*: they agree", said)
    layer = two_rates(0.5, 0.95)  # the losses ask for what fades fast, the product tells of what fares best
    ask = torch.tensor([1.0, 0.0], dtype=torch.float64)
    said = dict(survey(layer, x, weighed(ask), policies=[]).verdict.findings)["rates"]
    assert re.match(r"by lag 0\.5 a step, .*; exponent 0\.95, .*; product 0\.95, .*: they differ, as they may", said)


def test_the_plain_words_hold_the_planted_truth() -> None:
    x = torch.zeros(100, 2, 1, dtype=torch.float64)

    def said(kept: float) -> str:
        return survey(two_rates(kept, kept), x, policies=[]).verdict.plain

    assert "its gradient fades: half is lost every 6.58 steps (mean of this batch, lanes and late losses al" in said(
        0.9
    )
    assert "within 21 steps of the loss, 99 % within 43 (100 steps were measured)" in said(0.9)
    assert "over 79 steps at least; 100 steps were measured, too few" in said(0.985)
    assert "grows: it doubles every 14.2 steps" in said(1.05)
    assert "it is 125 times as large" in said(1.05)
    assert "hardly changes: 99 steps before the loss 100 % of it is left" in said(1.0)
    assert not any(word in said(0.9) for word in ("adjoint", "Jacobian", "Lyapunov", "norm", "lag "))


def test_the_setting_says_what_was_measured_on_what() -> None:
    layer = bptt.nn.LSTM(3, 5, num_layers=2, gradient="truncated:7")
    x = torch.nn.utils.rnn.pack_padded_sequence(torch.zeros(12, 3, 3), [12, 9, 4])
    setting = survey(layer, x, lambda y: y.data.sum(), policies=[], data="zeros", seed=3).setting
    said = dict(setting.entries)
    count = sum(p.numel() for p in layer.parameters())
    assert said["net"] == f"LSTM: 2 layers of 5 units on 3 inputs, {count} parameters"
    assert said["data"] == f"zeros; measured {datetime.date.today().isoformat()}"
    assert (said["window"], said["lanes"], said["seed"]) == ("12 steps, lanes of 4 to 12", "3", "3")
    assert "gradient=truncated:7 in training" in said["policy"]
    assert said["versions"] == f"bptt {bptt.__version__}, torch {torch.__version__}"
    noise = survey(bptt.nn.RNN(2, 3), torch.zeros(4, 20, 2), policies=[]).setting
    assert noise.lanes == "8 of 20"
    assert "random errors" in noise.data
    assert noise.seed == ""
