"""What the cache of traces keeps alive between calls: a step, not the graph of what it captured once."""

from __future__ import annotations

import gc
import weakref

import torch
from torch import Tensor

from bptt import scan


def attend(made: list[weakref.ref[object]]) -> tuple[Tensor, Tensor]:
    """A step over states that another net has computed, made anew at each call."""
    weight = torch.randn(4, 4, requires_grad=True)
    hidden = torch.randn(3, 4, requires_grad=True)
    states, scale = torch.tanh(hidden @ weight), [weight.sum() / 4]
    made.append(weakref.ref(hidden))

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(h * states + x * scale[0])
        return h, h

    final, ys = scan(step, torch.zeros(3, 4), torch.ones(12, 3, 4), kernel="eager")
    return torch.autograd.grad(ys.sum() + final.sum(), [weight, hidden])


def test_the_graph_of_a_call_is_not_kept() -> None:
    made: list[weakref.ref[object]] = []
    for _ in range(3):
        torch.manual_seed(0)
        attend(made)
    gc.collect()
    assert [ref() for ref in made] == [None] * 3


def test_gradients_go_through_what_was_computed() -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        got = attend([])
        torch.manual_seed(seed)
        weight, hidden = torch.randn(4, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
        states, h, total = torch.tanh(hidden @ weight), torch.zeros(3, 4), torch.zeros(())
        for _ in range(12):
            h = torch.tanh(h * states + torch.ones(3, 4) * (weight.sum() / 4))
            total = total + h.sum()
        torch.testing.assert_close(got, torch.autograd.grad(total + h.sum(), [weight, hidden]), rtol=1e-4, atol=1e-5)
