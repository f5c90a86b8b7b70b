"""Steps that use less common means of torch and are compiled, and changes that call for another trace."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_full_backward_hook

import bptt
from bptt.scan import compiled
from bptt.steps import trace

from .replayed import H, agrees, both, given, reason, weights

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def _no_traces_of_other_tests() -> None:
    compiled._KEPT.clear()


def in_bfloat16(h: Tensor, x: Tensor, w: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        z = h.float() @ w.float()
    return torch.tanh(z.double() + x)


def test_autocast_inside_is_compiled() -> None:
    w = weights()
    step = lambda h, x: both(in_bfloat16(h, x, w))  # noqa: E731
    assert not reason(step, *given())
    agrees(step, w, rtol=0.05, atol=0.05)


def test_a_call_in_inference_mode_is_compiled() -> None:
    w = weights()
    step = lambda h, x: both(torch.tanh(h @ w + x + noise))  # noqa: E731
    with torch.inference_mode():
        noise = torch.randn(H, dtype=DOUBLE)
        h, xs = given()
        assert not reason(step, h, xs)
        carry, ys = bptt.scan(step, h, xs)
        for x, y in zip(xs, ys, strict=True):
            h, _ = step(h, x)
            torch.testing.assert_close(y, h)
        torch.testing.assert_close(carry, h)


def test_functional_call_is_compiled_with_the_parameters_it_is_given() -> None:
    cell = nn.RNNCell(H, H, dtype=DOUBLE)
    params = {name: (p * 2).detach().requires_grad_() for name, p in cell.named_parameters()}
    step = lambda h, x: both(torch.func.functional_call(cell, params, (x, h)))  # noqa: E731
    assert not reason(step, *given())
    agrees(step, *params.values(), *cell.parameters())
    params["weight_hh"] = (params["weight_hh"] / 2).detach().requires_grad_()
    agrees(step, *params.values())
    scaled = lambda h, x: both(torch.func.functional_call(cell, {"weight_hh": w * 2}, (x, h)))  # noqa: E731
    w = weights()
    assert not reason(scaled, *given())
    agrees(scaled, w, *cell.parameters())


@pytest.fixture(name="_compiler")
def _compiler_reset() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_compiler")
@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_what_torch_compile_has_made_is_traced_as_it_was_written() -> None:
    module, own, w = nn.Linear(H, H, dtype=DOUBLE), nn.Linear(H, H, dtype=DOUBLE), weights()
    wrapped = torch.compile(module, backend="eager")
    own.compile(backend="eager")
    function = torch.compile(lambda h, x: torch.tanh(h @ w + x), backend="eager")
    for step, params in (
        (lambda h, x: both(torch.tanh(wrapped(h) + x)), [*module.parameters()]),
        (lambda h, x: both(torch.tanh(own(h) + x)), [*own.parameters()]),
        (lambda h, x: both(function(h, x)), [w]),
    ):
        assert not reason(step, *given())
        agrees(step, *params)


def test_traces_that_overlap_leave_the_compiler_on() -> None:
    """One that begins during another, and ends after it: what torch.compile wraps is compiled again afterwards."""
    seen: list[int] = []
    compiled_sum = torch.compile(torch.add, backend=lambda graph, _: seen.append(1) or graph)  # type: ignore[func-returns-value]
    first_inside, second_inside, first_done = (threading.Event() for _ in range(3))

    def first(carry: list[Tensor], x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        first_inside.set()
        assert second_inside.wait(60)
        return [torch.tanh(carry[0] + x[0])], []

    def second(carry: list[Tensor], x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        second_inside.set()
        assert first_done.wait(60)
        return [torch.tanh(carry[0] * x[0])], []

    def later() -> None:
        assert first_inside.wait(60)
        trace(second, [torch.ones(2, H)], [torch.ones(2, H)])

    thread = threading.Thread(target=later)
    thread.start()
    trace(first, [torch.ones(2, H)], [torch.ones(2, H)])
    first_done.set()
    thread.join()
    compiled_sum(torch.ones(2), torch.ones(2))
    assert seen


def test_a_default_dtype_that_changes_is_traced_anew() -> None:
    w = weights()
    step = lambda h, x: both(torch.tanh(h @ w + x + torch.ones(H) / 3))  # noqa: E731
    try:
        for dtype in (torch.float32, DOUBLE, torch.float32):
            torch.set_default_dtype(dtype)
            agrees(step, w)
    finally:
        torch.set_default_dtype(torch.float32)


def test_arguments_that_gain_and_lose_a_gradient() -> None:
    w, (h, xs) = weights(), given()
    step = lambda h, x: both(torch.tanh(h @ w + x))  # noqa: E731
    for of_h, of_x in ((False, False), (False, True), (True, True), (True, False), (False, True)):
        h, xs = h.detach().requires_grad_(of_h), xs.detach().requires_grad_(of_x)
        c, ys = h, []
        for x in xs:
            c, y = step(c, x)
            ys.append(y)
        inputs = [t for t in (h, xs, w) if t.requires_grad]
        expected = torch.autograd.grad(torch.stack(ys).square().sum(), inputs)
        found = torch.autograd.grad(bptt.scan(step, h, xs)[1].square().sum(), inputs)
        torch.testing.assert_close(found, expected)


def test_hooks_that_come_later_are_seen() -> None:
    inner = nn.Linear(H, H, dtype=DOUBLE)
    step = lambda h, x: both(torch.tanh(inner(h) + x))  # noqa: E731
    agrees(step, *inner.parameters())
    handles: list[Any] = [inner.weight.register_hook(lambda g: g * 3)]
    agrees(step, *inner.parameters())
    handles.append(inner.register_forward_hook(lambda m, i, o: o * 2))
    agrees(step, *inner.parameters())
    handles.append(inner.register_full_backward_hook(lambda m, i, o: (i[0] * 2,)))
    agrees(step, *inner.parameters())
    for handle in handles:
        handle.remove()
    agrees(step, *inner.parameters())


def test_hooks_on_all_modules_are_seen() -> None:
    inner = nn.Linear(H, H, dtype=DOUBLE)
    step = lambda h, x: both(torch.tanh(inner(h) + x))  # noqa: E731
    agrees(step, *inner.parameters())
    for register, hook in (
        (register_module_forward_hook, lambda m, i, o: o * 2),
        (register_module_full_backward_hook, lambda m, i, o: (i[0] * 2,)),
    ):
        handle = register(hook)
        try:
            assert "hooks on all modules are registered" in reason(step, *given())
            agrees(step, *inner.parameters())
        finally:
            handle.remove()
        agrees(step, *inner.parameters())


scale, settings, offset = 1.0, {"scale": 1.0}, torch.ones(H, dtype=DOUBLE)


def test_globals_that_change_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    w = weights()
    step = lambda h, x: both(torch.tanh(h @ w + x * scale * settings["scale"] + offset))  # noqa: E731
    agrees(step, w)
    monkeypatch.setitem(globals(), "scale", 2.0)
    agrees(step, w)
    monkeypatch.setitem(settings, "scale", 0.5)
    agrees(step, w)
    monkeypatch.setitem(globals(), "offset", torch.zeros(H, dtype=DOUBLE))
    agrees(step, w)
    offset.add_(1)
    agrees(step, w)
    assert not reason(step, *given())
