"""Padding, ended lanes, steps without a loss and resets are no data: nothing is concluded from them, nothing broken."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import bptt
from bptt.flow import by_lag, conclusion, lag_map, record, survey

WRONG = ("not finite", "infinite", "NaN", "explode", "the norm is 0")


def decaying(rate: float, H: int = 3, **options: Any) -> torch.nn.Module:
    """h_t = rate h_{t-1}: every loss halves every log 2 / -log rate steps, whatever the data."""
    layer = bptt.nn.RNN(2, H, nonlinearity="identity", dtype=torch.float64, **options)
    return bptt.nn.init.identity_(layer, rate)


def packed(lengths: list[int], width: int = 2) -> Any:
    x = torch.zeros(max(lengths), len(lengths), width, dtype=torch.float64)
    return pack_padded_sequence(x, lengths, enforce_sorted=False)


class Last(torch.nn.Module):
    """A classifier that reads the last state of every lane."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.rnn = layer

    def forward(self, x: Any) -> Tensor:
        final = self.rnn(x)[1]
        return (final if isinstance(final, Tensor) else final[0])[-1]


@pytest.mark.parametrize("cell", ["RNN", "GRU", "LSTM"])
def test_a_padded_classifier_is_healthy(cell: str) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 40, (64,), generator=generator)
    torch.manual_seed(0)
    x = pack_padded_sequence(torch.randn(39, 64, 4), lengths, enforce_sorted=False)
    model = torch.nn.Sequential(Last(getattr(bptt.nn, cell)(4, 16)), torch.nn.Linear(16, 2))
    y = torch.randint(0, 2, (64,))
    found = survey(model, x, lambda out: torch.nn.functional.cross_entropy(out, y), policies=["full", "chunked:5"])
    said = str(found.verdict)
    assert not any(word in said for word in WRONG), said
    assert "smaller recurrent weights" not in said
    assert "Nothing passes" not in said
    assert "8 of 64 lanes" in said
    assert found.lag_map is not None
    assert np.isfinite(found.lag_map.each[found.lag_map.there]).all()
    assert found.lag_map.lag[-1] + 1 == found.lag_map.T == lengths.max()
    assert found.comparison is not None


@pytest.mark.parametrize(
    "lengths",
    [[1, 30, 25, 8], [30, 25, 8, 1], [1, 1, 30, 1], [3, 60, 1, 17, 2, 44, 9, 30, 30, 5, 1]],
    ids=["first", "last", "most", "all sorts"],
)
@pytest.mark.parametrize("where", ["last state", "every step"])
def test_lanes_of_very_different_lengths_show_the_planted_rate(lengths: list[int], where: str) -> None:
    layer = decaying(0.8)
    if where == "last state":
        found = survey(Last(layer), packed(lengths), lambda h: h.sum(), policies=[])
    else:
        found = survey(layer, packed(lengths), policies=[])
    assert found.lags is not None
    assert found.jacobians is not None
    assert found.lyapunov is not None
    assert_allclose(found.lags.rate, 0.8, rtol=1e-9)
    size = 3**0.5 if where == "last state" else 1.0
    assert_allclose(found.lags.norm[0], size * 0.8 ** np.arange(max(lengths)), rtol=1e-9)
    assert_allclose(found.jacobians.norm[found.jacobians.there], 0.8, rtol=1e-9)
    assert_allclose(found.lyapunov.exponents, np.log(0.8), rtol=1e-9)
    assert found.verdict.headline.startswith("Gradients vanish: half is lost every 3.11 steps")
    assert "90 % arises within 10 st" in found.verdict.headline


def test_no_size_of_a_loss_is_taken_for_a_decay() -> None:
    """Contributions by hand: of 2, 4 and 8 at the last states of three lanes of lengths 1, 2 and 4."""
    layer = decaying(0.5, H=1)
    weights = torch.tensor([[2.0], [4.0], [8.0]], dtype=torch.float64)
    map = lag_map(Last(layer), packed([1, 2, 4]), lambda h: (h * weights).sum())
    lags = by_lag(map)
    assert_allclose(lags.norm[0], 14 / 3 * 0.5 ** np.arange(4.0))
    assert_allclose(lags.rate, 0.5)
    assert_array_equal(lags.sending[0], [3, 2, 1, 1])
    assert_array_equal(lags.losses, [3, 2, 1, 1])
    assert_array_equal(map.there[0].sum(1), [1, 2, 0, 4])


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("rate", [0.9, 1.0, 1.1])
def test_losses_of_very_different_sizes_show_the_planted_decay(rate: float, resets: bool) -> None:
    """The largest losses come early, where they cannot reach far, or in the lanes that are reset most often."""
    generator = torch.Generator().manual_seed(0)
    weights = 100 ** torch.rand(60, 4, 1, generator=generator, dtype=torch.float64)
    weights[:5] *= 1000
    closed = torch.rand(60, 4, generator=generator) < torch.tensor([0.0, 0.01, 0.1, 0.5])
    weights = weights * torch.tensor([1.0, 10.0, 100.0, 1000.0], dtype=torch.float64)[:, None]

    class Episodes(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = decaying(rate)

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x, resets=closed if resets else None)[0]

    map = lag_map(record(Episodes(), torch.zeros(60, 4, 2, dtype=torch.float64), lambda y: (y * weights).sum()))
    decay = rate ** np.arange(60.0)
    lags = by_lag(map)
    assert_allclose(lags.norm[0] / lags.norm[0, 0], decay, rtol=1e-9)
    for row in map.followed[0]:
        there = ~np.isnan(row)
        assert_allclose(row[there] / row[0], decay[: there.sum()], rtol=1e-9)


