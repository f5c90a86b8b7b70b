"""The initialisation helpers, against what they promise: on stacks, both directions, and torch.nn's own layers."""

from __future__ import annotations

import math

import pytest
import torch

import bptt
from bptt.nn import init

LIBRARIES = [bptt.nn, torch.nn]
WHOLE = {"num_layers": 2, "bidirectional": True}


def blocks(layer: torch.nn.RNNBase) -> list[torch.Tensor]:
    return [b for n, p in layer.named_parameters() if n.startswith("weight_hh") for b in p.split(layer.hidden_size)]


def biases(layer: torch.nn.RNNBase, gate: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    rows = slice(gate * layer.hidden_size, (gate + 1) * layer.hidden_size)
    names = [n.removeprefix("bias_ih") for n, _ in layer.named_parameters() if n.startswith("bias_ih")]
    return [(getattr(layer, f"bias_ih{n}")[rows], getattr(layer, f"bias_hh{n}")[rows]) for n in names]


def others(layer: torch.nn.RNNBase, changed: str) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in layer.named_parameters() if changed not in n}


@pytest.mark.parametrize("library", LIBRARIES)
def test_forget_bias_is_the_sum_of_both(library: object):
    layer = library.LSTM(3, 5, **WHOLE)
    kept, open_gate = others(layer, "bias"), biases(layer, 0)
    before = [tuple(b.clone() for b in pair) for pair in open_gate]
    assert init.forget_bias_(layer, 2.0) is layer
    for b_ih, b_hh in biases(layer, 1):
        torch.testing.assert_close(b_ih + b_hh, torch.full((5,), 2.0))
    torch.testing.assert_close([tuple(p) for p in biases(layer, 0)], before)
    torch.testing.assert_close(others(layer, "bias"), kept)
    assert all(p.requires_grad and p.grad is None for p in layer.parameters())


def test_forget_bias_opens_the_gate():
    layer = init.forget_bias_(bptt.nn.LSTM(3, 5), 3.0)
    [tape] = bptt.flow.record(layer, torch.zeros(1, 2, 3)).tapes()
    torch.testing.assert_close(tape.gates[0, :, 5:10], torch.full((2, 5), 1 / (1 + math.exp(-3.0))))


@pytest.mark.parametrize("library", LIBRARIES)
def test_chrono_spreads_the_memory_of_an_lstm(library: object):
    layer = init.chrono_(library.LSTM(3, 400), 50, generator=torch.Generator().manual_seed(1))
    [(f_ih, f_hh)], [(i_ih, i_hh)] = biases(layer, 1), biases(layer, 0)
    torch.testing.assert_close(i_ih, -f_ih)
    assert not f_hh.any()
    assert not i_hh.any()
    u = f_ih.detach().double().exp()
    assert 1 <= float(u.min()) < 1.5
    assert 48.5 < float(u.max()) <= 49.001
    torch.testing.assert_close(u.mean(), torch.tensor(25.0, dtype=torch.float64), rtol=0, atol=4 * 48 / math.sqrt(4800))


@pytest.mark.parametrize("library", LIBRARIES)
def test_chrono_of_a_gru_keeps_by_the_update_gate(library: object):
    """A unit whose candidate is 0 decays as z = sigmoid(log u) = u / (1 + u) per step."""
    layer = init.chrono_(library.GRU(1, 6), 30, generator=torch.Generator().manual_seed(1))
    u = layer.bias_ih_l0[6:12].detach().exp()
    with torch.no_grad():
        layer.weight_hh_l0.zero_()
        layer.weight_ih_l0.zero_()
        layer.bias_ih_l0[12:] = 0
        layer.bias_hh_l0[12:] = 0
        y, _ = layer(torch.zeros(10, 1, 1), torch.ones(1, 1, 6))
    torch.testing.assert_close(y[-1, 0], (u / (1 + u)) ** 10)


