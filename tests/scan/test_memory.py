"""Checkpoints in a scan: the same gradients from fewer carries."""

import pytest
import torch
from torch.testing import assert_close

import bptt

T, B = 17, 3
SIZES = ["steps=1", "steps=5", "steps=99", "bytes=2000", "bytes=1300", "bytes=700", "bytes=500", "bytes=250"]
MEMORIES = ["checkpoints", *(f"checkpoints:{size}" for size in SIZES)]
POLICIES = ["full", "chunked:4", "truncated:3", "truncated:6/2", "randomized:0.7"]


def run(memory, policy, resets=None, draws=False):
    torch.manual_seed(0)
    cell = torch.nn.LSTMCell(2, 4, dtype=torch.float64)
    x = torch.randn(T, B, 2, dtype=torch.float64, requires_grad=True)
    h = torch.randn(B, 4, dtype=torch.float64, requires_grad=True)
    c = torch.randn(B, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(T, B, 4, dtype=torch.float64)

    def step(carry, x):
        h, c, count = carry
        h, c = cell(torch.nn.functional.dropout(x, 0.5) if draws else x, (h, c))
        return (h, c, count + 1), h

    torch.manual_seed(5)
    count = torch.zeros(B, dtype=torch.int64)
    (h_n, c_n, n), ys = bptt.scan(step, (h, c, count), x, gradient=policy, resets=resets, memory=memory)
    loss = (ys * weights).sum() + h_n.sum() + 2 * c_n.sum()
    return [ys, h_n, c_n, n, *torch.autograd.grad(loss, [x, h, c, *cell.parameters()])]


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_gradients(memory, policy):
    resets = torch.rand(T, B, generator=torch.Generator().manual_seed(1)) < 0.15
    for options in ({}, {"resets": resets}, {"draws": True}):
        assert_close(run(memory, policy, **options), run("auto", policy, **options), rtol=1e-10, atol=1e-12)


def test_fewer_carries_are_kept():
    def kept(memory):
        found = {}

        def pack(t):
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            w = torch.ones(1000, requires_grad=True)
            bptt.scan(lambda c, _: (w * c, c.sum()), torch.ones(1000), length=400, memory=memory)
        return sum(found.values())

    assert kept("auto") > 400 * 4000
    assert kept("checkpoints") < 25 * 4000
    assert kept("checkpoints:bytes=200000") < 50 * 4000 + 10_000


def test_a_second_derivative():
    w = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def last(w):
        return bptt.scan(lambda c, _: (torch.sin(w * c), None), torch.ones((), dtype=torch.float64), length=6,
                         memory="checkpoints:steps=2")[0]  # fmt: skip

    assert torch.autograd.gradgradcheck(last, w)


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        ("gates", "has no gates"),
        ("some", "memory must be one of"),
        ("checkpoints:bytes=7", "bytes must hold the tape of a step, 8 bytes"),
    ],
)
def test_bad_arguments(memory, message):
    with pytest.raises(ValueError, match=message):
        bptt.scan(lambda c, _: (2 * c, c), torch.ones(2, requires_grad=True), length=50, memory=memory)
    with pytest.raises(ValueError, match="the carries are checkpoints"):
        bptt.scan(lambda c, _: (2 * c, c), torch.ones(2, 2, requires_grad=True), length=5, gradient="chunked:2",
                  rows="independent", memory="checkpoints:steps=2")  # fmt: skip