def test_a_scan_whose_losses_differ_in_size() -> None:
    weights = torch.logspace(3, -3, 40, dtype=torch.float64)[:, None]
    s = torch.ones(3, dtype=torch.float64)
    chain = bptt.flow.steps(lambda s, _: (0.8 * s, s), s, None, lambda y: (y * weights).sum(), length=40)
    lags = by_lag(lag_map(chain))
    assert_allclose(lags.norm[0] / lags.norm[0, 0], 0.8 ** np.arange(40.0), rtol=1e-9)


@pytest.mark.parametrize("step", [0, 1, 7, 29])
def test_all_losses_at_one_step(step: int) -> None:
    found = survey(decaying(0.5), torch.zeros(30, 3, 2, dtype=torch.float64), lambda y: y[step].sum(), policies=[])
    assert found.lags is not None
    assert found.lags.measured[0] == step + 1
    said = str(found.verdict)
    assert not any(word in said for word in WRONG), said
    if step == 0:
        assert found.verdict.headline.startswith("Only lag 0 was measured")
    elif step == 29:
        assert found.verdict.headline.startswith("Gradients vanish: each step keeps 50 %")
        assert "90 % arises within 3 steps" in found.verdict.headline


def test_a_loss_that_no_stride_meets_is_found() -> None:
    """Far more steps than losses walk: those that have one are taken, not every so many-th step."""
    x = torch.zeros(1001, 8, 2, dtype=torch.float64)
    for at in ([1000], [3, 1000], list(range(0, 1001, 2))):
        found = survey(decaying(0.5), x, lambda y, at=at: y[at].sum(), lags=32, policies=[])
        assert found.lags is not None
        assert_allclose(found.lags.rate, 0.5, rtol=1e-9)


@pytest.mark.parametrize("lanes", [1, 12])
def test_zero_cotangents_are_no_loss_and_no_error(lanes: int) -> None:
    found = survey(decaying(1.3), torch.zeros(20, lanes, 2, dtype=torch.float64), lambda y: 0 * y.sum())
    said = str(found.verdict)
    assert "no loss reaches" in found.verdict.headline
    assert "vanish" not in found.verdict.headline
    assert "not finite" not in said


def test_a_lane_with_the_only_loss_is_measured() -> None:
    found = survey(decaying(0.5), torch.zeros(20, 40, 2, dtype=torch.float64), lambda y: y[:, 33].sum(), policies=[])
    assert found.lags is not None
    assert_allclose(found.lags.rate, 0.5, rtol=1e-9)


