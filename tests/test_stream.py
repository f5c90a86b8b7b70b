"""`stream_gradients` is one backward pass over all steps, whatever is in memory at once."""

from collections import deque

import numpy as np
import pytest
import torch
from resident import lines_of, needs_status
from torch.nn.utils.rnn import pack_sequence
from torch.testing import assert_close

import bptt

T, B, I, H = 31, 3, 4, 5
NETS = {"rnn": (bptt.nn.RNN, {}), "gru": (bptt.nn.GRU, {"num_layers": 2}), "lstm": (bptt.nn.LSTM, {"proj_size": 3})}


@pytest.fixture(autouse=True)
def short_segments(monkeypatch):
    """As many as sqrt(T / alpha) asks for, also where their tape is small."""
    monkeypatch.setattr("bptt.engine.segments.SEGMENT_BYTES", 0)


@pytest.mark.parametrize("memory", ["checkpoints", "checkpoints:steps=7", "checkpoints:bytes=4000"])
@pytest.mark.parametrize("policy", ["full", "chunked:6", "truncated:9", "truncated:6/4", "randomized:0.7"])
@pytest.mark.parametrize("net", NETS)
def test_the_same_gradients(net, policy, memory):
    kind, options = NETS[net]
    torch.manual_seed(0)
    layer = kind(I, H, dtype=torch.float64, gradient=policy, **options)
    head = torch.nn.Linear(options.get("proj_size", H), 2, dtype=torch.float64)
    x, weights = torch.randn(T, B, I, dtype=torch.float64), torch.randn(T, B, 2, dtype=torch.float64)
    sizes = [options.get("proj_size", H), H][: layer.cell().states]
    states = tuple(torch.randn(layer.num_layers, B, size, dtype=torch.float64).requires_grad_() for size in sizes)
    hx = states if len(states) == 2 else states[0]

    def loss(steps, y):
        return (head(y).tanh() * weights[steps]).sum()

    torch.manual_seed(5)
    y, final = layer(x, hx)
    expected = loss(slice(0, T), y)
    grads = torch.autograd.grad(expected, [*layer.parameters(), *head.parameters(), *states])
    torch.manual_seed(5)
    found = bptt.stream_gradients(layer, x, loss, hx, wrt=head.parameters(), memory=memory)
    assert found.loss == pytest.approx(expected.item())
    got = [*found.parameters.values(), *found.wrt, *(found.hx if len(states) == 2 else (found.hx,))]
    assert_close(got, list(grads), rtol=1e-10, atol=1e-12)
    assert_close(found.final, tuple(f.detach() for f in final) if len(states) == 2 else final.detach())
    assert all(p.grad is None for p in (*layer.parameters(), *head.parameters()))


@pytest.mark.parametrize("mode", ["c", "r"])
def test_a_memory_map(tmp_path, mode):
    data = np.random.default_rng(0).normal(size=(T, B, I)).astype(np.float32)
    np.save(tmp_path / "x.npy", data)
    np.save(tmp_path / "resets.npy", np.arange(T * B).reshape(T, B) % 7 == 3)
    x, resets = (np.load(tmp_path / f"{name}.npy", mmap_mode=mode) for name in ("x", "resets"))
    layer = bptt.nn.GRU(I, H)
    found = bptt.stream_gradients(layer, x, lambda steps, y: y.square().sum(), resets=resets)
    layer(torch.from_numpy(data), resets=torch.from_numpy(np.array(resets)))[0].square().sum().backward()
    assert_close(found.parameters["weight_ih_l0"], layer.weight_ih_l0.grad)


@pytest.mark.parametrize("as_given", [lambda x: x[::-1], lambda x: x.astype(">f4")])
def test_arrays_that_torch_does_not_take(as_given):
    data = as_given(np.random.default_rng(0).normal(size=(T, B, I)).astype(np.float32))
    layer = bptt.nn.GRU(I, H)
    found = bptt.stream_gradients(layer, data, lambda steps, y: y.square().sum())
    layer(torch.tensor(data.tolist()))[0].square().sum().backward()
    assert_close(found.parameters["weight_ih_l0"], layer.weight_ih_l0.grad)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("lengths", [[31], [1] * 31, [4, 13, 0, 14]])
