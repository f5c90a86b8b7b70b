"""What a replayed step writes to beside its results: once a step, however often the step is run."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bptt import scan

from .loops import DOUBLE, B, H, T, random


class Counting(nn.Module):
    """A cell that counts its steps, in a buffer and in a tensor of a list, by operators that assign what they give."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((H,), 0.3, dtype=DOUBLE))
        self.register_buffer("steps", torch.zeros((), dtype=DOUBLE))
        self.sums = [torch.zeros(H, dtype=DOUBLE)]

    def forward(self, h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(h * self.weight + x)
        self.steps += 1
        self.sums[0] *= 0.5
        self.sums[0] += h.detach().sum(0)
        return h, h


@pytest.mark.parametrize("memory", ["auto", "states", "checkpoints:steps=3"])
@pytest.mark.parametrize("gradient", ["full", "chunked:3", "truncated:3"])
def test_what_operators_write_and_assign_is_written_once(memory: str, gradient: str) -> None:
    cell, plain = Counting(), Counting()
    buffer, carry, xs = cell.steps, random(B, H), random(T, B, H)
    for _ in range(2):
        _, ys = scan(cell, carry, xs, gradient=gradient, memory=memory)
        ys.square().sum().backward()
        h = carry
        for x in xs:
            h, _ = plain(h, x)
        torch.testing.assert_close(cell.steps, plain.steps)
        torch.testing.assert_close(cell.sums, plain.sums)
    assert cell.steps is buffer


def by_a_fast_weight(w: Tensor) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        assert w.grad is not None
        h = torch.tanh(h * (w - 0.1 * w.grad) + x)
        return h, h

    return step


@pytest.mark.parametrize("steps", [T, 2 * T])
def test_the_gradient_of_a_captured_tensor_is_read_as_it_is(steps: int, agree: Callable[..., Any]) -> None:
    w, carry, xs = random(H), random(B, H), random(steps, B, H)
    step = by_a_fast_weight(w)
    for _ in range(3):
        w.grad = torch.randn_like(w)
        kept = w.grad.clone()
        h, ys = carry, []
        for x in xs:
            h, y = step(h, x)
            ys.append(y)
        wanted = torch.autograd.grad(torch.stack(ys).square().sum(), [carry, xs, w])
        _, got = scan(step, carry, xs)
        agree(got, torch.stack(ys))
        agree(torch.autograd.grad(got.square().sum(), [carry, xs, w]), wanted)
        assert torch.equal(w.grad, kept)
        assert not w.grad.requires_grad