def test_a_layer_that_no_loss_reaches_is_told_beside_one_that_one_does() -> None:
    """The loss reads the lower layer's final state alone."""

    class Lower(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = bptt.nn.GRU(2, 3, num_layers=2, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x)[1][0]

    lags = by_lag(lag_map(Lower(), torch.zeros(12, 2, 2, dtype=torch.float64), lambda h: h.sum()))
    assert conclusion(lags, 1) == "layer 1: no gradient flows: no loss reaches this layer"
    assert "vanish" in conclusion(lags, 0)


def test_directions_have_losses_of_their_own() -> None:
    """The final states of both: the forward one at the last step, the reverse one at the first."""

    class Ends(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = decaying(0.5, bidirectional=True)

        def forward(self, x: Any) -> Tensor:
            return self.rnn(x)[1]

    for x in (torch.zeros(10, 3, 2, dtype=torch.float64), packed([10, 4, 1])):
        map = lag_map(Ends(), x, lambda h: h.sum())
        assert map.there[1].any(1).tolist() == [True] + [False] * 9
        lags = by_lag(map)
        assert_allclose(lags.rate, 0.5, rtol=1e-9)
        assert_allclose(lags.norm, np.sqrt(3) * 0.5 ** np.broadcast_to(np.arange(10.0), (2, 10)), rtol=1e-9)


@pytest.mark.parametrize("rate", [0.7, 1.0])
def test_resets_shorten_lanes_and_nothing_else(rate: float) -> None:
    class Episodes(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = decaying(rate)

        def forward(self, x: Tensor) -> Tensor:
            resets = torch.zeros(x.shape[:2], dtype=torch.bool)
            resets[7::10, 0] = resets[3::20, 1] = True
            return self.rnn(x, resets=resets)[0]

    x = torch.zeros(60, 2, 2, dtype=torch.float64)
    lags = by_lag(lag_map(record(Episodes(), x, lambda y: y.sum())))
    assert lags.measured[0] == 20
    assert_allclose(lags.norm[0, :20], np.sqrt(3) * rate ** np.arange(20.0), rtol=1e-9)
    assert np.isnan(lags.norm[0, 20:]).all()
    assert conclusion(lags).startswith("Gradients vanish: half is lost" if rate < 1 else "Gradients hold")
    found = survey(Episodes(), x, lambda y: y.sum(), policies=[])
    assert "not finite" not in str(found.verdict)
    assert "Nothing passes" not in str(found.verdict)


def test_resets_at_every_step_leave_nothing_to_measure() -> None:
    class Closed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = bptt.nn.LSTM(2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x, resets=torch.ones(x.shape[:2], dtype=torch.bool))[0]

    found = survey(Closed(), torch.zeros(8, 2, 2), lambda y: y.sum(), policies=[])
    assert found.lyapunov is None
    assert "vanish" not in found.verdict.headline
    assert "not finite" not in str(found.verdict)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("lane", [0, 11, 50, 63])
def test_a_real_nan_is_found_in_any_lane(value: float, lane: int) -> None:
    lengths = [39 - lane % 20 for lane in range(64)]
    x = torch.randn(39, 64, 2, generator=torch.Generator().manual_seed(0))
    x[4, lane] = value
    model = bptt.nn.RNN(2, 3, nonlinearity="relu")
    found = survey(model, pack_padded_sequence(x, lengths, enforce_sorted=False), policies=[])
    assert "not finite" in found.verdict.headline
    assert "bptt.flow.watch" in found.verdict.advice[0]


def test_one_lane_that_overflows_is_found() -> None:
    """Finite states, an infinite adjoint: a relu net with a huge weight, on in one lane alone."""
    layer = bptt.nn.RNN(1, 1, nonlinearity="relu", bias=False)
    with torch.no_grad():
        layer.weight_hh_l0.fill_(30.0)
        layer.weight_ih_l0.fill_(1.0)
    x = torch.full((40, 20, 1), -1.0)
    x[:, 17] = 1e-30
    x[1:, 17] = 0
    found = survey(layer, x, lambda y: (y * 1e10).sum(), policies=[])
    assert "not finite" in str(found.verdict)


def test_a_scan_with_losses_here_and_there() -> None:
    """Two losses, the later one behind a reset: the state that enters step 12 is cut off before it is used."""
    resets = torch.zeros(20, dtype=torch.bool)
    resets[12] = True
    s = torch.ones(3, dtype=torch.float64)
    chain = bptt.flow.steps(lambda s, _: (0.5 * s, s), s, None, lambda y: y[[5, 19]].sum(), length=20, resets=resets)
    lags = by_lag(lag_map(chain))
    assert_array_equal(lags.sending[0], [2] * 6 + [1, 1] + [0] * 12)
    assert_allclose(lags.norm[0, :7], np.sqrt(3) * 0.5 ** np.arange(7.0), rtol=1e-9)


def test_a_sample_keeps_what_a_lane_restarts_from() -> None:
    """Padded lanes with resets, from states of their own at every step: the lanes alone say the same."""
    lengths, T = [3, 9, 1, 6], 9
    generator = torch.Generator().manual_seed(3)
    restart = torch.randn(T, 1, 4, 3, dtype=torch.float64, generator=generator)
    resets = torch.rand(T, 4, generator=generator) < 0.3

    class Restarted(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = bptt.nn.GRU(2, 3, dtype=torch.float64)

        def forward(self, x: Any) -> Tensor:
            return self.rnn(x, resets=resets, reset_state=restart)[0].data

    recording = record(Restarted(), packed(lengths), lambda y: y.sum())
    for count in (1, 2, 3, 4):
        part = recording.sample(count)
        assert part.T == 9
        chosen = part.lengths.tolist()
        y, whole = part.tapes()[0].state[0], recording.tapes()[0].state[0]
        for lane, length in enumerate(chosen):
            assert_allclose(y[:length, lane].numpy(), whole[:length, lengths.index(length)].numpy())
    short = recording.lanes(torch.tensor([0, 2])).sample(2)
    assert short.T == 3
    assert_allclose(short.tapes()[0].state[0][:, 0].numpy(), recording.tapes()[0].state[0][:3, 0].numpy())