def test_an_iterator_of_pieces_under_a_chunked_policy(net, lengths):
    layer, head, x, loss, seen = chunked(net)
    found = bptt.stream_gradients(layer, iter(x.split(lengths)), loss, wrt=head.parameters())
    assert seen == [slice(0, 6), slice(6, 12), slice(12, 18), slice(18, 24), slice(24, 30), slice(30, 31)]
    same(found, bptt.stream_gradients(layer, x, loss, wrt=head.parameters()))


def chunked(net):
    """(a layer, a head, x, their loss, the list of the slices it sees) under chunks of 6."""
    kind, options = NETS[net]
    torch.manual_seed(0)
    layer = kind(I, H, dtype=torch.float64, gradient="chunked:6", **options)
    head = torch.nn.Linear(options.get("proj_size", H), 2, dtype=torch.float64)
    x, weights = torch.randn(T, B, I, dtype=torch.float64), torch.randn(T, B, 2, dtype=torch.float64)
    seen = []

    def loss(steps, y):
        seen.append(steps)
        return (head(y).tanh() * weights[steps]).sum()

    return layer, head, x, loss, seen


def same(found, expected):
    assert found.loss == pytest.approx(expected.loss, rel=1e-12)
    for name in ("parameters", "wrt", "hx", "final"):
        assert_close(getattr(found, name), getattr(expected, name), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("memory", ["steps=4", "steps=1", "bytes"])
def test_checkpoints_within_a_chunk(net, memory):
    layer, head, x, loss, seen = chunked(net)
    if memory == "bytes":
        memory = {"rnn": "bytes=500", "gru": "bytes=4000", "lstm": "bytes=2000"}[net]
    found = bptt.stream_gradients(layer, x.split(8), loss, wrt=head.parameters(), memory=f"checkpoints:{memory}")
    assert len(seen) > 6
    if memory == "steps=4":
        assert seen[:4] == [slice(4, 6), slice(0, 4), slice(10, 12), slice(6, 10)]
    same(found, bptt.stream_gradients(layer, x, loss, wrt=head.parameters()))


class Slices:
    """A view of a piece that tells what of it is read."""

    def __init__(self, x):
        self.x, self.read = x, []

    shape = property(lambda self: self.x.shape)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, steps):
        self.read.append(len(self.x[steps]))
        return self.x[steps]


@pytest.mark.parametrize(
    "as_given",
    [
        lambda x: x.split(10),
        lambda x: list(x.split(10)),
        lambda x: [piece.numpy() for piece in x.split(10)],
        lambda x: refilled(x),
    ],
)
def test_forms_of_pieces(as_given):
    layer, head, x, loss, _ = chunked("gru")
    found = bptt.stream_gradients(layer, as_given(x), loss, wrt=head.parameters())
    same(found, bptt.stream_gradients(layer, x, loss, wrt=head.parameters()))


def refilled(x):
    """Pieces in one buffer, each written over the one before."""
    buffer = torch.empty_like(x[:5])
    for piece in x.split(5):
        yield buffer[: len(piece)].copy_(piece)


def test_every_step_of_a_long_piece_is_read_once():
    layer, _, x, loss, _ = chunked("lstm")
    pieces = [Slices(x[:20]), Slices(x[20:])]
    bptt.stream_gradients(layer, pieces, loss)
    assert [piece.read for piece in pieces] == [[6, 6, 6, 2], [4, 6, 1]]


@pytest.mark.parametrize(
    ("policy", "whole"), [("full", True), ("chunked:6", True), ("chunked:6", False), ("truncated:9", True)]
)
def test_no_loss_at_all(policy, whole):
    x = torch.randn(T, B, I)
    found = bptt.stream_gradients(
        bptt.nn.LSTM(I, H, gradient=policy), x if whole else x.split(8), lambda steps, y: None
    )
    assert found.loss == 0
    assert not any(g.any() for g in (*found.parameters.values(), *found.hx))


