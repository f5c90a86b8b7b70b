"""A step whose surroundings change between calls, in any order: each call gives what a plain loop gives then."""

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bptt import scan

T, H = 9, 3
DOUBLE = torch.float64


class Half(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w / 2


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(H, H, dtype=DOUBLE)
        self.drop = nn.Dropout(0.3)
        self.gain, self.rates, self.squash = 0.5, [0.9], torch.tanh
        self.register_buffer("offset", torch.zeros(H, dtype=DOUBLE))

    def drive(self, h: Tensor) -> Tensor:
        return self.drop(self.inner(h)) * self.gain

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        h = self.squash(self.drive(h) + self.rates[0] * x + self.offset)
        return h * getattr(self, "scale", 1.0)


class World:
    """A step, what it captures, and how its calls are made."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.cell, self.weight, self.power, self.B = Cell(), torch.randn(H, dtype=DOUBLE, requires_grad=True), 1, 2
        self.dtype, self.needs = DOUBLE, True

    def step(self, h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.cell(h, x) * self.weight**self.power
        return h, h.to(self.dtype)

    def made_again(self) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        cell, weight, power, dtype = self.cell, self.weight, self.power, self.dtype
        return lambda h, x: ((new := cell(h, x) * weight**power), new.to(dtype))


@torch.no_grad()
def in_place(w: World) -> None:
    w.cell.inner.weight.mul_(0.9)
    w.cell.offset.add_(0.1)


def hooked(w: World) -> None:
    if w.cell.inner._forward_hooks:
        w.cell.inner._forward_hooks.clear()
    else:
        w.cell.inner.register_forward_hook(lambda module, given, result: 2 * result)


def parametrized(w: World) -> None:
    if parametrize.is_parametrized(w.cell.inner):
        parametrize.remove_parametrizations(w.cell.inner, "weight")
    else:
        parametrize.register_parametrization(w.cell.inner, "weight", Half())


def drive(h: Tensor) -> Tensor:
    return torch.cos(h)


CHANGES: dict[str, Callable[[World], Any]] = {
    "a number": lambda w: setattr(w.cell, "gain", w.cell.gain + 0.25),
    "an item": lambda w: w.cell.rates.__setitem__(0, w.cell.rates[0] / 2),
    "a function": lambda w: setattr(w.cell, "squash", torch.sin),
    "a method of its own": lambda w: setattr(w.cell, "drive", drive),
    "what was not there": lambda w: setattr(w.cell, "scale", 0.7),
    "train or eval": lambda w: w.cell.train(not w.cell.training),
    "values": in_place,
    "a parameter": lambda w: setattr(w.cell, "inner", nn.Linear(H, H, dtype=DOUBLE)),
    "a captured tensor": lambda w: setattr(w, "weight", torch.randn(H, dtype=DOUBLE, requires_grad=True)),
    "data": lambda w: setattr(w.weight, "data", torch.randn(H, dtype=DOUBLE)),
    "frozen or not": lambda w: w.cell.inner.requires_grad_(not w.cell.inner.bias.requires_grad),
    "a power": lambda w: setattr(w, "power", 3 - w.power),
    "lanes": lambda w: setattr(w, "B", 6 - w.B),
    "the type of y": lambda w: setattr(w, "dtype", torch.float32 if w.dtype == DOUBLE else DOUBLE),
    "what needs a gradient": lambda w: setattr(w, "needs", not w.needs),
    "a hook": hooked,
    "a parametrization": parametrized,
}


@settings(max_examples=5)
@given(st.lists(st.sampled_from(sorted(CHANGES)), min_size=3, max_size=4), st.sampled_from(["full", "chunked:4"]))
def test_every_call_is_that_of_the_step_as_it_is(changes: list[str], gradient: str) -> None:
    world = World()
    for change in ["", *changes]:
        if change:
            CHANGES[change](world)
        for step in (world.step, world.step, world.made_again()):
            carry = torch.randn(world.B, H, dtype=DOUBLE, requires_grad=world.needs)
            xs = torch.randn(T, world.B, H, dtype=DOUBLE, requires_grad=world.needs)
            inputs = [t for t in (carry, xs, world.weight, *world.cell.parameters()) if t.requires_grad]
            state, h, ys = torch.get_rng_state(), carry, []
            for t, x in enumerate(xs):
                h, y = step(h.detach() if gradient != "full" and t and t % 4 == 0 else h, x)
                ys.append(y)
            after = torch.get_rng_state()
            torch.set_rng_state(state)
            final, got = scan(step, carry, xs, gradient=gradient)
            assert torch.equal(torch.get_rng_state(), after)
            torch.testing.assert_close((final, got), (h, torch.stack(ys)))
            losses = [(r[0].sin().sum() + r[1].double().square().sum()) for r in ((final, got), (h, torch.stack(ys)))]
            grads = [torch.autograd.grad(loss, inputs, materialize_grads=True) for loss in losses]
            torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-6)
