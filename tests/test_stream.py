"""`stream_gradients` is one backward pass over all steps, whatever is in memory at once."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import bptt

T, B, I, H = 31, 3, 4, 5
NETS = {"rnn": (bptt.nn.RNN, {}), "gru": (bptt.nn.GRU, {"num_layers": 2}), "lstm": (bptt.nn.LSTM, {"proj_size": 3})}


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


def test_a_memory_map(tmp_path):
    data = np.random.default_rng(0).normal(size=(T, B, I)).astype(np.float32)
    np.save(tmp_path / "x.npy", data)
    layer = bptt.nn.GRU(I, H)
    found = bptt.stream_gradients(layer, np.load(tmp_path / "x.npy", mmap_mode="c"), lambda steps, y: y.square().sum())
    layer(torch.from_numpy(data))[0].square().sum().backward()
    assert_close(found.parameters["weight_ih_l0"], layer.weight_ih_l0.grad)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("lengths", [[31], [1] * 31, [4, 13, 0, 14]])
def test_an_iterator_of_pieces_under_a_chunked_policy(net, lengths):
    kind, options = NETS[net]
    torch.manual_seed(0)
    layer = kind(I, H, dtype=torch.float64, gradient="chunked:6", **options)
    head = torch.nn.Linear(options.get("proj_size", H), 2, dtype=torch.float64)
    x, weights = torch.randn(T, B, I, dtype=torch.float64), torch.randn(T, B, 2, dtype=torch.float64)
    seen = []

    def loss(steps, y):
        seen.append(steps.stop - steps.start)
        return (head(y).tanh() * weights[steps]).sum()

    found = bptt.stream_gradients(layer, iter(x.split(lengths)), loss, wrt=head.parameters())
    assert seen == [6, 6, 6, 6, 6, 1]
    expected = bptt.stream_gradients(layer, x, loss, wrt=head.parameters())
    assert found.loss == pytest.approx(expected.loss)
    assert_close(found.parameters, expected.parameters, rtol=1e-10, atol=1e-12)
    assert_close(
        (found.wrt, found.hx, found.final), (expected.wrt, expected.hx, expected.final), rtol=1e-10, atol=1e-12
    )


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
import resource, sys
import torch, bptt
torch.set_num_threads(1)

class Ones:
    def __len__(self): return 200_000
    def __getitem__(self, steps): return torch.ones(len(range(*steps.indices(len(self)))), 2, 8)

layer = bptt.nn.LSTM(8, 16)
bptt.stream_gradients(layer, torch.ones(50, 2, 8), lambda steps, y: y.sum())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = bptt.stream_gradients(layer, Ones(), lambda steps, y: y.sum())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_long_sequence_takes_little_memory():
    """x and y would take 39 MiB, the whole tape 146 MiB."""
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 20 * 1024  # KiB


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"layer": torch.nn.GRU(I, H)}, TypeError, "layer must be a bptt.nn"),
        ({"layer": bptt.nn.GRU(I, H, bidirectional=True)}, ValueError, "layer must be one-directional"),
        ({"x": iter([])}, TypeError, "x must have a length and slices.*got list_iterator under full"),
        ({"x": iter([]), "gradient": "chunked:3"}, ValueError, "x must have at least 1 step"),
        ({"x": iter([torch.zeros(2, 3)]), "gradient": "chunked:3"}, ValueError, "got one with 2 dimensions"),
        ({"x": torch.zeros(0, B, I)}, ValueError, "x must have at least 1 step"),
        ({"x": torch.zeros(T, I)}, ValueError, r"x must be \[T, B, I\]"),
        ({"x": torch.zeros(T, B, 7)}, RuntimeError, "input"),
        ({"loss": lambda steps, y: y}, TypeError, "loss must give a scalar tensor or None"),
        ({"resets": torch.zeros(T, B)}, TypeError, "resets must be bool"),
        ({"resets": torch.zeros(T, 7, dtype=torch.bool)}, ValueError, r"resets must be \[T, B\], here .*got \[31, 7\]"),
        ({"resets": torch.zeros(T + 1, B, dtype=torch.bool)}, ValueError, "with x's 31 steps: got 32"),
        ({"memory": "gates"}, ValueError, "memory must be Checkpoints"),
    ],
)
def test_bad_arguments(arguments, error, message):
    good = {"layer": bptt.nn.GRU(I, H), "x": torch.zeros(T, B, I), "loss": lambda steps, y: y.sum()}
    with pytest.raises(error, match=message):
        bptt.stream_gradients(**(good | arguments))
