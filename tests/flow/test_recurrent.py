"""A `bptt.nn.Recurrent` and scans of any step, measured as layers are: against the layers, and planted faults found."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import bptt
from bptt import flow
from bptt.flow import Finding

T, B, I, H = 14, 3, 3, 4
F64 = torch.float64


def square(y: Tensor) -> Tensor:
    return y.square().mean()


def twins(kind: str, **options: Any) -> tuple[bptt.nn.Recurrent, Any]:
    """A layer of torch's cell, and the layer of bptt.nn with the same weights."""
    cell = getattr(nn, f"{kind}Cell")(I, H, dtype=F64)
    layer = getattr(bptt.nn, kind)(I, H, dtype=F64, **options)
    layer.load_state_dict({f"{name}_l0": p for name, p in cell.named_parameters()})
    return bptt.nn.Recurrent(cell, **options), layer


def stack(**options: Any) -> bptt.nn.Recurrent:
    return bptt.nn.Recurrent(lambda n: nn.LSTMCell(H if n else I, H, dtype=F64), 2, **options)


class Model(nn.Module):
    """A layer of any cell with something above it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.above = layer, nn.Linear(H, 2, dtype=F64)

    def forward(self, x: Tensor, hx: Any = None) -> Tensor:
        return self.above(self.layer(x, hx)[0])


def data(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=F64)


# The same as of a layer ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_policies_are_those_of_the_layer(kind: str) -> None:
    policies = ["full", "chunked:5", "truncated:4", "truncated:6/3"]
    found, expected = (flow.compare(layer, data(T, B, I), square, policies=policies) for layer in twins(kind))
    assert [row.policy for row in found.rows] == policies
    for f, e in zip(found.rows, expected.rows, strict=True):
        assert_allclose([f.bias, f.cosine], [e.bias, e.cosine], rtol=1e-9, atol=1e-12)
    assert_allclose(found.full_norm, expected.full_norm, rtol=1e-12)
    assert found.own == "full"


def test_random_policies_are_those_of_the_layer() -> None:
    x = data(4, 1, I)
    found, expected = (flow.compare(layer, x, square, policies=["randomized:0.7"]) for layer in twins("GRU"))
    assert found.rows[0].exact
    assert_allclose(found.rows[0].variance, expected.rows[0].variance, rtol=1e-9)


def test_the_map_has_the_lags_of_the_layer_but_the_first() -> None:
    """Of a layer, y_t is the state after step t, and lag 0; here lag 0 is the carry that step t received."""
    layer, built_in = twins("GRU")
    found, expected = (flow.lag_map(of, data(T, B, I), square) for of in (layer, built_in))
    for t in range(1, T):
        assert_allclose(found.norm[0, t, :t], expected.norm[0, t, 1 : t + 1], rtol=1e-9)
    assert found.layers == ("carry",)


@pytest.mark.parametrize("kind", ["RNN", "LSTM"])
def test_jacobians_and_exponents_are_those_of_the_layer(kind: str) -> None:
    layers, x = twins(kind), data(T, B, I)
    found, expected = (flow.jacobians(layer, x, square) for layer in layers)
    assert_allclose(found.norm, expected.norm, rtol=1e-9)
    assert_allclose(found.t, expected.t + 1)
    found, expected = (flow.lyapunov(layer, x, square) for layer in layers)
    assert_allclose(found.exponents, expected.exponents, rtol=1e-9)
    product = flow.products(layers[0], x, square, steps=3)
    J = [flow.products(layers[1], x, square, start=0, steps=n).log_singular[-1] for n in (0,)]
    assert_allclose(product.log_singular[0], J[0], atol=1e-12)


def test_padding_is_measured_nowhere() -> None:
    lengths = [T, 9, 5]
    packed = pack_padded_sequence(data(T, B, I), torch.tensor(lengths))
    layer, built_in = twins("GRU")
    found, expected = (flow.jacobians(of, packed, lambda y: y.data.square().mean()) for of in (layer, built_in))
    assert_allclose(found.norm, expected.norm, rtol=1e-9)
    np.testing.assert_array_equal(found.there, expected.there)
    maps = [flow.lag_map(of, packed, lambda y: y.data.square().mean()) for of in (layer, built_in)]
    for t in range(1, T):
        assert_allclose(maps[0].norm[0, t, :t], maps[1].norm[0, t, 1 : t + 1], rtol=1e-9)


def test_a_final_state_is_an_error_of_the_last_step() -> None:
    """The cotangent of h_n and the same one of the last y are the same error."""
    layer, x = twins("GRU")[0], data(T, B, I)

    class Last(nn.Module):
        def __init__(self, final: bool) -> None:
            super().__init__()
            self.layer, self.final = layer, final

        def forward(self, x: Tensor) -> Tensor:
            y, h = self.layer(x)
            return h[0] if self.final else y[-1]

    by_state, by_y = (flow.record_scan(Last(final), x, square) for final in (True, False))
    torch.testing.assert_close(by_state.chain.errors, by_y.chain.errors)
    assert not by_y.chain.errors[:-1].any()


def test_a_stack_is_one_state_and_a_survey_says_what_it_measured() -> None:
    layer = stack(gradient="truncated:5")
    found = flow.survey(Model(layer), data(T, B, I), square, policies=["chunked:5"])
    assert found.lag_map is not None
    assert found.comparison is not None
    assert (found.spectrum, found.gates, found.shares, found.cell_path) == (None, None, None, None)
    assert found.jacobians is not None
    assert found.jacobians.norm.shape == (T, B)
    assert [row.policy for row in found.comparison.rows] == ["chunked:5", "truncated:5"]
    assert "16 numbers in the carry" in found.setting.net
    assert "orthogonal_" not in str(found.verdict)


def test_the_advised_window_covers_the_lags_it_names() -> None:
    layer, x = twins("RNN")[0], data(60, B, I)
    with torch.no_grad():
        nn.init.orthogonal_(layer.cells[0].weight_hh).mul_(0.3)
    found = flow.survey(layer, x, square, policies=[])
    assert found.lags is not None
    window = int(found.lags.horizon_99.max()) + 2
    assert f'gradient="truncated:{window}" loses next to nothing' in str(found.verdict)
    assert flow.compare(layer, x, square, policies=[f"truncated:{window}"]).rows[0].bias < 0.02


def test_a_scan_of_a_step_is_measured_as_the_layer_is() -> None:
    layer, x = twins("GRU")[0], data(T, B, I)
    cell = layer.cells[0]

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = cell(x, h)
        return h, h

    scan = flow.scanned(step, torch.zeros(B, H, dtype=F64), x, lambda carry, ys: square(ys))
    assert_allclose(flow.lag_map(scan).norm, flow.lag_map(layer, x, square).norm, rtol=1e-9)
    assert_allclose(flow.products(scan).singular, flow.products(layer, x, square).singular, rtol=1e-9)
    assert flow.survey(scan, policies=[]).verdict.headline
    with pytest.raises(TypeError, match="a scan that is given has its own"):
        flow.lag_map(scan, x)


def test_rows_that_mix_are_one_state() -> None:
    w = torch.tensor(0.5, dtype=F64, requires_grad=True)

    def step(h: Tensor, _: None) -> tuple[Tensor, Tensor]:
        h = w * (h + h.mean(0))
        return h, h

    scan = flow.scanned(step, data(B, H), None, lambda carry, ys: ys.sum(), length=T)
    assert (scan.chain.B, scan.chain.S) == (1, B * H)
    assert "as one state" in flow.survey(scan, policies=[]).setting.lanes


# What is refused ------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_says_what_to_do() -> None:
    x = data(T, B, I)
    both = bptt.nn.Recurrent([nn.GRUCell(I, H, dtype=F64), nn.GRUCell(I, H, dtype=F64)], bidirectional=True)
    for measure in (flow.lag_map, flow.compare, flow.survey, flow.diagnose, flow.jacobians):
        with pytest.raises(ValueError, match="is a scan for each layer and direction"):
            measure(both, x, square)
    layer = twins("GRU")[0]
    for measure in (flow.gates, flow.shares, flow.cell_path):
        with pytest.raises(
            TypeError, match="lag_map, jacobians, products, lyapunov, compare, survey and diagnose take"
        ):
            measure(layer, x, square)
    with pytest.raises(TypeError, match="Recurrent without one: a step of one's own tells no gates"):
        flow.spectrum(layer)
    with pytest.raises(ValueError, match="layer must be 0"):
        flow.jacobians(layer, x, square, layer=1)
    with pytest.raises(TypeError, match="batch must be given"):
        flow.lag_map(layer)
    two = nn.ModuleList([twins("GRU")[0], twins("GRU")[0]])
    with pytest.raises(ValueError, match=r"record one, record_scan\(model, batch, loss, name=...\)"):
        flow.compare(two, x, square)
    with pytest.raises(ValueError, match="must run once in a call: it ran 2 times"):
        flow.record_scan(Twice(layer), x, square)
    with pytest.raises(TypeError, match="look"):
        flow.diagnose(bptt.nn.GRU(I, H), x)


class Twice(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0] + self.layer(x)[0]


def test_nothing_is_changed() -> None:
    layer, x = stack(dropout=0.3), data(T, B, I)
    torch.manual_seed(0)
    expected = layer(x)[0]
    loss = square(expected)
    grads = torch.autograd.grad(loss, list(layer.parameters()))
    torch.manual_seed(0)
    scan = flow.record_scan(layer, x, square)
    state = torch.get_rng_state()
    flow.survey(layer.eval(), x, square, policies=[])
    layer.train()
    full = scan.vector(bptt.Full())
    torch.testing.assert_close(full, torch.cat([g.flatten() for g in _in_order(scan, layer, grads)]))
    assert all(p.grad is None for p in layer.parameters())
    assert str(layer.gradient) == "full"
    torch.testing.assert_close(torch.get_rng_state(), state)


def _in_order(scan: flow.Scanned, layer: nn.Module, grads: Any) -> list[Tensor]:
    of = {id(p): g for p, g in zip(layer.parameters(), grads, strict=True)}
    return [of[id(p)] for p in scan.parameters]


# The doctor ----------------------------------------------------------------------------------------------------------


class Planted(nn.Module):
    """A cell of two states that divides by 0 in one lane where an input is 7, and takes the root of 0 where it is 8."""

    def __init__(self, hidden: int = H) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(I, hidden, dtype=F64)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        plain = torch.where(x >= 7, torch.zeros_like(x), x)
        h, c = self.cell(plain, state)
        bad = (x[:, :1] == 7).to(h) / (x[:, :1] != 7).to(h) * (x[:, :1] == 7).to(h)
        bad = torch.where(x[:, :1] == 7, bad, torch.zeros_like(bad))
        plain = (x[:, :1] != 8).to(h)
        steep = (h - h.detach() + plain).abs().sqrt() - plain
        return h, (h + steep, c + bad)


def found(layer: nn.Module, x: Tensor, loss: Any = square, model: bool = True) -> Finding:
    """The finding of `watch` in a training step; that of `diagnose` must be at the same place."""
    whole = Model(layer) if model else layer
    with flow.watch(whole) as doctor:
        out = whole(x)
        value = loss(out if model else out[0])
        value.backward()
        diagnosis = doctor.check(value)
    assert diagnosis is not None
    [finding] = diagnosis.findings
    [other] = flow.diagnose(whole, x, loss).findings  # type: ignore[union-attr]
    assert place(other) == place(finding)
    return finding


def place(finding: Finding) -> tuple[Any, ...]:
    return finding.stage, finding.kind, finding.layer, finding.step, finding.lane, finding.output


@pytest.mark.parametrize("reverse", [False, True])
def test_forward_faults_are_found_by_step_lane_and_output(reverse: bool) -> None:
    x = data(T, B, I)
    x[6, 1, 0] = 7
    layer = bptt.nn.Recurrent(Planted(), form="pair", reverse=reverse)
    finding = found(layer, x)
    assert place(finding) == ("forward", "overflow", "layer 0", 6, 1, "state[1]")
    assert finding.message.startswith("forward: layer 0 of `layer`, step 6, lane 1, state[1]: infinity out of a finite")


@pytest.mark.parametrize(("value", "kind"), [(math.nan, "nan"), (math.inf, "inf")])
def test_an_input_is_found(value: float, kind: str) -> None:
    x = data(T, B, I)
    x[4, 2, 1] = value
    assert place(found(stack(), x)) == ("forward", kind, None, 4, 2, "input")


@pytest.mark.parametrize("policy", ["full", "chunked:5", "truncated:3", "truncated:6/3"])
def test_the_way_back_is_searched_step_by_step(policy: str) -> None:
    x = data(T, B, I)
    x[6, 1, 0] = 8
    layer = bptt.nn.Recurrent(Planted(), form="pair", gradient=policy)
    finding = found(layer, x)
    assert finding.stage == "adjoint"
    assert (finding.kind, finding.step, finding.lane) == ("nan", 6, 1)


@pytest.mark.parametrize("policy", ["full", "chunked:4", "chunked:7", "truncated:3"])
@pytest.mark.parametrize("t", [2, 6, 12])
def test_a_fault_on_the_way_back_is_found_where_the_gradient_has_it(policy: str, t: int) -> None:
    x = data(T, B, I)
    x[t, 1, 0] = 8
    layer = bptt.nn.Recurrent(Planted(), form="pair", gradient=policy)
    layer(x)[0][-1].sum().backward()
    finite = all(bool(p.grad.isfinite().all()) for p in layer.parameters() if p.grad is not None)
    diagnosis = flow.diagnose(layer, x, lambda y: y[-1].sum())
    assert (diagnosis is None) == finite


def test_errors_and_parameters_are_found() -> None:
    x, layer = data(T, B, I), stack()
    finding = found(layer, x, lambda y: (y[9, 2] - y[9, 2].detach()).sum().sqrt() + y.sum(), model=False)
    assert (finding.stage, finding.step, finding.lane) == ("local error", 9, 2)
    with torch.no_grad():
        layer.cells[1].weight_hh[2, 1] = math.inf
    finding = found(layer, x)
    assert (finding.stage, finding.parameter) == ("forward", "layer.cells.1.weight_hh")


def test_a_step_without_fault_has_no_diagnosis() -> None:
    x = data(T, B, I)
    for layer in (stack(), stack(reverse=True, dropout=0.2), bptt.nn.Recurrent(Planted(), form="pair")):
        with flow.watch(layer) as doctor:
            value = square(layer(x)[0])
            value.backward()
            assert doctor.check(value) is None
        assert flow.diagnose(layer, x, square) is None
    for policy in ("randomized:0.7", "truncated:4"):
        assert flow.diagnose(stack(gradient=policy), x, square) is None


def test_a_scan_is_diagnosed_by_the_paths_of_its_pytrees() -> None:
    w = torch.ones((), dtype=F64, requires_grad=True)

    def step(carry: dict[str, Tensor], x: Tensor) -> tuple[dict[str, Tensor], tuple[Tensor, dict[str, Tensor]]]:
        v = w * carry["v"] * 0.5
        rate = (x * v).log()
        return {"v": v, "n": carry["n"] + 1}, (v, {"rate": rate})

    carry = {"v": torch.ones(B, dtype=F64), "n": torch.zeros(B, dtype=torch.int64)}
    x = torch.ones(T, B, dtype=F64)
    scan = flow.scanned(step, carry, x, lambda carry, ys: ys[1]["rate"].sum() + carry["v"].sum())
    assert flow.diagnose(scan) is None
    x[5, 2] = 0
    scan = flow.scanned(step, carry, x, lambda carry, ys: ys[1]["rate"].sum())
    [finding] = flow.diagnose(scan).findings  # type: ignore[union-attr]
    assert place(finding) == ("forward", "inf", None, 5, 2, "y[1]['rate']")


def test_what_a_step_sends_to_a_captured_tensor_is_found() -> None:
    w = torch.zeros(H, dtype=F64, requires_grad=True)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = 0.5 * h + torch.where(x > 0, w.sqrt(), w)
        return h, h

    x = -torch.ones(T, B, H, dtype=F64)
    x[8] = 1
    scan = flow.scanned(step, torch.zeros(B, H, dtype=F64), x, lambda carry, ys: ys.sum())
    [finding] = flow.diagnose(scan).findings  # type: ignore[union-attr]
    assert (finding.stage, finding.step) == ("parameter gradient", 13)
    assert "captured tensor [4]" in finding.message
