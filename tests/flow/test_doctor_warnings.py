"""What the doctor warns of before anything is infinite, and what it stays silent about."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import bptt
from bptt.flow import Finding, watch

from .test_doctor import CELLS, Model, ids


def steps(model: Model, count: int, carry: Any, state: Any = None, **options: Any) -> list[Finding]:
    """Train with `carry` from the final state to the next initial one; what was told."""
    told: list[Finding] = []
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
    with watch(model, tell=told.append, **options) as doctor:
        for _ in range(count):
            optimiser.zero_grad()
            out, final = model(ids(), state)
            loss = out.square().sum()
            loss.backward(retain_graph=True)
            assert doctor.check(loss) is None
            state = carry(final)
    return told


def detach(final: Any) -> Any:
    return final.detach() if isinstance(final, Tensor) else tuple(s.detach() for s in final)


@pytest.mark.parametrize("library", [bptt.nn, torch.nn])
@pytest.mark.parametrize("cell", CELLS)
def test_a_state_that_is_still_attached(cell: str, library: Any):
    [finding] = steps(Model(cell, library), 4, lambda final: final)
    assert (finding.kind, finding.module) == ("attached", "recurrent")
    assert "detach" in finding.message
    kept = (lambda s: 0.9 * s) if cell != "LSTM" else (lambda s: (s[0] * 1, s[1].clone()))
    [finding] = steps(Model(cell, library), 4, kept)  # through other operations too
    assert finding.kind == "attached"


@pytest.mark.parametrize("cell", CELLS)
def test_a_state_that_is_detached_is_nothing_to_tell(cell: str):
    assert steps(Model(cell), 12, detach, carries=True) == []


def test_an_initial_state_with_a_gradient_of_its_own_step_is_nothing_to_tell():
    class EncoderDecoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start = torch.nn.Parameter(torch.randn(1, 1, 5))
            self.encoder, self.decoder = bptt.nn.GRU(3, 5), bptt.nn.GRU(3, 5)

        def forward(self, x: Tensor) -> Tensor:
            _, h = self.encoder(x, self.start.expand(-1, x.shape[1], -1))
            return self.decoder(x, torch.tanh(h))[0]

    model, told = EncoderDecoder(), []
    with watch(model, tell=told.append) as doctor:
        for _ in range(4):
            loss = model(torch.randn(6, 2, 3)).sum()
            loss.backward()
            assert doctor.check(loss) is None
    assert told == []


@pytest.mark.parametrize("cell", CELLS)
def test_a_state_that_is_dropped_is_told_where_it_should_be_carried(cell: str):
    [finding] = steps(Model(cell), 9, lambda final: None, carries=True)
    assert (finding.kind, finding.module, finding.value) == ("dropped", "recurrent", 8.0)
    zero = (lambda f: torch.zeros_like(f)) if cell != "LSTM" else (lambda f: tuple(torch.zeros_like(s) for s in f))
    assert [f.kind for f in steps(Model(cell), 9, zero, carries=True)] == ["dropped"]
    assert steps(Model(cell), 7, lambda final: None, carries=True) == []
    assert steps(Model(cell), 20, lambda final: None) == []  # independent sequences


def test_a_fresh_start_now_and_then_is_no_drop():
    count = iter(range(100))
    assert steps(Model("GRU"), 30, lambda f: None if next(count) % 2 else f.detach(), carries=True) == []


def test_a_spike_of_the_gradient_norm():
    told: list[Finding] = []
    doctor = watch(Model("GRU"), tell=told.append)
    for norm in [1.0] * 31 + [99.0, 1000.0, 1000.0]:
        assert doctor.check(1.0, grad_norm=norm) is None
    [finding] = told
    assert (finding.kind, finding.stage, finding.value) == ("explosion", "parameter gradient", 1000.0)


def examined(layer: torch.nn.Module, T: int, loss: Any, scale: float = 0.0) -> tuple[Any, list[Finding]]:
    told: list[Finding] = []
    with watch(layer, tell=told.append) as doctor:
        value = loss(layer(scale * torch.randn(T, 3, 2))[0])
        value.backward()
        assert doctor.check(value) is None
        first, again = doctor.examine(), doctor.examine()
    assert first.findings == again.findings == tuple(told)  # told once
    return first, told


@pytest.mark.parametrize("loss", [lambda y: y.sum(), lambda y: y[-1].sum()], ids=["every step", "the last step"])
def test_vanishing_with_its_horizon(loss: Any):
    """A linear net with W = a I: 1 - a^(n+1) of the sum arises within n steps."""
    layer = bptt.nn.init.identity_(bptt.nn.RNN(2, 4, nonlinearity="identity"), 0.5)
    examination, [finding] = examined(layer, 100, loss)
    assert (finding.kind, finding.layer, finding.value) == ("vanishing", "layer 0", 6.0)  # 1 - 2^-7 > 0.99
    assert "99 % of it arises within 6 of 100 steps (90 % within 3)" in finding.message
    assert examination.horizon == 3
    torch.testing.assert_close(float(examination.lags[""].rate[0]), 0.5)


def test_a_long_horizon_is_nothing_to_tell():
    layer = bptt.nn.init.identity_(bptt.nn.RNN(2, 4, nonlinearity="identity"), 0.9)
    examination, told = examined(layer, 60, lambda y: y.sum())
    assert told == []
    assert examination.horizon == 21  # 1 - 0.9^22 > 0.9 (1 - 0.9^60)


@pytest.mark.parametrize("keeps", [0.999, 1.0])
def test_a_window_of_which_few_lags_are_measured_is_not_said_to_vanish(keeps: float):
    """128 lags are less than a tenth of it, wherever the gradient arises."""
    layer = bptt.nn.init.identity_(bptt.nn.RNN(2, 4, nonlinearity="identity"), keeps)
    examination, told = examined(layer, 1400, lambda y: y.sum() / 1400)
    assert told == []
    assert examination.settled is False


def test_resets_are_no_vanishing():
    layer = bptt.nn.init.identity_(bptt.nn.RNN(2, 4, nonlinearity="identity"), 0.98)
    resets = (torch.arange(200) % 10 == 0)[:, None].expand(200, 3)
    with watch(layer) as doctor:
        value = layer(torch.randn(200, 3, 2), resets=resets)[0].sum()
        value.backward()
        assert doctor.check(value) is None
        assert doctor.examine().findings == ()


def test_a_growth_that_levels_off_is_told_with_the_rate_at_its_end():
    """[[a, b], [0, a]]^n grows by n b at first, then by a alone."""
    layer = bptt.nn.RNN(1, 2, nonlinearity="identity", bias=False)
    layer.weight_hh_l0.data = torch.tensor([[1.001, 300.0], [0.0, 1.001]])
    with watch(layer, tell=lambda finding: None) as doctor:
        value = layer(torch.zeros(60, 2, 1))[0][..., 0].sum()
        value.backward()
        doctor.check(value)
        [finding] = doctor.examine().findings
    assert "59 steps back it is 1.88e+04 times as large, and there it grows 1.03 times per step" in finding.message


def test_explosion_before_it_is_infinite():
    layer = bptt.nn.init.identity_(bptt.nn.RNN(2, 4, nonlinearity="identity"), 1.3)
    _, [finding] = examined(layer, 40, lambda y: y.sum())
    assert (finding.kind, finding.stage) == ("explosion", "adjoint")
    torch.testing.assert_close(finding.value, 1.3)


@pytest.mark.parametrize(("cell", "gate", "bias"), [("LSTM", "i", -9.0), ("LSTM", "f", -9.0), ("GRU", "r", 9.0)])
def test_saturated_gates(cell: str, gate: str, bias: float):
    layer = getattr(bptt.nn, cell)(2, 4)
    row = {"i": 0, "f": 4, "r": 0}[gate]
    with torch.no_grad():
        layer.bias_ih_l0[row : row + 4] = bias
    examination, _ = examined(layer, 20, lambda y: y.sum(), scale=1.0)
    assert [(f.kind, f.gate, f.value) for f in examination.findings] == [("saturation", gate, 1.0)]


def test_open_forget_gates_and_a_dead_relu_are_not_called_saturated():
    for layer in (bptt.nn.init.forget_bias_(bptt.nn.LSTM(2, 4), 9.0), bptt.nn.RNN(2, 4, nonlinearity="relu")):
        examination, _ = examined(layer, 20, lambda y: y.sum(), scale=1.0)
        assert not [f for f in examination.findings if f.kind == "saturation"]


def test_nothing_is_measured_where_nothing_came_back():
    layer = bptt.nn.GRU(2, 3)
    with watch(layer) as doctor:
        assert doctor.examine().horizon is None
        layer(torch.zeros(4, 1, 2))
        assert doctor.examine().lags == {}
        with torch.no_grad():
            layer(torch.zeros(9, 1, 2))
        layer(torch.full((4, 1, 2), torch.nan))[0].sum().backward()
        assert doctor.check(1.0) is not None
        assert doctor.examine().lags == {}


def test_warnings_go_to_python_by_default():
    with watch(bptt.nn.init.identity_(bptt.nn.RNN(2, 3), 0.1)) as doctor:
        doctor.model(torch.zeros(40, 2, 2))[0].sum().backward()
        doctor.check(1.0)
        with pytest.warns(UserWarning, match="the gradient vanishes"):
            doctor.examine()


def test_the_state_of_a_doctor_goes_on_in_another():
    told: list[Finding] = []
    first = watch(Model("GRU"), tell=told.append)
    for _ in range(32):
        first.check(1.0, grad_norm=1.0)
    second = watch(Model("GRU"), tell=told.append)
    second.restore(first.state())
    assert second.state() == first.state()
    second.check(1.0, grad_norm=500.0)
    assert [f.kind for f in told] == ["explosion"]
    third = watch(Model("GRU"), tell=told.append)
    third.restore(second.state())
    third.check(1.0, grad_norm=500.0)
    assert len(told) == 1