@pytest.mark.parametrize(
    ("policy", "whole"),
    [("full", True), ("chunked:6", True), ("chunked:6", False), ("truncated:6/4", True), ("randomized:0.7", True)],
)
def test_resets(policy, whole):
    """Against the layer's own resets; NumPy's bool too, and a long stream in pieces."""
    torch.manual_seed(0)
    layer = bptt.nn.LSTM(I, H, num_layers=2, dtype=torch.float64, gradient=policy)
    x, resets = torch.randn(T, B, I, dtype=torch.float64), torch.rand(T, B) < 0.2
    weights = torch.randn(T, B, H, dtype=torch.float64)
    torch.manual_seed(3)
    found = bptt.stream_gradients(
        layer,
        x if whole else iter(x.split([5, 20, 6])),
        lambda steps, y: (y * weights[steps]).sum(),
        resets=resets.numpy() if whole else resets,
    )
    torch.manual_seed(3)
    y, final = layer(x, resets=resets)
    (y * weights).sum().backward()
    assert_close(found.parameters, {n: p.grad for n, p in layer.named_parameters()}, rtol=1e-10, atol=1e-12)
    assert_close(found.final, tuple(s.detach() for s in final))


@pytest.mark.parametrize("policy", ["full", "truncated:6/4", "randomized:0.7"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_pieces_under_every_policy(policy, dtype, monkeypatch):
    """Laid down in a file, in parts smaller and larger than the pieces; nothing is left of it."""
    torch.manual_seed(0)
    layer = bptt.nn.LSTM(I, H, dtype=dtype, gradient=policy)
    x, resets = torch.randn(T, B, I, dtype=dtype), torch.rand(T, B) < 0.1
    found = []
    for given, steps in ((x, 0), (x.split([1, 20, 10]), 7), (iter(x.split(4)), 1000)):
        monkeypatch.setattr("bptt.nn._stream.STEPS", steps)
        torch.manual_seed(3)
        loss = bptt.stream_gradients(layer, given, lambda steps, y: y.square().sum(), resets=resets)
        found.append((loss.parameters, loss.hx, loss.final))
    assert_close(found[1], found[0], rtol=0, atol=0)
    assert_close(found[2], found[0], rtol=0, atol=0)


def test_losses_at_some_steps_only():
    layer, x = bptt.nn.LSTM(I, H, dtype=torch.float64), torch.randn(T, B, I, dtype=torch.float64)
    seen = []

    def last(steps, y):
        seen.append((steps.start, steps.stop))
        return y[-1].sum() if steps.stop == T else None

    found = bptt.stream_gradients(layer, x, last, memory="checkpoints:steps=10")
    layer(x)[0][-1].sum().backward()
    assert_close(found.parameters["weight_hh_l0"], layer.weight_hh_l0.grad)
    assert seen == [(30, 31), (20, 30), (10, 20), (0, 10)]


SCRIPT = """
import torch, bptt
torch.set_num_threads(1)

class Ones:
    def __len__(self): return 200_000
    def __getitem__(self, steps): return torch.ones(len(range(*steps.indices(len(self)))), 2, 8)

layer = bptt.nn.LSTM(8, 16)
bptt.stream_gradients(layer, torch.ones(50, 2, 8), lambda steps, y: y.sum())
before = peak()
found = bptt.stream_gradients(layer, Ones(), lambda steps, y: y.sum())
print(peak() - before)
"""


@pytest.mark.slow
@needs_status
def test_a_long_sequence_takes_little_memory():
    """x and y would take 39 MiB, the whole tape 146 MiB."""
    (grown,) = lines_of(SCRIPT)
    assert 0 < float(grown) < 20


class Whole:
    """What ignores its slices."""

    def __len__(self):
        return T

    def __getitem__(self, steps):
        return torch.zeros(T, B, I)


class Longer:
    """40 steps by its length, 31 by its slices; the last ones narrower if asked."""

    def __init__(self, steps=40, last=I):
        self.steps, self.last = steps, last

    def __len__(self):
        return self.steps

    def __getitem__(self, steps):
        return torch.zeros(T, B, I if steps.stop < 25 else self.last)[steps]


CHUNKED = {"gradient": "chunked:3"}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"layer": torch.nn.GRU(I, H)}, TypeError, "layer must be a bptt.nn"),
        ({"layer": bptt.nn.GRU(I, H, bidirectional=True)}, ValueError, "layer must be one-directional"),
        ({"x": 3}, TypeError, "x must have a length and slices of steps, or be an iterable of pieces: got int"),
        ({"x": iter([])}, ValueError, "x must have at least 1 step: got 0"),
        ({"x": [torch.zeros(2, B, I), torch.zeros(2, 7, I)]}, ValueError, r"pieces \[n, 3, 4\] like the first: got"),
        ({"x": pack_sequence([torch.zeros(T, I)])}, TypeError, "x must be .*got a PackedSequence"),
        ({"x": torch.nested.nested_tensor([torch.zeros(T, I)], layout=torch.jagged)}, TypeError, "got a nested tensor"),
        ({"x": torch.zeros(T, 1, I).to_sparse()}, TypeError, "x must be a dense tensor: got layout torch.sparse_coo"),
        ({"x": pack_sequence([torch.zeros(T, I)]), **CHUNKED}, TypeError, "x must be .*got a PackedSequence"),
        ({"x": deque([torch.zeros(T, B, I)]), **CHUNKED}, TypeError, r"x must have slices .*got deque, whose \[0:1\]"),
        ({"x": iter([]), **CHUNKED}, ValueError, "x must have at least 1 step"),
        ({"x": iter([torch.zeros(2, 3)]), **CHUNKED}, ValueError, r"time first: got a Tensor \[2, 3\]"),
        ({"x": [[[0.0] * I] * B], **CHUNKED}, ValueError, r"time first: got a list \[\]"),
        ({"x": [torch.zeros(2, 3, I), torch.zeros(2, 2, I)], **CHUNKED}, ValueError, r"\[n, 3, 4\].*got \[2, 2, 4\]"),
        ({"x": [torch.zeros(2, 3, I), torch.zeros(2, 3, 7)], **CHUNKED}, ValueError, r"\[n, 3, 4\].*got \[2, 3, 7\]"),
        ({"x": [torch.zeros(T, B, I)], "memory": "checkpoints:bytes=9", **CHUNKED}, ValueError, "bytes must hold"),
        ({"x": [torch.zeros(T, B, I)], "memory": "states", **CHUNKED}, ValueError, "memory must be Checkpoints"),
        ({"x": torch.zeros(0, B, I)}, ValueError, "x must have at least 1 step"),
        ({"x": torch.zeros(T, I)}, ValueError, r"x must be \[T, B, I\]"),
        ({"x": torch.zeros(T, B, 7)}, RuntimeError, "input"),
        ({"x": Whole()}, ValueError, r"x\[0:1\] must be \[1, 3, 4\]: got \[31, 3, 4\]"),
        ({"x": Longer()}, ValueError, r"x\[30:40\] must be \[10, 3, 4\]: got \[1, 3, 4\]"),
        ({"x": Longer(T, last=2)}, ValueError, r"x\[20:30\] must be \[10, 3, 4\]: got \[10, 3, 2\]"),
        ({"loss": lambda steps, y: y}, TypeError, "loss must give a scalar tensor or None"),
        ({"loss": None}, TypeError, "loss must be a function of .*got NoneType"),
        ({"wrt": torch.ones(2, requires_grad=True)}, TypeError, "wrt must be an iterable of tensors: got a Tensor"),
        ({"wrt": [torch.ones(2, requires_grad=True), torch.ones(3)]}, ValueError, r"wrt\[1\] must require a gradient"),
        ({"wrt": ["weight"]}, TypeError, r"wrt\[0\] must be a tensor: got str"),
        ({"resets": iter([])}, TypeError, "resets must have slices .*got list_iterator"),
        ({"resets": True}, TypeError, "resets must have slices .*got bool"),
        ({"resets": torch.zeros(T, B)}, TypeError, "resets must be bool"),
        ({"resets": torch.zeros(T, 7, dtype=torch.bool)}, ValueError, r"resets must be \[T, B\], here .*got \[31, 7\]"),
        ({"resets": torch.zeros(T + 1, B, dtype=torch.bool)}, ValueError, "with x's 31 steps: got 32"),
        (
            {"x": [torch.zeros(T, B, I)], "resets": torch.zeros(T + 1, B, dtype=torch.bool), **CHUNKED},
            ValueError,
            "resets must be .* with x's 31 steps: got 32",
        ),
        ({"memory": "gates"}, ValueError, "memory must be Checkpoints"),
    ],
)
def test_bad_arguments(arguments, error, message):
    good = {"layer": bptt.nn.GRU(I, H), "x": torch.zeros(T, B, I), "loss": lambda steps, y: y.sum()}
    with pytest.raises(error, match=message):
        bptt.stream_gradients(**({"memory": "checkpoints:steps=10"} | good | arguments))
