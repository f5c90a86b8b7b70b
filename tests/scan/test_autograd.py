"""`scan` in autograd's graph: derivatives of every order, modes and hooks."""

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from reference import Fixed
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from bptt import Full, Randomized, Truncated, scan
from bptt.policies import Policy

from .loops import (
    DOUBLE,
    POLICIES,
    RESETS,
    B,
    H,
    T,
    expected,
    factors,
    loop,
    measured,
    random,
    rnn,
    weighed,
)

Agree = Callable[..., None]

each_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


# Derivatives by finite differences


def checked(policy: Policy, **kw: Any) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]:
    """A gated recurrence as a function of everything it depends on. It captures w, u and the double of u."""
    T, B, H = 4, 2, 2

    def function(h: Tensor, c: Tensor, xs: Tensor, w: Tensor, u: Tensor) -> tuple[Tensor, ...]:
        twice = 2 * u

        def step(carry: tuple[Tensor, Tensor], x: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
            h, c = carry
            i, f = (x @ w + h @ u + h.cos() @ twice).chunk(2, 1)
            c = f.sigmoid() * c + i.tanh()
            h = c.sin()
            return (h, c), h * c

        (h, c), ys = scan(step, (h, c), xs, gradient=policy, **kw)
        return h, c, ys

    return function, [random(B, H), random(B, H), random(T, B, 1), random(1, 2 * H), random(H, 2 * H)]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("resets", [None, RESETS[:4, :2]], ids=["", "resets"])
def test_gradcheck(reverse: bool, resets: Tensor | None) -> None:
    assert gradcheck(*checked(Full(), reverse=reverse, resets=resets))


@pytest.mark.parametrize("resets", [None, RESETS[:4, :2], RESETS[:4, 1]], ids=["", "resets", "whole_resets"])
def test_gradgradcheck(resets: Tensor | None) -> None:
    """Of the full gradient; those of policies that cut are in test_orders.py."""
    assert gradgradcheck(*checked(Full(), resets=resets))


@pytest.mark.parametrize("rows", ["auto", "coupled"])
@pytest.mark.parametrize("policy", [Full(), Truncated(2), Fixed(factors(2)[:4])], ids=str)
def test_first_order_gradient_is_the_same_with_create_graph(policy: Policy, rows: str, agree: Agree) -> None:
    function, inputs = checked(policy, rows=rows)
    loss = weighed(function(*inputs), 0)
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    agree(torch.autograd.grad(loss, inputs, create_graph=True), first)


def test_third_derivative() -> None:
    w = torch.tensor(0.3, dtype=DOUBLE, requires_grad=True)
    x, _ = scan(lambda x, _: (torch.sin(w * x), None), torch.ones((), dtype=DOUBLE), length=3)
    y = torch.sin(w * torch.sin(w * torch.sin(w)))
    for _ in range(3):
        (x,), (y,) = (torch.autograd.grad(value, w, create_graph=True) for value in (x, y))
        torch.testing.assert_close(x, y)


# A citizen of autograd


@pytest.mark.parametrize("frozen", range(5))
@pytest.mark.parametrize("policy", [Full(), Truncated(2)], ids=str)
def test_inputs_without_gradient(frozen: int, policy: Policy, agree: Agree) -> None:
    function, inputs = checked(policy)
    want = torch.autograd.grad(weighed(function(*inputs), 0), inputs)
    inputs[frozen].requires_grad_(False)
    for wanted in (inputs[:frozen] + inputs[frozen + 1 :], [inputs[frozen - 1]]):
        got = torch.autograd.grad(weighed(function(*inputs), 0), wanted)
        agree(got, [want[[i is z for z in inputs].index(True)] for i in wanted])


@pytest.mark.parametrize("policy", [Full(), Truncated(2), Randomized(0.5)], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_backward_twice_gives_the_same(policy: Policy, p: float) -> None:
    step, carry, xs, captured = rnn()
    final, ys = scan(lambda h, x: step(torch.dropout(h, p, True), x), carry, xs, gradient=policy)
    loss = weighed([final, ys], 0)
    once, again = (torch.autograd.grad(loss, [carry, xs, *captured], retain_graph=True) for _ in range(2))
    torch.testing.assert_close(once, again, rtol=0, atol=0)


def test_inputs_that_are_no_leaves(agree: Agree) -> None:
    step, carry, xs, captured = rnn()
    got, want = (
        torch.autograd.grad(weighed([run(step, 2 * carry, xs.sin())[0]], 0), [carry, xs, *captured[:3]])
        for run in (scan, lambda *a: loop(*a, T))
    )
    agree(got, want)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_kept(mode: Callable[[], Any]) -> None:
    step, carry, xs, captured = rnn()
    carries: list[weakref.ref[Tensor]] = []

    def noted(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        carries.append(weakref.ref(h))
        return step(h, x)

    with mode():
        _, ys = scan(noted, carry, xs, gradient=Randomized(0.5))
    assert len(carries) == T
    assert not any(ref() is not None for ref in carries[1:])
    assert not ys.requires_grad
    before = torch.get_rng_state()
    _, ys = scan(step, carry.detach(), xs.detach(), gradient=Randomized(0.5))
    assert ys.requires_grad
    assert not torch.equal(before, torch.get_rng_state())
    for w in captured:
        w.requires_grad_(False)
    before = torch.get_rng_state()
    _, ys = scan(step, carry.detach(), xs.detach(), gradient=Randomized(0.5))
    assert not ys.requires_grad
    torch.testing.assert_close(torch.get_rng_state(), before)


@pytest.mark.parametrize("policy", [Full(), Truncated(3), Randomized(0.8)], ids=str)
def test_float32(policy: Policy, agree: Agree) -> None:
    case = rnn(torch.float32)
    torch.manual_seed(4)
    xi = policy.draw(T, B)
    torch.manual_seed(4)
    got = measured(case, policy)
    assert {g.dtype for g in got} == {torch.float32}
    agree(got, expected(case, policy, xi=None if xi is None else xi.float()))


@pytest.mark.parametrize("policy", [Full(), Truncated(3)], ids=str)
@pytest.mark.parametrize("inside", [False, True])
def test_autocast_is_replayed(policy: Policy, inside: bool) -> None:
    """The state of the forward, wherever the backward is called; and no cast without gradient stays in its cache."""
    cell = nn.Linear(H, H)
    h, xs = random(B, H, dtype=torch.float32), random(T, B, H, dtype=torch.float32)
    seen = []

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        y = cell(h)
        seen.append(y.dtype)
        return torch.tanh(y.float() + x), y

    def loss() -> Tensor:
        final, ys = scan(step, h, xs, gradient=policy)
        return final.sum() + ys.float().sum()

    with torch.autocast("cpu", torch.bfloat16):
        value = loss()
        assert cell(h.detach()).requires_grad
    got = torch.autograd.grad(value, [h, xs, *cell.parameters()])
    assert set(seen) == {torch.bfloat16}
    seen.clear()
    value = loss()
    with torch.autocast("cpu", torch.bfloat16, enabled=inside):
        want = torch.autograd.grad(value, [h, xs, *cell.parameters()])
    assert set(seen) == {torch.float32}
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.1 * b.abs().max().item())


@pytest.mark.parametrize("memory", ["states", "checkpoints:steps=3"])
@pytest.mark.parametrize("reverse", [True, False])
def test_resets_may_be_written_to_after_the_call(memory: str, reverse: bool) -> None:
    weight, xs = random(H, H).requires_grad_(), random(T, B, H)
    found = []
    for reused in (False, True):
        array = np.random.default_rng(2).random((T, B)) < 0.4
        _, ys = scan(
            lambda c, x: (torch.tanh(c @ weight + x),) * 2,
            torch.zeros(B, H, dtype=xs.dtype),
            xs,
            resets=torch.from_numpy(array),
            gradient=Truncated(3),
            memory=memory,
            reverse=reverse,
        )
        if reused:
            array[:] = False
        found += torch.autograd.grad(ys.square().sum(), weight)
    assert torch.equal(*found)
