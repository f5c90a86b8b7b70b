"""Traces go with the module that their steps hold; and a trace that is given up leaves generators as they were."""

from __future__ import annotations

import copy
import gc
import importlib
import io
import pickle
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bptt
from bptt import scan

B, H, T = 3, 4, 9
Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
compiled_call = importlib.import_module("bptt.scan.compiled_call")


class Stepped(nn.Module):
    """A module with a step of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(H, H)

    def step(self, h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.inner(h) + x)
        return h, h

    def scaled(self, scale: float, h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.step(h * scale, x)


def _in_a_function(module: Stepped) -> Step:
    def inner(h: Tensor) -> Tensor:
        return torch.tanh(module.inner(h))

    return lambda h, x: (inner(h) + x, h)


STEPS: dict[str, Callable[[Stepped], Step]] = {
    "in a closure": lambda module: lambda h, x: module.step(h, x),
    "bound": lambda module: module.step,
    "partial": lambda module: partial(module.scaled, 0.5),
    "in a function of a closure": _in_a_function,
    "in a list": lambda module: (lambda modules: lambda h, x: modules[0].step(h, x))([module]),
    "of a layer": lambda module: bptt.nn.Recurrent(nn.GRUCell(H, H)),  # type: ignore[arg-type, return-value]
}


def _run(step: Any) -> None:
    h, xs = torch.randn(B, H), torch.randn(T, B, H)
    ys = step(xs)[0] if isinstance(step, nn.Module) else scan(step, h, xs, kernel="eager")[1]
    ys.sum().backward()


@pytest.mark.parametrize("name", STEPS)
def test_a_deleted_module_is_freed(name: str) -> None:
    module = Stepped()
    step = STEPS[name](module)
    _run(step)
    _run(step)
    if isinstance(step, bptt.nn.Recurrent):
        module = step  # type: ignore[assignment]
    refs = [weakref.ref(p) for p in module.parameters()]
    assert refs
    del module, step
    gc.collect()
    assert [r() for r in refs] == [None] * len(refs)


def test_a_copy_and_a_pickle_have_no_traces() -> None:
    module = Stepped()
    before = len(pickle.dumps(module))
    _run(module.step)
    assert len(pickle.dumps(module)) < before + 200
    assert list(module.state_dict()) == ["inner.weight", "inner.bias"]
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    for made in (lambda: copy.deepcopy(module), lambda: torch.load(buffer, weights_only=False)):
        other: Any = made()  # type: ignore[no-untyped-call]
        ref = weakref.ref(other.inner.weight)
        _run(other.step)
        del other
        gc.collect()
        assert ref() is None


def test_many_layers_of_one_kind_are_compiled() -> None:
    layers = [bptt.nn.Recurrent(nn.GRUCell(H, H), kernel="eager") for _ in range(12)]
    for _ in range(2):
        for layer in layers:
            _run(layer)


@pytest.mark.parametrize("own", [True, False])
def test_a_trace_that_is_given_up_draws_its_factors_once(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3) if own else None
    policy, w = bptt.Randomized(0.5, generator=generator), torch.randn(H, H, requires_grad=True)
    step = lambda h, x: (torch.tanh(h @ w + x),) * 2  # noqa: E731
    h, xs = torch.randn(B, H), torch.randn(T, B, H)
    start = None if generator is None else generator.get_state()
    found = []
    for kernel in ("replay", "auto"):
        torch.manual_seed(3)
        if generator is not None and start is not None:
            generator.set_state(start)
        if kernel == "auto":
            monkeypatch.setattr(compiled_call, "_alike", lambda *_: False)
        ys = scan(step, h, xs, gradient=policy, kernel=kernel)[1]
        state = torch.get_rng_state() if generator is None else generator.get_state()
        found.append((torch.autograd.grad(ys.sum(), w)[0], state))
    torch.testing.assert_close(*found)
