"""Everything in one call: what it holds for each kind of layer, and that its parts are the measurements themselves."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

import bptt
from bptt.flow import STAGES, by_lag, lag_map, record, survey

X = torch.randn(10, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

LAYERS = {
    "rnn": (bptt.nn.RNN, {}, {"cell_path"}),
    "gru": (bptt.nn.GRU, {"num_layers": 2}, {"cell_path"}),
    "lstm": (bptt.nn.LSTM, {}, set()),
    "projection": (bptt.nn.LSTM, {"proj_size": 2}, set()),
    "both directions": (bptt.nn.LSTM, {"bidirectional": True}, set()),
    "both, stacked": (bptt.nn.GRU, {"bidirectional": True, "num_layers": 2},
                      {"lag_map", "lags", "shares", "cell_path"}),
}  # fmt: skip
"""What each layer does not have."""


@pytest.mark.parametrize("kind", LAYERS)
def test_what_there_is(kind):
    make, options, absent = LAYERS[kind]
    torch.manual_seed(0)
    layer, stages = make(4, 5, dtype=torch.float64, **options), []
    found = survey(layer, X, lambda y: y.square().mean(), policies=["full", "chunked:3"], on_stage=stages.append)
    missing = {name for name in vars(found) if getattr(found, name) is None}
    assert missing == absent
    assert stages == [stage for stage in STAGES if stage in stages]
    assert found.name == str(layer)
    assert len(found.verdict.findings) >= len(found.measures)
    for measure in found.measures:
        values = [v for v in vars(measure).values() if isinstance(v, np.ndarray) and v.dtype == np.float64]
        assert all(not np.isinf(v).any() or np.isneginf(v).any() for v in values)


def test_the_top_layer_is_measured():
    torch.manual_seed(0)
    layer = bptt.nn.LSTM(4, 5, num_layers=2, dtype=torch.float64)
    recording = record(layer, X)
    found = survey(recording, policies=[])
    assert found.comparison is None
    assert {found.spectrum.layer, found.gates.layer, found.jacobians.layer, found.cell_path.layer} == {"layer 1"}
    assert_allclose(found.lag_map.norm, lag_map(recording).norm)
    assert_allclose(found.lags.rate, by_lag(lag_map(recording)).rate)
    assert_allclose(found.jacobians.norm, bptt.flow.jacobians(recording.lanes(slice(1)), layer=1).norm)


def test_bad_arguments():
    with pytest.raises(ValueError, match="gradient must be one of"):
        survey(bptt.nn.RNN(4, 5, dtype=torch.float64), X, policies=["sometimes"])
    with pytest.raises(ValueError, match="lags must be at least 1"):
        survey(bptt.nn.RNN(4, 5, dtype=torch.float64), X, lags=0)


def exploding(nonlinearity, weight):
    layer = bptt.nn.RNN(2, 4, nonlinearity=nonlinearity)
    for p in layer.parameters():
        p.data.abs_()  # so that relu passes ones on
    torch.nn.init.eye_(layer.weight_hh_l0.data).mul_(weight)
    return layer


@pytest.mark.parametrize(
    ("layer", "loss"),
    [
        (exploding("relu", 3.0), None),
        (exploding("identity", 4.0), None),
        (exploding("identity", 1.3), lambda y: 0 * y.sum()),
    ],
    ids=["relu", "identity", "no loss"],
)
def test_what_cannot_be_compared_is_surveyed_all_the_same(layer, loss):
    found = survey(layer, torch.ones(400, 2, 2), loss)
    assert found.comparison is None
    if loss is None:
        assert "explode" in found.verdict.headline
        assert "not finite" in found.verdict.headline
        assert not any("truncated" in text for text in found.verdict.advice)
    else:
        assert "no gradient flows" in found.verdict.headline.lower()


def test_a_nan_is_not_taken_for_vanishing():
    x = torch.randn(30, 2, 2, generator=torch.Generator().manual_seed(0))
    x[5, 0] = torch.nan
    found = survey(bptt.nn.GRU(2, 3), x)
    assert "not finite" in found.verdict.headline
    assert not any("truncated" in text for text in found.verdict.advice)


@pytest.mark.parametrize(
    ("make", "shut", "at"),
    [
        (lambda: bptt.nn.LSTM(4, 5, num_layers=3), "bias_ih_l0", "layer 0"),
        (lambda: bptt.nn.GRU(4, 5, bidirectional=True), "bias_ih_l0_reverse", "layer 0 reversed"),
        (lambda: bptt.nn.RNN(4, 5, num_layers=2, nonlinearity="relu"), "bias_ih_l1", "layer 1"),
    ],
)
def test_values_at_an_end_are_found_in_whatever_layer_they_are(make, shut, at):
    torch.manual_seed(0)
    layer = make()
    with torch.no_grad():
        getattr(layer, shut)[:5] = -30.0
    found = survey(layer, X.float(), policies=[])
    assert found.gates.layer == at
    assert found.gates.low[0] == 1
    said = str(found.verdict)
    assert "100 % of the" in dict(found.verdict.findings)["gates"]
    assert f"the gates are those of {at}, of all layers the one with most values at an end" in said
    assert f"W_hh, steps, products and exponents are those of {found.spectrum.layer};" in said
    assert "Steps, products and exponents are those of lane 0" in said


def test_errors_in_the_place_of_a_loss_are_a_condition():
    layer, x = bptt.nn.GRU(4, 5), X[:, :1].float()  # one layer, one lane
    said = survey(layer, x, policies=[]).verdict.conditions
    assert said == ("Measured with random errors of norm 1 at every step in place of a loss",)
    assert survey(layer, x, lambda y: y.sum(), policies=[]).verdict.conditions == ()


def test_the_lane_of_the_products_is_numbered_as_in_the_batch():
    packed = torch.nn.utils.rnn.pack_padded_sequence(X.float(), [4, 10, 7], enforce_sorted=False)
    layer = bptt.nn.GRU(4, 5)
    found = survey(layer, packed, policies=[]).products
    assert found.lane == 1  # the longest
    assert_allclose(found.singular[:, 0], bptt.flow.products(layer, packed, lane=1).singular[:, 0], rtol=1e-5)
    assert "(along lane 1)" in bptt.flow.conclusion(found)


@pytest.mark.parametrize("scanned", [False, True])
def test_a_dead_lane_is_not_taken_for_those_whose_gradients_explode(scanned):
    cell = torch.nn.RNNCell(2, 3, nonlinearity="relu")
    layer = bptt.nn.Recurrent(cell) if scanned else bptt.nn.RNN(2, 3, nonlinearity="relu")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(1.4 * torch.eye(3) if parameter.shape == (3, 3) else torch.full_like(parameter, 0.5))
    x = torch.ones(40, 3, 2)
    x[:, 0] = -50
    found = survey(layer, x, lambda y: y.sum(), policies=[])
    assert found.products.lane == 1
    assert found.products.log_singular[39, 0] == pytest.approx(39 * np.log(1.4))
    assert "(along lane 1)" in bptt.flow.conclusion(found.products)
    if scanned:  # on all lanes
        assert bptt.flow.conclusion(found.lyapunov) == "Every perturbation dies completely in 1 of 3 lanes"


def test_the_products_of_a_scan_are_not_those_of_a_lane_of_one_step():
    packed = torch.nn.utils.rnn.pack_padded_sequence(X.float(), [1, 10, 7], enforce_sorted=False)
    found = survey(bptt.nn.Recurrent(torch.nn.GRUCell(4, 5)), packed, lambda y: y.data.sum(), policies=[]).products
    assert found.lane == 1
    assert found.n[-1] == 10
