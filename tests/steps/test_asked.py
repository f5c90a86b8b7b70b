"""Steps whose code asks for what is not in a trace: how a tensor came to be, whether it has a gradient, who calls."""

from __future__ import annotations

import gc
import inspect
import os
import pathlib
import sys
import threading
import traceback
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import bptt
from bptt.scan import compiled

from .replayed import H, T, both, given, reason, weights

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def _no_traces_of_other_tests() -> None:
    compiled._KEPT.clear()


Ask = Callable[[Tensor], object]

HISTORY: dict[str, Ask] = {
    "_version": lambda h: h._version,
    "_base": lambda h: h[:1]._base is None,
    "grad_fn": lambda h: h.grad_fn is None,
    "is_leaf": lambda h: getattr(h, "is_leaf"),  # noqa: B009  a name that is not in the code
    "output_nr": lambda h: h.output_nr,
    "_is_view": lambda h: h._is_view(),
}


@pytest.mark.parametrize("name", HISTORY)
def test_how_a_tensor_came_to_be_is_not_in_a_trace(name: str) -> None:
    ask = HISTORY[name]

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return both(torch.tanh(h + x) * (0.5 if ask(h) else 0.9))

    assert f"asks by `{name}` how a tensor came to be, at test_asked.py:" in reason(step, *given())


AROUND: dict[str, Ask] = {
    "os.getpid": lambda h: os.getpid() % 2,
    "sys._getframe": lambda h: sys._getframe(2).f_lineno % 2,
    "inspect.currentframe": lambda h: inspect.currentframe() is None,
    "inspect.stack": lambda h: len(inspect.stack()) % 2,
    "traceback.extract_stack": lambda h: len(traceback.extract_stack()) % 2,
    "threading.get_ident": lambda h: threading.get_ident() % 2,
    "threading.current_thread": lambda h: threading.current_thread().daemon,
    "gc.get_count": lambda h: gc.get_count()[0] % 2,
    "os.path.exists": lambda h: os.path.exists("no such file"),
    "pathlib.Path": lambda h: pathlib.Path("no such file").exists(),
    "torch.get_num_threads": lambda h: torch.get_num_threads() % 2,
}


@pytest.mark.parametrize("name", AROUND)
def test_what_is_around_a_step_is_not_in_a_trace(name: str) -> None:
    ask = AROUND[name]

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return both(torch.tanh(h + x) * (0.5 if ask(h) else 0.9))

    assert f"`{name}`" in reason(step, *given())


def clipped(w: Tensor) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A step that clips the gradient of its state where it has one."""

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        if h.requires_grad:
            h = h * 1.0
            h.register_hook(lambda g: g.clamp(-0.1, 0.1))
        return both(torch.tanh(h @ w + x))

    return step


@pytest.mark.parametrize("gradient", ["full", "chunked:4"])
@pytest.mark.parametrize("first", [True, False])
def test_whether_a_tensor_has_a_gradient_is_told_as_in_a_loop(gradient: str, first: bool) -> None:
    """Of a first carry without one, the first step runs by itself; a chunk's first state has none either."""
    w, found = weights(), list[list[Tensor]]()
    step, xs = clipped(w), torch.randn(T, 3, H, dtype=DOUBLE, requires_grad=True)
    start = torch.randn(3, H, dtype=DOUBLE, requires_grad=first)
    for by_loop in (True, False):
        if by_loop:
            c, made = start, []
            for t, x in enumerate(xs):
                c, y = step(c.detach() if gradient != "full" and t and t % 4 == 0 else c, x)
                made.append(y)
            ys = torch.stack(made)
        else:
            c, ys = bptt.scan(step, start, xs, gradient=gradient)
        inputs = [t for t in (start, xs, w) if t.requires_grad]
        found.append([c, ys, *torch.autograd.grad((3 * ys**2).sum() + c.sum(), inputs)])
    for got, want in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, want)
    with torch.no_grad():
        torch.testing.assert_close(bptt.scan(step, start, xs)[1], found[0][1].detach())


def test_a_step_that_asks_whether_a_tensor_has_a_gradient_is_compiled_where_all_of_the_carry_have() -> None:
    w = weights()
    h, xs = given()
    assert bptt.explain(clipped(w), h.requires_grad_(), xs[0]).kernel == "interpreter"
    bptt.scan(clipped(w), h, xs, kernel="interpreter")
    with torch.no_grad(), pytest.raises(RuntimeError, match="asks by `requires_grad` whether gradients are recorded"):
        bptt.scan(clipped(w), h, xs, kernel="interpreter")


def test_of_a_captured_tensor_it_is_compared_at_each_call() -> None:
    w = weights()

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return both(torch.tanh(h @ w + x) * (0.5 if w.requires_grad else 0.9))

    h, xs = given()
    assert bptt.explain(step, h, xs[0]).kernel == "interpreter"
    for wanted in (True, False, True):
        c, y = h, []
        for x in xs:
            c, out = step(c, x)
            y.append(out)
        torch.testing.assert_close(bptt.scan(step, h, xs)[1], torch.stack(y))
        w.requires_grad_(not wanted)
