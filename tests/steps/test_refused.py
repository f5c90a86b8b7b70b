"""Steps that are not compiled, each with its reason: their result by replay is that of a loop; and some that are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import bptt
from bptt.scan import compiled

from .replayed import B, H, T, agrees, both, reason, weights


@pytest.fixture(autouse=True)
def _no_traces_of_other_tests() -> None:
    """All steps here have the same code, and so share the few traces that are kept for one."""
    compiled._KEPT.clear()


class Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.clamp(-0.1, 0.1)


REFUSED: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], str]] = {
    "branch on data": (lambda h, x, w: torch.tanh((h * 0.5 if h.sum() > 0 else h) @ w + x), "reads a value"),
    "numpy": (lambda h, x, w: torch.tanh(h @ w + x + torch.from_numpy(h.detach().numpy() * 2)), ""),
    "tolist": (lambda h, x, w: torch.tanh(h @ w + x + torch.tensor(h.tolist(), dtype=torch.float64)), ""),
    "value of weights": (lambda h, x, w: torch.tanh(h @ w + x * w.sum().item()), "reads a value"),
    "weights by numpy": (lambda h, x, w: torch.tanh(h @ w + x * float(w.detach().numpy().sum())), ""),
    "branch on weights": (lambda h, x, w: torch.tanh(h @ w + x * (1.0 if w.sum() > 0 else 2.0)), "reads a value"),
    "a nested scan": (lambda h, x, w: bptt.scan(lambda a, _: both(torch.tanh(a @ w + x)), h, length=2)[0], ""),
    "the commonest value": (lambda h, x, w: torch.tanh(h @ w + x) * h.mode(1, True).values, "not known whether"),
    "weights clipped in backward": (lambda h, x, w: torch.tanh(h @ Clipped.apply(w) + x), "not linear"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_is_replayed_and_says_why(name: str) -> None:
    w, (f, text) = weights(), REFUSED[name]

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return both(f(h, x, w))

    given = torch.randn(B, H, dtype=torch.float64), torch.randn(T, B, H, dtype=torch.float64)
    said = reason(step, *given)
    assert said
    assert text in said
    agrees(step, w)


COMPILED: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "length of the batch": lambda h, x, w: torch.tanh(h @ w + x) / len(x),
    "batch mean": lambda h, x, w: torch.tanh(h @ w + x - h.mean(0)),
    "batch flipped": lambda h, x, w: torch.tanh(h @ w + x).flip(0),
    "batch rolled": lambda h, x, w: torch.tanh(h @ w + x).roll(1, 0),
    "batch sorted": lambda h, x, w: torch.tanh(h @ w + x).sort(0)[0],
    "its input": lambda h, x, w: h,
    "without gradient in part": lambda h, x, w: torch.tanh(h @ w + x + h.detach()),
    "clipped in backward": lambda h, x, w: Clipped.apply(torch.tanh(h @ w + x)),
    "writes by .data": lambda h, x, w: torch.tanh(h @ w + (z := x * 1, z.data.mul_(2))[0]),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPILED)
def test_is_compiled(name: str) -> None:
    w, f = weights(), COMPILED[name]

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return both(f(h, x, w))

    given = torch.randn(B, H, dtype=torch.float64), torch.randn(T, B, H, dtype=torch.float64)
    assert not reason(step, *given)
    agrees(step, w)


def test_values_are_current_after_writes_in_place() -> None:
    w = weights()
    step = lambda h, x: both(torch.tanh(h @ w + x))  # noqa: E731
    for write in (lambda: w.mul_(0.5), lambda: w.data.add_(0.1), lambda: setattr(w, "data", w.data * 2)):
        agrees(step, w)
        with torch.no_grad():
            write()
        agrees(step, w)


def test_a_step_that_keeps_what_it_makes_is_replayed_and_what_it_kept_has_no_gradient() -> None:
    w, kept = weights(), list[Tensor]()
    holder = {"keep": [kept.append]}

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(h @ w + x)
        for keep in holder["keep"]:
            keep(h * 2)
        return h, h

    given = torch.randn(B, H, dtype=torch.float64), torch.randn(T, B, H, dtype=torch.float64)
    assert reason(step, *given)
    agrees(step, w)
    bptt.scan(step, *given)
    with pytest.raises(RuntimeError, match="made inside the step"):
        kept[-1].sum().backward()


def test_batch_norm_in_train_mode_is_replayed() -> None:
    w, norm = weights(), torch.nn.BatchNorm1d(H, dtype=torch.float64)
    step = lambda h, x: both(torch.tanh(norm(h @ w + x)))  # noqa: E731
    given = torch.randn(B, H, dtype=torch.float64), torch.randn(T, B, H, dtype=torch.float64)
    assert "captured tensor" in reason(step, *given)
    agrees(step, w)


def test_state_outside_of_the_carry_is_named() -> None:
    given, n, generator = (torch.randn(B, H), torch.randn(T, B, H)), [0], torch.Generator()

    def counts(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        n[0] += 1
        return both(torch.tanh(h + n[0] * x))

    assert "sets an item of `n`" in reason(counts, *given)
    buffer = torch.zeros(H)

    def writes(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        buffer.add_(1)
        return both(torch.tanh(h + x))

    assert "`buffer`" in reason(writes, *given)
    drawn = lambda h, x: both(h + x * torch.rand(H, generator=generator))  # noqa: E731
    assert "Generator" in reason(drawn, *given)


def test_weights_that_are_frozen_later_are_traced_anew() -> None:
    w = weights()
    step = lambda h, x: both(torch.tanh(h @ w + x))  # noqa: E731
    given = torch.randn(B, H, dtype=torch.float64), torch.randn(T, B, H, dtype=torch.float64)
    assert bptt.scan(step, *given)[1].requires_grad
    w.requires_grad_(False)
    assert not bptt.scan(step, *given)[1].requires_grad
    w.requires_grad_()
    agrees(step, w)


def test_second_derivatives_are_those_of_the_loop() -> None:
    w, h = weights(), torch.randn(B, H, dtype=torch.float64, requires_grad=True)
    xs = torch.randn(T, B, H, dtype=torch.float64)
    step = lambda h, x: both(torch.tanh(h @ w + x))  # noqa: E731
    c = h
    for x in xs:
        c, _ = step(c, x)
    found = []
    for final in (c, bptt.scan(step, h, xs, kernel="eager")[0]):
        first = torch.autograd.grad(final.sum(), h, create_graph=True)[0]
        found.append(torch.autograd.grad((first**2).sum(), w)[0])
    torch.testing.assert_close(found[1], found[0])
