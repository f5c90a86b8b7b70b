"""Checkpoints give the gradients of the whole tape: every cell, policy, layout and schedule; and keep what they say."""

import copy
import pickle
from functools import cache
from itertools import combinations, product

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence
from torch.testing import assert_close

import bptt
from bptt.engine import Stack
from bptt.kernels.whole import WholeWalks
from bptt.memory import Checkpoints, Cut, parse
from bptt.schedules import advances, binomial

T, B, I, H = 23, 3, 4, 5

NETS = {
    "rnn": (bptt.nn.RNN, {}),
    "gru, stacked": (bptt.nn.GRU, {"num_layers": 2}),
    "lstm": (bptt.nn.LSTM, {}),
    "lstm, projected": (bptt.nn.LSTM, {"num_layers": 2, "proj_size": 3}),
    "lstm, dropout": (bptt.nn.LSTM, {"num_layers": 3, "dropout": 0.3}),
    "gru, both ways": (bptt.nn.GRU, {"bidirectional": True}),
    "gru, three both ways": (bptt.nn.GRU, {"bidirectional": True, "num_layers": 3}),
    "lstm, both ways": (bptt.nn.LSTM, {"bidirectional": True, "num_layers": 2, "dropout": 0.2, "proj_size": 3}),
}
POLICIES = ["full", "chunked:5", "chunked:9", "truncated:4", "truncated:6/3", "truncated:8/8", "randomized:0.8"]
POLICIES += ["adaptive:0.5,max=6"]
MEMORIES = ["checkpoints", "checkpoints:steps=1", "checkpoints:steps=7", "checkpoints:steps=99"]
MEMORIES += ["checkpoints:bytes=4000", "checkpoints:bytes=1000000"]


@pytest.fixture(autouse=True)
def short_segments(monkeypatch):
    """As many as sqrt(T / alpha) asks for, also where their tape is small."""
    monkeypatch.setattr("bptt.engine.segments.SEGMENT_BYTES", 0)


