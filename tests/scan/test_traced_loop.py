"""Traced steps that torch runs in fewer operations as they are: in a plain loop, which gives what the step gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import bptt
from bptt.scan import compiled, compiled_call

from .loops import loop

B, H, T = 3, 5, 9
Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@pytest.fixture(autouse=True)
def _no_traces_of_other_tests() -> None:
    compiled._KEPT.clear()


@pytest.fixture(name="loops")
def _loops(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls that a plain loop has run."""
    calls, run = list[Any](), compiled_call.by_traced_loop

    def noted(*arguments: Any) -> Any:
        calls.append(arguments)
        return run(*arguments)

    monkeypatch.setattr(compiled_call, "by_traced_loop", noted)
    return calls


def read(h: Tensor, x: Tensor) -> Tensor:
    """A line read at places between its elements: few operations of torch, and many when they are taken apart."""
    places = torch.tanh(x).view(-1, 1, H, 1).expand(-1, -1, -1, 2)
    return torch.nn.functional.grid_sample(h.view(-1, 1, 1, H), places, align_corners=False).view(-1, H)


def sampled(w: Tensor) -> Step:
    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(read(h @ w, x))
        return h, h

    return step


def overwriting(w: Tensor) -> Step:
    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        y = read(h.clone() @ w, x)
        h.mul_(0.5).add_(torch.tanh(y))
        x.zero_()
        return h, y

    return step


def drawing(w: Tensor) -> Step:
    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(read(h @ w, x)) + torch.rand_like(x)
        return h, h

    return step


def given() -> tuple[Tensor, Tensor, Tensor]:
    sizes = (H, H), (B, H), (T, B, H)
    w, h, xs = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes)
    return w, h, xs


@pytest.mark.parametrize("gradient", ["full", "chunked:4"])
@pytest.mark.parametrize("make", [sampled, overwriting, drawing])
@pytest.mark.parametrize("resets", [False, True])
def test_it_gives_what_a_loop_gives(make: Any, gradient: str, resets: bool, loops: list[Any]) -> None:
    w, h, xs = given()
    step, found = make(w), list[list[Tensor]]()
    begins = torch.zeros(T, B, dtype=torch.bool)
    begins[3, 1] = begins[6] = resets
    masks = begins if resets else None
    for by_loop in (True, False, False):
        torch.manual_seed(5)
        if by_loop:

            def cut(c: Tensor, x: Tensor, t: list[int] = [0]) -> tuple[Tensor, Tensor]:  # noqa: B006  a counter
                c = c.detach() if gradient != "full" and t[0] and t[0] % 4 == 0 else c.clone()
                t[0] += 1
                return step(c, x.clone())

            c, made = loop(cut, h, xs, T, resets=masks)
            ys = torch.stack(made)
        else:
            c, ys = bptt.scan(step, h, xs, gradient=gradient, resets=masks)
        found.append([c, ys, *torch.autograd.grad((ys**2).sum() + c.sin().sum(), (h, xs, w))])
    assert len(loops) == 2
    for others in found[1:]:
        for got, want in zip(others, found[0], strict=True):
            torch.testing.assert_close(got, want)


def test_what_it_is_not_for_goes_to_the_kernel(loops: list[Any]) -> None:
    w, h, xs = given()
    step = sampled(w)
    told = bptt.explain(step, h, xs[0])
    assert told.kernel == "replay"
    assert "its steps ask torch for" in told.reason
    bptt.scan(step, h, xs, gradient="truncated:3")
    bptt.scan(step, h, xs, gradient="randomized:0.5")
    bptt.scan(step, h, xs, memory="states")
    bptt.scan(step, h, xs, memory="checkpoints:steps=3")
    bptt.scan(step, h, xs, kernel="eager")
    bptt.scan(step, h, xs, kernel="replay")
    with torch.autocast("cpu"):
        bptt.scan(step, h, xs)
    assert not loops
    plan = bptt.plan_scan(step, h.detach(), xs, memory="states")
    assert plan.tape_bytes > 0
    few = len(loops)
    bptt.scan(step, h, xs)
    assert len(loops) == few + 1


def test_a_step_that_changes_is_still_noticed(loops: list[Any]) -> None:
    w, h, xs = given()
    scale = [1.0]

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(read(h @ w, scale[0] * x))
        return h, h

    for value in (1.0, 0.5, 0.25):
        scale[0] = value
        expected = loop(step, h, xs, T)[0]
        torch.testing.assert_close(bptt.scan(step, h, xs)[0], expected)
    assert len(loops) == 3
