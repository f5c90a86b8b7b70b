"""The (t, lag) map, decay, horizon and shares against autograd through a plain loop, and against known decays."""

import tracemalloc

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

import bptt
from bptt.flow import LagMap, by_lag, lag_map, record, shares

from .unrolled import unroll

LAYERS = [
    (bptt.nn.RNN, {}),
    (bptt.nn.RNN, {"nonlinearity": "relu"}),
    (bptt.nn.GRU, {}),
    (bptt.nn.LSTM, {}),
    (bptt.nn.LSTM, {"num_layers": 2}),
    (bptt.nn.GRU, {"num_layers": 3}),
]


@pytest.fixture(params=LAYERS, ids=lambda p: p[0].__name__ + "".join(map(str, p[1].values())))
def layer(request):
    torch.manual_seed(1)
    kind, options = request.param
    return kind(3, 5, dtype=torch.float64, **options)


T, B = 7, 2


def batch():
    return torch.randn(T, B, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def contributions(layer, x, dy):
    """norm[layer, t, k] by one backward call of autograd per loss."""
    net = unroll(layer, x)
    found = np.full((layer.num_layers, T, T), np.nan)
    for t in range(T):
        for k in range(t + 1):
            wanted = [s for states in net.states for s in states[t - k]]
            grads = torch.autograd.grad((net.y[t] * dy[t]).sum(), wanted, retain_graph=True, allow_unused=True)
            grads = [torch.zeros(B, 5, dtype=torch.float64) if g is None else g for g in grads]
            size = len(wanted) // layer.num_layers
            for i in range(layer.num_layers):
                state = torch.cat(grads[i * size : (i + 1) * size], -1)
                found[i, t, k] = state.norm(dim=-1).mean()
    return found


@pytest.mark.parametrize("kernel", ["cpu", "eager"])
def test_every_entry_is_what_autograd_sends_back(layer, kernel):
    layer.kernel = kernel
    recording = record(layer, batch(), lambda y: y.square().sum())
    measured = lag_map(recording)
    expected = contributions(layer, batch(), recording.dy)
    assert_allclose(measured.norm, expected, rtol=1e-10, atol=1e-14)
    assert measured.state == ("(h, c)" if layer.mode == "LSTM" else "h")


def test_fewer_lags_losses_and_lanes_are_parts_of_the_whole(layer):
    recording = record(layer, batch())
    whole = lag_map(recording)
    part = lag_map(recording, lags=3, every=2)
    assert part.t.tolist() == [1, 3, 5]
    assert_allclose(part.norm, whole.norm[:, [1, 3, 5], :3], rtol=1e-12)
    both = [record(layer, batch()[:, b : b + 1]) for b in (0, 1)]
    one = lag_map(recording, lanes=1)
    assert one.B == 1
    np.testing.assert_array_equal(np.isnan(one.norm), np.isnan(whole.norm))
    assert both[0].B == 1


@pytest.mark.parametrize("layer", [LAYERS[0], LAYERS[2], LAYERS[3]], indirect=True)
def test_lanes_are_averaged(layer):
    recording = record(layer, batch())
    first = lag_map(recording, lanes=1).norm
    turned = record(layer, batch().flip(1))
    object.__setattr__(turned, "dy", recording.dy.flip(1))
    second = lag_map(turned, lanes=1).norm
    assert_allclose((first + second) / 2, lag_map(recording).norm, rtol=1e-12)


def test_shares_are_the_gradients_of_each_steps_own_weights(layer):
    recording = record(layer, batch(), lambda y: y.square().sum())
    bin_edges = [0, 1, 2, 4]
    measured = shares(recording, bin_edges=bin_edges)
    assert measured.bin_edges.tolist() == [0, 1, 2, 4, T]
    net = unroll(layer, batch())
    L = layer.num_layers
    parts = [torch.zeros(4, *net.weights[i][0].shape, dtype=torch.float64) for i in range(L)]
    for t in range(T):
        for k in range(t + 1):
            wanted = [net.weights[i][t - k] for i in range(L)]
            loss = (net.y[t] * recording.dy[t]).sum()
            grads = torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
            for i, grad in enumerate(grads):
                parts[i][int(np.searchsorted(bin_edges, k, side="right")) - 1] += grad
    for i, part in enumerate(parts):
        G = part.sum(0)
        assert_allclose(measured.total[i], float(G.norm()), rtol=1e-10)
        assert_allclose(measured.norm[i], part.flatten(1).norm(dim=1), rtol=1e-9)
        assert_allclose(measured.share[i], (part * G).flatten(1).sum(1) / G.norm() ** 2, rtol=1e-9, atol=1e-12)
        assert_allclose(measured.bias[i], (part.cumsum(0) - G).flatten(1).norm(dim=1) / G.norm(), atol=1e-12)


def test_the_bias_behind_an_edge_is_that_of_truncation():
    """G_0 + ... + G_{K-1} is the gradient of Truncated(K)."""
    torch.manual_seed(3)
    layer = bptt.nn.LSTM(3, 5, num_layers=2, dtype=torch.float64)
    recording = record(layer, batch(), lambda y: y.square().sum())
    measured = shares(recording, bin_edges=range(T))
    full = bptt.gradients(layer, batch(), recording.dy, gradient="full")
    for K in range(1, T + 1):
        cut = bptt.gradients(layer, batch(), recording.dy, gradient=bptt.Truncated(K))
        for i in range(2):
            name = f"weight_hh_l{i}"
            exact = full.parameters[name]
            bias = (cut.parameters[name] - exact).norm() / exact.norm()
            assert_allclose(measured.bias[i, K - 1], float(bias), atol=1e-12)


@pytest.mark.parametrize("radius", [0.5, 0.97, 1.0, 1.2])
def test_a_linear_net_decays_at_its_spectral_radius(radius):
    layer = linear(radius, 4)
    found = by_lag(lag_map(layer, torch.zeros(60, 3, 2, dtype=torch.float64)))
    assert_allclose(found.rate, radius, rtol=1e-10)
    assert_allclose(found.rate_error, 0, atol=1e-9)
    assert_allclose(found.norm[0], radius ** np.arange(60.0), rtol=1e-10)
    expected = np.cumsum(radius ** np.arange(60.0))
    for part, horizon in ((0.9, found.horizon_90), (0.99, found.horizon_99)):
        assert horizon[0] == np.flatnonzero(expected >= part * expected[-1] - 1e-9)[0]
    assert found.complete.all()


def linear(radius, H):
    """h_t = radius Q h_{t-1} with Q orthogonal: every singular value is the radius."""
    torch.manual_seed(0)
    layer = bptt.nn.RNN(2, H, nonlinearity="identity", dtype=torch.float64)
    with torch.no_grad():
        layer.weight_hh_l0.copy_(radius * torch.linalg.qr(torch.randn(H, H, dtype=torch.float64))[0])
    return layer


@pytest.mark.parametrize("steps", [[39], [9, 19, 39]])
def test_steps_without_a_loss_do_not_count(steps):
    x = torch.zeros(40, 2, 2, dtype=torch.float64)
    found = by_lag(lag_map(linear(0.5, 3), x, lambda y: y[steps].sum()))
    assert_allclose(found.rate, 0.5, rtol=1e-10)
    assert_allclose(found.norm[0], np.sqrt(3) * 0.5 ** np.arange(40.0))
    assert found.losses[0] == len(steps)


def test_a_cut_map_says_whether_the_tail_matters():
    x = torch.zeros(200, 1, 2, dtype=torch.float64)
    assert by_lag(lag_map(linear(0.5, 3), x, lags=20)).complete.all()
    assert not by_lag(lag_map(linear(0.97, 3), x, lags=20)).complete.any()
    assert not by_lag(lag_map(linear(1.0, 3), x, lags=20)).complete.any()


def test_ten_thousand_steps_with_limited_lags():
    found = lag_map(linear(0.9, 3), torch.zeros(10_000, 1, 2, dtype=torch.float64), lags=50, every=100)
    assert found.norm.shape == (1, 100, 50)
    assert_allclose(found.norm[0], np.broadcast_to(0.9 ** np.arange(50.0), (100, 50)), rtol=1e-10)


def test_a_loss_on_the_final_state_belongs_to_the_last_step():
    torch.manual_seed(0)
    layer, x = bptt.nn.LSTM(3, 5, dtype=torch.float64), batch()

    class Last(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = layer

        def forward(self, x):
            return self.rnn(x)[1][0]

    found = lag_map(Last(), x, lambda h: h.sum())
    net = unroll(layer, x)
    assert (found.norm[0, : T - 1][~np.isnan(found.norm[0, : T - 1])] == 0).all()
    for k in range(T):
        grads = torch.autograd.grad(net.y[-1].sum(), net.states[0][T - 1 - k], retain_graph=True, allow_unused=True)
        state = torch.cat([torch.zeros(B, 5, dtype=torch.float64) if g is None else g for g in grads], -1)
        assert_allclose(found.norm[0, T - 1, k], float(state.norm(dim=-1).mean()), rtol=1e-10)


def test_resets_and_ends_stop_what_is_sent_back():
    layer = linear(0.5, 3)
    x = torch.zeros(6, 2, 2, dtype=torch.float64)

    class Episodes(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = layer

        def forward(self, x):
            resets = torch.zeros(6, 2, dtype=torch.bool)
            resets[3] = True
            return self.rnn(x, resets=resets)[0]

    found = lag_map(Episodes(), x, lambda y: y.sum()).norm[0]
    assert found[3, 1] == 0
    assert found[4, 1] > 0
    assert found[4, 2] == 0
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, [6, 2])
    found = lag_map(layer, packed, lambda y: y.data.sum()).norm[0]
    assert np.isnan(found[:, 6:]).all()
    assert_allclose(found[5, :6], np.sqrt(3) * 0.5 ** np.arange(6.0))  # of the one lane that is so long
    assert_allclose(found[1, :2], np.sqrt(3) * 0.5 ** np.arange(2.0))


@pytest.mark.parametrize("rows", ["coupled", "independent"])
def test_a_scan_has_the_map_of_its_layer(rows):
    """One step of the LSTM as a function, its carry (h, c): the loss on y_{t+1} = h_t of the carry that enters."""
    torch.manual_seed(5)
    layer = bptt.nn.LSTM(3, 5, dtype=torch.float64)
    cell = torch.nn.LSTMCell(3, 5, dtype=torch.float64)
    cell.load_state_dict({n.removesuffix("_l0"): p for n, p in layer.state_dict().items()})
    x = batch()[:, :1]
    recording = record(layer, x)

    def step(carry, x):
        h, c = cell(x, carry)
        return (h, c), carry[0]

    zero = torch.zeros(1, 5, dtype=torch.float64)
    shifted = torch.cat([x, x[:1]])  # one more step, so that every h_t enters one
    weights = torch.cat([torch.zeros_like(recording.dy[:1]), recording.dy])
    chain = bptt.flow.steps(step, (zero, zero), shifted, lambda ys: (ys * weights).sum(), rows=rows)
    found, expected = lag_map(chain), lag_map(recording)
    assert found.layers == ("carry",)
    assert_allclose(found.norm[0, 1:, :-1][~np.isnan(expected.norm[0])], expected.norm[~np.isnan(expected.norm)])
    assert (~np.isnan(found.norm[0])).sum(1).tolist() == list(range(1, T + 2))  # the first carry is a state too
    part = lag_map(chain, lags=3, every=2)
    assert_allclose(part.norm[0], lag_map(chain).norm[0, [1, 3, 5, 7], :3])
    assert by_lag(found).rate.shape == (1,)


def test_both_directions():
    torch.manual_seed(4)
    layer = bptt.nn.GRU(3, 5, bidirectional=True, dtype=torch.float64)
    recording = record(layer, batch())
    found = lag_map(recording)
    assert found.layers == ("layer 0", "layer 0 reversed")
    one = bptt.nn.GRU(3, 5, dtype=torch.float64)
    for d, suffix in enumerate(("", "_reverse")):
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            getattr(one, f"{name}_l0").data.copy_(getattr(layer, f"{name}_l0{suffix}"))
        own = record(one, batch() if d == 0 else batch().flip(0))
        half = recording.dy[..., 5 * d : 5 * (d + 1)]
        object.__setattr__(own, "dy", half if d == 0 else half.flip(0))
        expected = lag_map(own).norm[0]
        assert_allclose(found.norm[d], expected if d == 0 else expected[::-1], rtol=1e-12)
        G = bptt.gradients(layer, batch(), recording.dy).parameters[f"weight_hh_l0{suffix}"]
        assert_allclose(shares(recording).total[d], float(G.norm()), rtol=1e-12)


def test_nothing_and_too_much():
    """All zero, one lag, and norms that overflow: no warning, and a horizon all the same."""
    zero = LagMap(("layer 0",), np.arange(3), np.arange(3), np.zeros((1, 3, 3)), "h", 3, 1)
    found = by_lag(zero)
    assert np.isnan(found.rate).all()
    assert found.horizon_90[0] == 0
    one = by_lag(LagMap(("layer 0",), np.arange(3), np.arange(1), np.ones((1, 3, 1)), "h", 3, 1))
    assert np.isnan(one.rate[0])
    over = by_lag(lag_map(linear(1e30, 3), torch.zeros(30, 1, 2, dtype=torch.float64)))
    assert over.horizon_90[0] == 29
    assert over.rate[0] > 1e29


def test_bad_arguments():
    layer, x = bptt.nn.RNN(3, 5), torch.zeros(4, 2, 3)
    with pytest.raises(ValueError, match="lags must be at least 1: got 0"):
        lag_map(layer, x, lags=0)
    with pytest.raises(TypeError, match=r"lags must be a whole number: got 2\.5"):
        lag_map(layer, x, lags=2.5)
    with pytest.raises(ValueError, match="every must be at most the 4 steps"):
        lag_map(layer, x, every=5)
    with pytest.raises(ValueError, match="lanes must be at least 1: got 0"):
        lag_map(layer, x, lanes=0)
    with pytest.raises(ValueError, match="bin_edges must ascend from 0"):
        shares(layer, x, bin_edges=[1, 2])
    with pytest.raises(ValueError, match="both ways"):
        lag_map(bptt.nn.RNN(3, 5, num_layers=2, bidirectional=True), x)


def test_far_lags_of_a_few_losses_take_little_memory():
    """The rows of the losses measured, not of all steps."""
    layer, x = linear(0.9, 2), torch.zeros(3000, 1, 2, dtype=torch.float64)
    tracemalloc.start()
    try:
        found = lag_map(layer, x, lags=3000, every=1000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.norm.shape == (1, 3, 3000)
    assert peak < 20 * found.norm.nbytes


@pytest.mark.parametrize("kind", [bptt.nn.RNN, bptt.nn.LSTM])
def test_what_is_finite_is_not_called_infinite_because_its_square_is(kind):
    """Adjoints and a gradient of about 1e200."""
    torch.manual_seed(0)
    layer, x = kind(3, 5, dtype=torch.float64), torch.randn(20, 2, 3, dtype=torch.float64)
    small, large = (record(layer, x, lambda y, size=size: size * y.sum()) for size in (1.0, 1e200))
    assert_allclose(lag_map(large).norm, 1e200 * lag_map(small).norm, rtol=1e-12)
    expected, found = shares(small), shares(large)
    assert_allclose(found.total, 1e200 * expected.total)
    assert_allclose(found.norm, 1e200 * expected.norm)
    assert_allclose(found.bias, expected.bias, atol=1e-12)
    assert_allclose(found.share, expected.share, atol=1e-12)