def run(layer, memory, lengths=None, resets=None, hx=True, seed=7):
    """Outputs and every gradient."""
    generator = torch.Generator().manual_seed(3)

    def drawn(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    x = drawn(T, B, I).requires_grad_()
    K = layer.num_layers * (2 if layer.bidirectional else 1)
    sizes = [layer.proj_size or H, H][: layer.cell().states]
    states = tuple(drawn(K, B, size).requires_grad_() for size in sizes)
    layer.memory = memory
    torch.manual_seed(seed)
    given = x if lengths is None else pack_padded_sequence(x, lengths, enforce_sorted=False)
    y, final = layer(given, (states if len(states) == 2 else states[0]) if hx else None, resets=resets)
    outputs = [y if lengths is None else y.data, *(final if isinstance(final, tuple) else (final,))]
    loss = sum((o * drawn(*o.shape)).sum() for o in outputs)
    wanted = [x, *(states if hx else ()), *layer.parameters()]
    return [*outputs, *torch.autograd.grad(loss, wanted)]


def made(net, policy):
    kind, options = NETS[net]
    torch.manual_seed(1)
    return kind(I, H, dtype=torch.float64, gradient=policy, **options)


def layouts():
    """(lengths, resets)"""
    resets = torch.rand(T, B, generator=torch.Generator().manual_seed(2)) < 0.1
    return [(None, None), ([T, 9, 16], None), ([16, 1, T], resets), (None, resets)]


@cache
def expected(net, policy, layout):
    return run(made(net, policy), "gates", *layouts()[layout])


TURNS = [
    (net, policy, memory, (i + j + k) // 2 % 4)
    for i, net in enumerate(NETS)
    for j, policy in enumerate(POLICIES)
    for k, memory in enumerate(MEMORIES)
    if (i + j + k) % 2 == 0
]
"""Half of all (net, policy, memory), each with one of the layouts, so that every two of the four meet."""


def test_every_two_of_net_policy_memory_and_layout_meet():
    axes = [list(NETS), POLICIES, MEMORIES, range(4)]
    for one, two in combinations(range(4), 2):
        assert {(case[one], case[two]) for case in TURNS} == set(product(axes[one], axes[two]))


@pytest.mark.parametrize(("net", "policy", "memory", "layout"), TURNS)
def test_the_same_gradients(net, policy, memory, layout):
    layer = made(net, policy)
    if net == "gru, three both ways" and memory == "checkpoints:bytes=4000":  # less than what lies between layers
        memory = "checkpoints:bytes=12000"
    got = run(layer, memory, *layouts()[layout])
    assert_close(got, expected(net, policy, layout), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kernel", ["cpu", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_kernels(kernel, dtype):
    torch.manual_seed(0)
    layer = bptt.nn.LSTM(I, H, kernel=kernel, gradient="truncated:6", dtype=dtype)
    x = torch.randn(T, B, I, dtype=dtype)
    grads = []
    for memory in ("gates", "checkpoints"):
        layer.memory = memory
        layer(x)[0].square().sum().backward()
        grads.append([p.grad.clone() for p in layer.parameters()])
        layer.zero_grad()
    assert_close(grads[1], grads[0])


@pytest.mark.parametrize("kernel", ["cpu", "eager"])
@pytest.mark.parametrize("policy", ["full", "truncated:4"])
@pytest.mark.parametrize("net", ["lstm", "lstm, projected", "gru, stacked", "gru, three both ways"])
def test_backward_inside_autocast(net, policy, kernel):
    """The walks have the precision of those of the whole tape; of bfloat16 a segment starts from rounded states."""
    kind, options = NETS[net]
    torch.manual_seed(1)
    layer = kind(I, H, gradient=policy, kernel=kernel, **options)
    x = torch.randn(T, B, I)
    grads = []
    for memory in ("gates", "checkpoints:steps=5"):
        layer.memory = memory
        with torch.autocast("cpu", dtype=torch.bfloat16):
            layer(x)[0].float().square().sum().backward()
            without = bptt.gradients(layer, x, torch.ones(T, B, layer(x)[0].shape[2])).parameters
            low = layer(x)[0].dtype == torch.bfloat16 and net == "lstm"
        grads.append([*(p.grad.clone() for p in layer.parameters()), *without.values()])
        layer.zero_grad()
    assert_close(grads[1], grads[0], **({"rtol": 0.02, "atol": 0.05} if low else {}))


def test_randomized_cuts_are_replayed():
    torch.manual_seed(0)
    layer = bptt.nn.GRU(I, H, gradient="randomized:0.5", dtype=torch.float64)
    first, again, other = (run(layer, "checkpoints:steps=3", seed=seed) for seed in (1, 1, 2))
    assert_close(again, first, rtol=0, atol=0)
    assert not torch.equal(first[-3], other[-3])


@pytest.mark.parametrize("net", ["lstm, projected", "gru, both ways", "lstm, both ways"])
def test_gradients_without_autograd(net):
    kind, options = NETS[net]
    torch.manual_seed(1)
    layer = kind(I, H, dtype=torch.float64, gradient="truncated:5", **options).eval()
    x = torch.randn(T, B, I, dtype=torch.float64)
    dy = torch.randn_like(layer(x)[0])
    expected = bptt.gradients(layer, x, dy)
    layer.memory = Checkpoints(steps=4)
    got = bptt.gradients(layer, x, dy)
    assert_close(got.parameters, expected.parameters)
    assert_close((got.x, *got.layer_adjoints), (expected.x, *expected.layer_adjoints))


def test_double_backward():
    torch.manual_seed(0)
    layer = bptt.nn.LSTM(2, 3, dtype=torch.float64, memory="checkpoints:steps=2")
    x = torch.randn(5, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: layer(x)[0], x)


def test_gradcheck():
    torch.manual_seed(0)
    layer = bptt.nn.GRU(2, 3, num_layers=2, dtype=torch.float64, memory="checkpoints:steps=2")
    x = torch.randn(5, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: layer(x)[0], x)


def test_no_lanes_and_one_step():
    layer = bptt.nn.LSTM(I, H, memory="checkpoints")
    y, _ = layer(torch.zeros(4, 0, I))
    y.sum().backward()
    assert not layer.weight_hh_l0.grad.any()
    x = torch.randn(1, B, I)
    layer(x)[0].sum().backward()


def taped(layer, T, B):
    """Bytes that a forward call leaves alive beyond its output."""
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    x = torch.randn(T, B, I)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y, _ = layer(x)
    for own in (x, y, *layer.parameters()):
        kept.pop(own.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def test_the_tape_is_what_was_asked_for():
    T, B = 600, 4
    layer = bptt.nn.LSTM(I, 16, memory="gates")
    state, step = 4 * B * 2 * 16, 4 * B * 6 * 16
    whole = taped(layer, T, B)
    assert whole >= 0.8 * T * step  # the states that y is a part of count as y
    layer.memory = Checkpoints(steps=50)
    assert taped(layer, T, B) <= 11 * state + 5000
    budget = 60 * state
    layer.memory = Checkpoints(bytes=budget)
    assert taped(layer, T, B) <= budget + 5000


def test_the_tape_both_ways_is_what_was_asked_for():
    T, B = 600, 4
    layer = bptt.nn.LSTM(I, 16, num_layers=2, bidirectional=True)
    between, state, step = 4 * B * 2 * 16 * T, 4 * B * 2 * 16, 4 * B * 6 * 16
    for budget in (between + 20 * step, between + 200 * step):
        layer.memory = Checkpoints(bytes=budget)
        told = bptt.plan(layer, T, B)
        assert told.tape_bytes <= budget + 5 * state  # the initial states: four, and the first in a segment's tape
        assert taped(layer, T, B) + told.steps * step <= budget + 5000
    layer.memory = Checkpoints(bytes=between)
    with pytest.raises(ValueError, match="tape of a step and the outputs between the layers, 308,736 bytes: got 307,2"):
        layer(torch.randn(T, B, I))


@pytest.mark.parametrize("slots", ["steps=4", "bytes=9000"])
@pytest.mark.parametrize("layout", range(4))
def test_blocks_both_ways_in_many_groups(monkeypatch, layout, slots):
    """A group of blocks runs only the segments that its blocks cross."""
    monkeypatch.setattr("bptt.kernels.sums.SWEEP_VALUES", 1)
    layer = made("lstm, both ways", "truncated:6/2")
    got = run(layer, f"checkpoints:{slots}", *layouts()[layout])
    monkeypatch.undo()
    assert_close(got, expected("lstm, both ways", "truncated:6/2", layout), rtol=1e-10, atol=1e-12)


@pytest.fixture
def ran(monkeypatch):
    """The steps of every stack that is run, and of every whole pass over a layer and direction forward."""
    steps, forward = [], Stack._forward

    def counted(self, x, tensors, keep):
        steps.append(len(x))
        return forward(self, x, tensors, keep)

    def counted_whole(own):
        def whole(self, tensors, *others):
            steps.append(len(tensors[0]))
            return own(self, tensors, *others)

        return whole

    monkeypatch.setattr(Stack, "_forward", counted)
    for name in ("infer", "taped"):
        monkeypatch.setattr(WholeWalks, name, counted_whole(getattr(WholeWalks, name)))
    return steps


@pytest.mark.parametrize(
    ("policy", "memory", "again"),
    [
        ("full", "checkpoints", 240),
        ("full", "checkpoints:steps=7", 240),
        ("full", "checkpoints:steps=1000", 240),
        ("full", "checkpoints:bytes=1000000", 0),  # all of it fits
        ("chunked:20", "checkpoints", 240),
        ("chunked:20", "checkpoints:steps=7", 240),  # a chunk in parts of 7, 7 and 6
        ("chunked:20", "checkpoints:steps=19", 240),
        ("chunked:20", "checkpoints:steps=39", 240),
        ("chunked:20", "checkpoints:steps=1000", 240),
        ("chunked:20", "checkpoints:bytes=60000", 240),
        ("truncated:20/10", "checkpoints", 240),
        ("randomized:0.9", "checkpoints:steps=50", 240),
    ],
)
def test_one_level_runs_every_step_once_more(ran, policy, memory, again):
    layer = bptt.nn.LSTM(I, H, dtype=torch.float64, gradient=policy, memory=memory)
    y, _ = layer(torch.randn(240, B, I, dtype=torch.float64))
    assert sum(ran) == 240
    ran.clear()
    y.sum().backward()
    assert sum(ran) == again


def test_a_segment_is_not_shorter_than_worth_its_while(monkeypatch):
    monkeypatch.undo()
    layer = bptt.nn.LSTM(I, 64, memory="checkpoints")  # a tape of 1536 bytes a step and lane
    assert bptt.plan(layer, 10_000, 1).steps == 2**20 // 1536
    assert bptt.plan(layer, 10_000, 64).steps == 58


@pytest.mark.parametrize("kind", [bptt.nn.GRU, bptt.nn.LSTM])
@pytest.mark.parametrize("budget", [2000, 3000, 5000, 8000])
def test_binomial_runs_as_often_as_the_closed_form_says(ran, kind, budget):
    """What is run in backward: the advances, less those of the way forward, and each segment once more."""
    T, layers = 240, 2
    layer = kind(I, H, num_layers=layers, dtype=torch.float64, memory=Checkpoints(bytes=budget))
    y, _ = layer(torch.randn(T, B, I, dtype=torch.float64))
    states = layer.cell().states
    state, tape = 8 * B * H * (states * layers - 1), 8 * B * H * (states + 4) * layers  # the top layer's h is in y
    cut = Checkpoints(bytes=budget).cut(T, state, tape, later=8 * B * H * states * layers)
    segments = -(-T // cut.steps)
    assert cut.slots < segments - 1
    assert len(ran) == segments
    ran.clear()
    y.sum().backward()
    stored = binomial(segments, cut.slots).stored_forward
    assert len(ran) == segments + advances(segments, cut.slots) - max(stored, default=0)


@pytest.mark.parametrize("budget", [6, 10, 20, 40, 60, 100, 692, 1000, 20_000, 60_000, 10**9])
def test_a_cut_fits_its_budget(budget):
    T, state, tape = 10_000, 2, 6
    cut = Checkpoints(bytes=budget).cut(T, state, tape)
    assert cut.steps * tape + cut.slots * state <= max(budget, tape) or cut == Cut(T, 0)
    if budget >= T * tape:
        assert cut == Cut(T, 0)
    if budget >= 700:  # from there on one level is enough
        assert cut.slots == -(-T // cut.steps) - 1


def test_text_forms():
    for policy in (Checkpoints(), Checkpoints(steps=3), Checkpoints(bytes=10)):
        assert parse(str(policy)) == policy
    assert bptt.nn.GRU(2, 3, memory="checkpoints:steps=9").memory == Checkpoints(steps=9)
    assert "memory=checkpoints:steps=9" in repr(bptt.nn.GRU(2, 3, memory=bptt.Checkpoints(steps=9)))
    layer = bptt.convert(torch.nn.GRU(2, 3), memory=Checkpoints(steps=9))
    assert layer.memory == Checkpoints(steps=9)
    assert "runs segments again: memory='checkpoints:steps=9'" in bptt.explain(layer, torch.zeros(10, 1, 2))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Checkpoints(steps=0), ValueError, "steps must be at least 1: got 0"),
        (lambda: Checkpoints(bytes=2.5), TypeError, r"bytes must be a whole number: got 2\.5"),
        (lambda: Checkpoints(steps=2, bytes=3), ValueError, "steps or bytes, not both"),
        (lambda: parse("checkpoints:3"), ValueError, "memory must be one of 'auto'.*got 'checkpoints:3'"),
        (lambda: parse("all"), ValueError, "memory must be one of 'auto'"),
        (lambda: parse(3), ValueError, "memory must be one of"),
        (lambda: Checkpoints(bytes=5).cut(10, 2, 6), ValueError, "bytes must hold the tape of a step, 6 bytes: got 5"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of torch's own tracer
def test_compiled():
    torch.manual_seed(0)
    layer = bptt.nn.GRU(I, H, memory="checkpoints:steps=4")
    x = torch.randn(T, B, I)
    compiled = torch.compile(layer, backend="eager")
    compiled(x)[0].sum().backward()
    got = layer.weight_hh_l0.grad.clone()
    layer.zero_grad()
    layer(x)[0].sum().backward()
    assert_close(got, layer.weight_hh_l0.grad)


def test_exported():
    layer, x = bptt.nn.GRU(I, H, memory="checkpoints:steps=4"), torch.randn(T, B, I)
    with pytest.raises(NotImplementedError, match="memory='checkpoints:steps=4' cannot be exported with a gradient"):
        torch.export.export(layer, (x,))
    with torch.no_grad():
        assert_close(torch.export.export(layer, (x,)).module()(x)[0], layer(x)[0])


def test_copies():
    layer = bptt.nn.LSTM(I, H, memory="checkpoints:steps=4")
    x = torch.randn(T, B, I)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.memory == layer.memory
        assert_close(twin(x)[0], layer(x)[0])
