"""Packed sequences run on their rows as they lie, and give what the same sequences give with padding."""

from itertools import product
from typing import Any

import pytest
import torch
from reference import as_tuple
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode

import bptt
from bptt.engine import PackedStack
from bptt.kernels import Frames, PackedRows, variants
from bptt.policies import Reach

T, I, H = 9, 3, 17
LENGTHS = [4, 9, 1, 6, 6, 2, 7]

LAYERS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("RNN", {"gradient": "truncated:4/2", "bidirectional": True, "memory": "states"}),
    ("RNN", {"num_layers": 2, "gradient": "chunked:3", "bias": False}),
    ("GRU", {"num_layers": 2, "bidirectional": True, "gradient": "chunked:4", "memory": "states"}),
    ("GRU", {"gradient": "truncated:3"}),
    ("LSTM", {"num_layers": 2, "bidirectional": True, "proj_size": 5, "gradient": "chunked:2"}),
    ("LSTM", {"num_layers": 3, "memory": "states"}),
)


def layer_of(kind: str, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    torch.manual_seed(0)
    return getattr(bptt.nn, kind)(I, H, dtype=dtype, **options)


def states_of(layer: Any, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    K = layer.num_layers * (1 + layer.bidirectional)
    sizes = (layer.proj_size or H, H)[: layer.cell().states]
    return [torch.randn(K, len(LENGTHS), n, dtype=dtype).requires_grad_() for n in sizes]


def bare(states: list[Tensor]) -> Any:
    return states[0] if len(states) == 1 else tuple(states)


def both(layer: Any, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and all gradients of one call on packed sequences, and of one with padding, which resets ask for."""
    torch.manual_seed(1)
    x, lengths, states = torch.randn(T, len(LENGTHS), I, dtype=dtype), torch.tensor(LENGTHS), states_of(layer, dtype)
    found = []
    for is_packed in (True, False):
        leaf = x.clone().requires_grad_()
        if is_packed:
            y, final = layer(pack_padded_sequence(leaf, lengths, enforce_sorted=False), bare(states))
        else:
            none = torch.zeros(x.shape[:2], dtype=torch.bool)
            y, final = layer(leaf, bare(states), lengths=lengths, resets=none)
            y = pack_padded_sequence(y, lengths, enforce_sorted=False)
        outputs = [y.data, *as_tuple(final)]
        torch.manual_seed(2)
        cotangents = [torch.randn_like(o) for o in outputs]
        found.append([*outputs, *torch.autograd.grad(outputs, [leaf, *states, *layer.parameters()], cotangents)])
    return found[0], found[1]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of every program that ran on packed rows."""
    rows: list[int] = []
    forward = PackedStack.forward

    def seen(self: PackedStack, inputs: Any, keep: bool) -> Any:
        rows.append(len(inputs[0]))
        return forward(self, inputs, keep)

    monkeypatch.setattr(PackedStack, "forward", seen)
    return rows


def test_places() -> None:
    rows = PackedRows(torch.tensor([3, 2, 2, 1]))
    assert (rows.T, rows.B, rows.S) == (4, 3, 8)
    assert rows.lengths.tolist() == [4, 3, 1]
    assert rows.padded.tolist() == [0, 1, 2, 3, 4, 6, 7, 9]
    assert rows.before(0).tolist() == [0, 1, 2, 3, 4, 6, 7, 8]
    assert rows.before(1).tolist() == [6, 7, 2, 8, 9, 10, 1, 0]
    assert [rows.last(d).tolist() for d in (0, 1)] == [[10, 9, 5], [3, 4, 5]]
    frames = Frames.of(Reach(2, 2, False), rows.lengths, 4, 3)
    tops = {tuple(c[:2]): (a, b) for c, a, b in zip(
        frames.walks.columns.t().tolist(), rows.tops(frames, 0).tolist(), rows.tops(frames, 1).tolist(), strict=True
    )}  # fmt: skip
    assert tops == {(3, 0): (7, 0), (1, 0): (3, 5), (2, 1): (6, 1), (1, 1): (4, 4), (0, 2): (2, 2)}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("variant", variants())
def test_as_with_padding(variant: str, threads: int, ran: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bptt.kernels.KERNELS, "cpu", bptt.kernels.Cpu(variant))
    if threads > 1:  # the products over all steps by a BLAS, too
        monkeypatch.setattr("bptt.kernels.cpu.SMALL", 0)
        monkeypatch.setattr("bptt.kernels.cpu.NEAR", (0, 0))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for (kind, options), (dtype, tolerance) in product(LAYERS, ((torch.float64, 1e-10), (torch.float32, 2e-5))):
            actual, expected = both(layer_of(kind, dtype, **options), dtype)
            torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    finally:
        torch.set_num_threads(before)
    assert ran == [sum(LENGTHS)] * 2 * len(LAYERS)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(("kind", "options"), [LAYERS[0], LAYERS[4], LAYERS[5]])
def test_lengths_run_on_the_steps_alone(kind: str, options: dict[str, Any], first: bool, ran: list[int]) -> None:
    """Whatever the padding holds; longer than the longest sequence too; with gradients of every kind."""
    layer = layer_of(kind, **options, batch_first=first)
    torch.manual_seed(1)
    x, states = torch.randn(T + 2, len(LENGTHS), I, dtype=torch.float64), states_of(layer)
    x[torch.arange(T + 2)[:, None] >= torch.tensor(LENGTHS)] = torch.nan
    leaf = x.transpose(0, 1).contiguous().requires_grad_() if first else x.requires_grad_()
    inputs, found = [leaf, *states, *layer.parameters()], []
    none = torch.zeros(leaf.shape[:2], dtype=torch.bool)
    for given in ({"lengths": LENGTHS}, {"lengths": torch.tensor(LENGTHS), "resets": none}):
        y, final = layer(leaf, bare(states), **given)
        torch.manual_seed(2)
        vs = [torch.randn(2, *o.shape, dtype=torch.float64) for o in (y, *as_tuple(final))]
        grads = torch.autograd.grad([y, *as_tuple(final)], inputs, vs, is_grads_batched=True, retain_graph=True)
        first_order = torch.autograd.grad(y.square().sum(), inputs[1:], create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first_order), inputs[1:])
        found.append([y, *as_tuple(final), *grads, *second])
    assert len(ran) > 0
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_only_where_it_can(ran: list[int]) -> None:
    for kind, options in (
        ("GRU", {"num_layers": 2, "gradient": "truncated:4/2"}),
        ("RNN", {"gradient": "randomized:0.5"}),
        ("LSTM", {"memory": "checkpoints:steps=2"}),
        ("GRU", {"kernel": "eager"}),
    ):
        layer = layer_of(kind, **options)
        layer(pack_padded_sequence(torch.randn(T, len(LENGTHS), I, dtype=torch.float64), LENGTHS, enforce_sorted=False))
    assert ran == []


def test_lanes_of_one_length_are_a_tensor(ran: list[int]) -> None:
    for first in (False, True):
        layer = layer_of("GRU", num_layers=2, batch_first=first)
        x = torch.randn(T, 4, I, dtype=torch.float64)
        y, h = layer(pack_padded_sequence(x, [T] * 4))
        expected, h_n = layer(x.transpose(0, 1) if first else x)
        assert torch.equal(y.data, (expected.transpose(0, 1) if first else expected).flatten(0, 1))
        assert torch.equal(h, h_n)
    assert ran == []


@pytest.mark.parametrize(("kind", "options"), [LAYERS[2], LAYERS[5]])
def test_backward_calls_of_every_kind(kind: str, options: dict[str, Any], ran: list[int]) -> None:
    """Batched cotangents, a counted call, an output that was written to, and a gradient of the gradient."""
    layer = layer_of(kind, **options)
    packed = pack_padded_sequence(torch.randn(T, len(LENGTHS), I, dtype=torch.float64), LENGTHS, enforce_sorted=False)
    leaf = packed.data.clone().requires_grad_()
    inputs = [leaf, *layer.parameters()]

    def output() -> Tensor:
        return layer(PackedSequence(leaf, *packed[1:]))[0].data

    vs = torch.randn(2, *output().shape, dtype=torch.float64)
    expected = [torch.autograd.grad(output(), inputs, v) for v in vs]
    batched = torch.autograd.grad(output(), inputs, vs, is_grads_batched=True)
    torch.testing.assert_close([b[1] for b in batched], list(expected[1]), rtol=1e-10, atol=1e-10)

    y = output()
    with FlopCounterMode(display=False) as counter:
        counted = torch.autograd.grad(y, inputs, vs[0])
    assert counter.get_total_flops() > 0
    torch.testing.assert_close(counted, expected[0], rtol=1e-10, atol=1e-10)

    y = output()
    changed = torch.autograd.grad(y.mul_(2), inputs, vs[0])
    torch.testing.assert_close(changed, tuple(2 * e for e in expected[0]), rtol=1e-10, atol=1e-10)

    again = torch.autograd.grad(output(), inputs, vs[0], create_graph=True)
    torch.testing.assert_close(again, expected[0], rtol=1e-10, atol=1e-10)
    second = torch.autograd.grad([(g * g).sum() for g in again], inputs, allow_unused=True)
    padded = layer_of(kind, **{**options, "kernel": "eager"})
    y = padded(PackedSequence(leaf, *packed[1:]))[0].data
    own = [leaf, *padded.parameters()]
    first = torch.autograd.grad(y, own, vs[0], create_graph=True)
    truth = torch.autograd.grad([(g * g).sum() for g in first], own, allow_unused=True)
    torch.testing.assert_close(second, truth, rtol=1e-9, atol=1e-9)
    assert ran


@pytest.mark.parametrize("first", [False, True])
def test_dropout_draws_as_of_packed_sequences(first: bool) -> None:
    """The same numbers by whatever runs the call, since neither memory, kernel nor policy changes a value."""
    x, lengths = torch.randn(T + 1, len(LENGTHS), I, dtype=torch.float64), torch.tensor(LENGTHS)
    x = x.transpose(0, 1) if first else x
    none = torch.zeros(x.shape[:2], dtype=torch.bool)
    packed = pack_padded_sequence(x, lengths, first, enforce_sorted=False)
    layer, torchs = layer_of("GRU", num_layers=3, dropout=0.5, batch_first=first), torch.nn.GRU(I, H, 3, dropout=0.5)
    torchs.double().load_state_dict(layer.state_dict())
    torch.manual_seed(3)
    expected = torchs(packed)[0].data
    for memory, kernel, gradient, given in (
        ("gates", "auto", "full", {}),
        ("checkpoints:steps=2", "auto", "full", {}),
        ("auto", "eager", "full", {}),
        ("auto", "auto", "truncated:2", {}),
        ("auto", "auto", "randomized:0.5", {}),
        ("auto", "auto", "full", {"resets": none}),
    ):
        layer.memory, layer.kernel, layer.gradient = memory, kernel, gradient
        torch.manual_seed(3)
        y = layer(x, lengths=lengths, **given)[0]
        actual = pack_padded_sequence(y, lengths, first, enforce_sorted=False).data
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