def test_a_generator_decides_the_draws():
    def drawn(seed: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        layer = init.orthogonal_(init.chrono_(bptt.nn.LSTM(2, 3), 9, generator=generator), generator=generator)
        return [layer.weight_hh_l0, layer.bias_ih_l0[:6]]

    state = torch.get_rng_state()
    first = drawn(1)
    torch.set_rng_state(state)
    for a, b in zip(first, drawn(1), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert not torch.equal(first[0], drawn(2)[0])


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_every_recurrent_block_is_orthogonal(library: object, kind: str):
    layer = getattr(library, kind)(3, 5, **WHOLE)
    kept = others(layer, "weight_hh")
    assert init.orthogonal_(layer, 0.5) is layer
    assert len(blocks(layer)) == 4 * {"RNN": 1, "GRU": 3, "LSTM": 4}[kind]
    for block in blocks(layer):
        torch.testing.assert_close(torch.linalg.svdvals(block), torch.full((5,), 0.5))
    torch.testing.assert_close(others(layer, "weight_hh"), kept)


def test_an_irnn_keeps_its_state():
    layer = init.identity_(bptt.nn.RNN(3, 5, **WHOLE, nonlinearity="relu"))
    h = torch.rand(4, 2, 5)
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if "weight_ih" in name:
                p.zero_()
        _, h_n = layer(torch.randn(20, 2, 3), h)
    torch.testing.assert_close(h_n, h, rtol=0, atol=0)
    assert init.identity_(bptt.nn.RNN(3, 5, bias=False), 0.25).weight_hh_l0.trace().item() == 1.25


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_every_recurrent_block_has_the_radius(library: object, kind: str):
    layer = getattr(library, kind)(3, 6, **WHOLE)
    before = [b.detach().clone() for b in blocks(layer)]
    init.radius_(layer, 1.25)
    for block, old in zip(blocks(layer), before, strict=True):
        radius = torch.linalg.eigvals(block.double()).abs().max()
        torch.testing.assert_close(radius, torch.tensor(1.25, dtype=torch.float64), rtol=1e-6, atol=0)
        torch.testing.assert_close(block / block.norm(), old / old.norm())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: init.forget_bias_(bptt.nn.GRU(1, 2)), TypeError, "forget_bias_ is for an LSTM: got GRU"),
        (lambda: init.forget_bias_(bptt.nn.LSTM(1, 2, bias=False)), ValueError, "layer must have biases"),
        (lambda: init.forget_bias_(bptt.nn.LSTM(1, 2), math.inf), ValueError, "value must be finite: got inf"),
        (lambda: init.chrono_(bptt.nn.RNN(1, 2), 10), TypeError, "chrono_ is for an LSTM or a GRU: got RNN"),
        (lambda: init.chrono_(bptt.nn.LSTM(1, 2), 2), ValueError, "longest must be above 2: got 2"),
        (lambda: init.chrono_(bptt.nn.LSTM(1, 2), "x"), TypeError, "longest must be a number: got 'x'"),
        (lambda: init.orthogonal_(torch.nn.Linear(2, 2)), TypeError, "is for an RNN, GRU or LSTM: got Linear"),
        (lambda: init.orthogonal_(bptt.nn.LSTM(1, 4, proj_size=2)), ValueError, "square .* got proj_size=2"),
        (lambda: init.identity_(bptt.nn.GRU(1, 2)), TypeError, "identity_ is for a simple RNN"),
        (lambda: init.radius_(bptt.nn.RNN(1, 2), -1), ValueError, "radius must be at least 0: got -1"),
        (lambda: init.radius_(init.identity_(bptt.nn.RNN(1, 2), 0), 1), ValueError, "radius above 0: got 0"),
        (
            lambda: init.radius_(torch.nn.utils.parametrizations.weight_norm(bptt.nn.RNN(1, 2), "weight_hh_l0"), 1),
            ValueError,
            "weight_hh_l0 is computed from others",
        ),
    ],
)
def test_what_cannot_be_initialised(call: object, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        call()
