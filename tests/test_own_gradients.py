"""No two gradients share memory: clipping, for one, multiplies each of them in place."""

from itertools import combinations

import pytest
import torch
from torch import Tensor

import bptt
from bptt.nn import LAYERS


def spans(named: dict[str, Tensor]) -> dict[str, tuple[int, int]]:
    """Where the gradient of each tensor begins and ends."""
    grads = {name: t.grad for name, t in named.items() if t.grad is not None}
    return {name: (g.data_ptr(), g.data_ptr() + g.nbytes) for name, g in grads.items()}


def check_apart(named: dict[str, Tensor]) -> None:
    found = spans(named)
    assert set(found) == set(named)
    shared = [(a, b) for (a, (s, e)), (b, (t, f)) in combinations(found.items(), 2) if s < f and t < e]
    assert shared == []


@pytest.mark.parametrize("memory", ["auto", "states", "checkpoints:steps=4"])
@pytest.mark.parametrize("gradient", ["full", "chunked:3", "truncated:4/2"])
@pytest.mark.parametrize("kernel", ["cpu", "fused", "eager"])
@pytest.mark.parametrize("cell", [name for name, layer in LAYERS.items() if layer.torchs is not None])
def test_of_layers(cell: str, kernel: str, gradient: str, memory: str) -> None:
    for layers, both_ways, sizes in ((1, False, (3, 4)), (2, True, (3, 4)), (1, False, (40, 64))):
        kind: type = LAYERS[cell]
        layer = kind(*sizes, layers, bidirectional=both_ways, gradient=gradient, kernel=kernel, memory=memory)
        x = torch.randn(9, 20, sizes[0], requires_grad=True)
        y, _ = layer(x)
        y.square().sum().backward()
        check_apart({"x": x, **dict(layer.named_parameters())})


@pytest.mark.parametrize("gradient", ["full", "chunked:3", "truncated:4/2"])
@pytest.mark.parametrize("kernel", ["auto", "eager", "replay"])
def test_of_steps(kernel: str, gradient: str) -> None:
    W, b, c = (
        torch.randn(4, 4, requires_grad=True),
        torch.randn(4, requires_grad=True),
        torch.randn(4, requires_grad=True),
    )

    def step(h: Tensor, x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        h = torch.tanh(h @ W + x[0] + x[1] + b + c)
        return h, h

    for _ in range(4):  # the third call of a kind goes another way
        W.grad = b.grad = c.grad = None
        h, x, z = (torch.randn(*shape, 2, 4, requires_grad=True) for shape in ((), (9,), (9,)))
        carry, ys = bptt.scan(step, h, (x, z), gradient=gradient, kernel=kernel)
        (carry.sum() + ys.square().sum()).backward()
        check_apart({"W": W, "b": b, "c": c, "h": h, "x": x, "z": z})
