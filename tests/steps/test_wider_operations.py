"""Steps that use more of torch than a cell's few operations: each is a program with the gradients of a loop."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import bptt
from bptt.scan import compiled

B, S, H, T = 3, 5, 6, 9
DOUBLE = torch.float64
Given = dict[str, Tensor]
StepOf = Callable[[Tensor, Tensor, Given], tuple[Tensor, Tensor]]


def given() -> Given:
    """W, V `[H, H]`, b `[H]`, heads `[2, 3, 3]`, and M, what a lane attends to, `[B, S, H]`."""
    shapes = {"W": (H, H), "V": (H, H), "b": (H,), "heads": (2, 3, 3), "M": (B, S, H)}
    return {name: (torch.randn(shape, dtype=DOUBLE) * 0.5).requires_grad_() for name, shape in shapes.items()}


def cell(h: Tensor, x: Tensor, w: Given) -> Tensor:
    return torch.tanh(h @ w["W"] + x)


def of_heads(h: Tensor, x: Tensor, w: Given) -> tuple[Tensor, Tensor]:
    n = torch.einsum("bhd,hde->bhe", h.view(-1, 2, 3), w["heads"]).reshape(-1, H)
    return torch.tanh(n + x), n


def of_outer_memory(h: Tensor, x: Tensor, w: Given) -> tuple[Tensor, Tensor]:
    memory = torch.einsum("bd,be->bde", h, x)
    return torch.tanh(torch.einsum("bde,be->bd", memory, h) + x), memory


def attending(h: Tensor, x: Tensor, w: Given) -> tuple[Tensor, Tensor]:
    read = functional.scaled_dot_product_attention(cell(h, x, w)[:, None], w["M"], w["M"])[:, 0]
    return torch.tanh(read + x), read


def attending_with_heads(h: Tensor, x: Tensor, w: Given) -> tuple[Tensor, Tensor]:
    query, memory = (t.unflatten(-1, (2, 3)).transpose(1, 2) for t in (cell(h, x, w)[:, None], w["M"]))
    seen = (torch.arange(S) < 4).expand(1, S)
    read = functional.scaled_dot_product_attention(query, memory, memory, attn_mask=seen)
    return torch.tanh(read.transpose(1, 2).reshape(-1, H) + x), read


def attending_to_itself(h: Tensor, x: Tensor, w: Given) -> tuple[Tensor, Tensor]:
    slots = torch.tanh(h.view(-1, 1, 3, 2) + x.view(-1, 1, 3, 2))
    read = functional.scaled_dot_product_attention(slots, slots, slots, is_causal=True, scale=0.7)
    return read.reshape(-1, H), read


def group_norm(h: Tensor, x: Tensor, w: Given) -> tuple[Tensor, Tensor]:
    n = functional.group_norm(cell(h, x, w), 2, w["b"], w["b"] * 2)
    return torch.tanh(n), functional.group_norm(n.view(-1, 2, 3), 2)


def losses(h: Tensor, x: Tensor, w: Given) -> tuple[Tensor, Tensor]:
    h = cell(h, x, w)
    of = functional.mse_loss, functional.smooth_l1_loss, functional.huber_loss
    return h, torch.stack([loss(h, x * 2, reduction="none").mean(1) for loss in of], 1)


def padded(h: Tensor, x: Tensor, w: Given) -> tuple[Tensor, Tensor]:
    n = functional.pad(h, (-1, 1)) @ w["W"] + x
    return torch.tanh(n), functional.pad(n.view(-1, 2, 3), (1, -1, 2, 0), value=0.5)


def bilinear(h: Tensor, x: Tensor, w: Given) -> tuple[Tensor, Tensor]:
    third = torch.stack([w["W"], w["V"]] * 3)
    n = torch.tanh(functional.bilinear(h, x, third, w["b"]) * 0.3)
    return n, n


@pytest.fixture(autouse=True)
def _no_traces_of_other_tests() -> None:
    compiled._KEPT.clear()


PRELU = nn.PReLU(dtype=DOUBLE)

STEPS: dict[str, StepOf] = {
    "einsum": lambda h, x, w: ((n := torch.tanh(torch.einsum("bi,ij->bj", h, w["W"]) + x)), (n * x).sum(1)),
    "einsum of a turn": lambda h, x, w: ((n := torch.tanh(torch.einsum("ij,bj->bi", w["W"], h) + x)), n),
    "einsum of heads": of_heads,
    "an outer memory": of_outer_memory,
    "attention": attending,
    "attention with heads": attending_with_heads,
    "attention of slots": attending_to_itself,
    "group norm": group_norm,
    "losses": losses,
    "pad": padded,
    "bilinear": bilinear,
    "roll": lambda h, x, w: ((n := torch.tanh(torch.roll(h, (2,), (-1,)) @ w["W"] + x)), n.roll(-1, 1)),
    "a triangle of weights": lambda h, x, w: (
        (n := torch.tanh(h @ w["W"].tril() + x @ w["V"].triu(1) + w["V"].diagonal())),
        n,
    ),
    "prelu": lambda h, x, w: (torch.tanh(PRELU(cell(h, x, w) * 2)), PRELU(h)),
    "rounded, straight through": lambda h, x, w: (
        (n := cell(h, x, w)) * 0.5 + (n * 3).round().detach() * 0.1,
        (n * 3).ceil() - (n * 3).trunc() + torch.frac(n * 3),
    ),
    "nan_to_num": lambda h, x, w: ((n := torch.tanh(torch.nan_to_num(torch.log(h @ w["W"] + x), 0.3))), n),
}


@pytest.mark.parametrize("gradient", ["full", "chunked:4", "truncated:4/2"])
@pytest.mark.parametrize("name", STEPS)
def test_it_is_a_program_with_the_gradient_of_a_loop(name: str, gradient: str) -> None:
    w, step = given(), STEPS[name]
    leaves = [*w.values(), *PRELU.parameters()]
    h, xs = torch.randn(B, H, dtype=DOUBLE), torch.randn(T, B, H, dtype=DOUBLE)

    def of_step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return step(h, x, w)

    told = bptt.explain(of_step, h, xs[0])
    assert told.kernel == "interpreter", told.reason
    first, inputs = h.clone().requires_grad_(), xs.clone().requires_grad_()
    carry, ys = bptt.scan(of_step, first, inputs, gradient=gradient)
    dy, dcarry = torch.randn_like(ys), torch.randn_like(carry)
    found = torch.autograd.grad([carry, ys], [first, inputs, *leaves], [dcarry, dy], allow_unused=True)

    expected: list[Tensor | None] = [None] * len(found)
    for earliest, start, last in bptt.policies.parse(gradient).reach(T).blocks(T):
        c, outputs = first, []
        for t in range(last + 1):
            c = c.detach() if 0 < t == earliest else c
            c, y = of_step(c, inputs[t])
            outputs.append(y if t >= earliest else y.detach())
        torch.testing.assert_close(torch.stack(outputs), ys[: last + 1], rtol=1e-9, atol=1e-10)
        ends = [torch.stack(outputs[start:])], [dy[start : last + 1]]
        if last == T - 1:
            ends = [*ends[0], c], [*ends[1], dcarry]
        # What a block's own steps before `earliest` compute has no part in it.
        grads = torch.autograd.grad(ends[0], [first, inputs, *leaves], ends[1], allow_unused=True)
        expected = [a if b is None else b if a is None else a + b for a, b in zip(expected, grads, strict=True)]
    for got, want in zip(found, expected, strict=True):
        if want is None:
            assert got is None or not got.any()
        else:
            torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)
