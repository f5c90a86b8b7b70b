"""Steps that cannot be guarded: each has its reason, which names the function, the line and what it does."""

import functools
import itertools
import logging
import os
import random
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bptt.steps.guard import Guard

calls = 0
record: dict[str, Tensor] = {}
logger = logging.getLogger(__name__)
context, of_thread = ContextVar("context", default=1.0), threading.local()
weight = torch.ones(2, requires_grad=True)


def global_counter(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    global calls
    calls += 1
    return h * calls, x


def global_dictionary(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    record["h"] = h
    return h, x


class OfClass:
    t = 0

    def __call__(self, h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        type(self).t += 1
        return h, x


def counter_of_the_class() -> Any:
    return OfClass()


def closure_counter() -> Any:
    n = 0

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal n
        n += 1
        return h * n, x

    return step


def counter_inside() -> Any:
    n = 0

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        def count() -> None:
            nonlocal n
            n += 1

        count()
        return h, x

    return step


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.t = 0

    def forward(self, h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        self.t += 1
        return h, x


class Spiking(nn.Module):
    """As snntorch's neurons: the state is an attribute."""

    beta: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("beta", torch.tensor(0.9))
        self.mem = torch.zeros(1)

    def forward(self, x: Tensor, mem: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if mem is not None:
            self.mem = mem
        self.mem = self.beta * self.mem + x
        return (self.mem > 1).float(), self.mem


def spiking() -> Any:
    neuron = Spiking()
    return lambda h, x: neuron(x, h)


def in_a_sequence() -> Any:
    net = nn.Sequential(nn.Linear(2, 2), Spiking())
    return lambda h, x: net(x)


def appended() -> Any:
    history: list[Tensor] = []

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        history.append(h)
        return h, x

    return step


def appended_by_a_helper() -> Any:
    history: list[Tensor] = []

    def keep(where: list[Tensor], h: Tensor) -> None:
        where.append(h)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        keep(history, h=h)
        return h, x

    return step


def appended_by_a_bound_method() -> Any:
    keep = record.update
    return lambda h, x: (keep(h=h), x)


def item_of_an_attribute() -> Any:
    net = nn.Linear(2, 2)
    net.states = [None]

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        net.states[0] = h
        return h, x

    return step


def counters_in_a_loop() -> Any:
    counters = {"a": Counting(), "b": Counting()}

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        for _, counter in counters.items():
            counter.t = counter.t + 1
        return h, x

    return step


def attribute_of_a_default(h: Tensor, x: Tensor, counting: Any = Counting()) -> tuple[Tensor, Tensor]:  # noqa: B008
    alias = counting
    alias.t += 1
    return h, x


def in_place() -> Any:
    state = torch.zeros(2)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        state.add_(x)
        return h + state, x

    return step


def in_place_by_an_operator() -> Any:
    state = torch.zeros(2)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        s = state
        s += x
        return h, x

    return step


def item_of_a_tensor() -> Any:
    rate = torch.zeros(())
    return lambda h, x: (h * rate.item(), x)


def generator() -> Any:
    draws = torch.Generator()
    return lambda h, x: (h + torch.rand(2, generator=draws), x)


def iterator() -> Any:
    count = itertools.count()
    return lambda h, x: (h * next(count), x)


def array_generator() -> Any:
    rng = np.random.default_rng(0)
    return lambda h, x: (h * rng.normal(), x)


def hook_that_counts() -> Any:
    net, seen = nn.Linear(2, 2), []
    net.register_forward_hook(lambda module, args, y: seen.append(1))
    return lambda h, x: (net(h), x)


def counted_by_a_helper_on_its_second_argument() -> Any:
    a, b = Counting(), Counting()

    def count(what: Any, *, really: Any) -> None:
        if really is not None:
            really.t += 1

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        count(a, really=None)
        count(a, really=b)
        return h, x

    return step


def switched() -> Any:
    net = nn.Linear(2, 2)
    return lambda h, x: (net.eval()(h), x)


def attribute_of_a_function() -> Any:
    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        step.calls += 1  # type: ignore[attr-defined]
        return h, x

    return step


def appended_in_a_comprehension() -> Any:
    history: list[Tensor] = []
    return lambda h, x: ([history.append(u) for u in (h, x)], x)


def drawn(h: Tensor) -> Tensor:
    return h * random.gauss(0, 1)


CASES: list[tuple[Callable[[], Any], str]] = [
    (lambda: global_counter, "assigns to the global `calls`"),
    (lambda: global_dictionary, "sets an item of `record`"),
    (closure_counter, "assigns to the variable `n` of its closure"),
    (counter_inside, "assigns to the variable `n` of its closure"),
    (Counting, "sets `step.t`"),
    (lambda: functools.partial(Counting()), "sets `step.func.t`"),
    (lambda: Counting().forward, ".t`"),
    (spiking, "sets `neuron.mem`"),
    (in_a_sequence, "sets `net[1].mem`"),
    (appended, "calls `history.append`"),
    (appended_by_a_helper, "calls `history.append`"),
    (appended_by_a_bound_method, "`keep` changes a container"),
    (item_of_an_attribute, "sets an item of `net.states`"),
    (counters_in_a_loop, "sets `counters[...].t`"),
    (lambda: attribute_of_a_default, "sets `counting.t`"),
    (in_place, "changes the tensor `state` by `add_`"),
    (in_place_by_an_operator, "changes `state` by `+=`"),
    (item_of_a_tensor, "reads the value of the tensor `rate` by `item`"),
    (generator, "`draws` is a Generator, whose state changes with each draw"),
    (iterator, "`count` is a count, which gives another item each time"),
    (array_generator, "`rng` is a Generator, whose state changes"),
    (hook_that_counts, "`net._forward_hooks` holds a hook"),
    (lambda: lambda h, x: (h * random.random(), x), "`random.random` gives another value at each call"),
    (lambda: lambda h, x: (drawn(h), x), "`random.gauss` gives another value at each call"),
    (lambda: lambda h, x: (h * np.random.rand(), x), "is a RandomState, whose state changes with each draw"),
    (lambda: lambda h, x: (h * time.time(), x), "`time.time` gives another value at each call"),
    (lambda: lambda h, x: (h, print(x)), "`print` prints"),
    (lambda: lambda h, x: (h * eval("calls"), x), "`eval` runs code that is not read"),
    (switched, "calls `net.eval`"),
    (counted_by_a_helper_on_its_second_argument, "sets `b.t`"),
    (attribute_of_a_function, "sets `step.calls`"),
    (appended_in_a_comprehension, "calls `history.append`"),
    (lambda: lambda h, x: (h, logger.info("a step")), "`logger` logs"),
    (lambda: lambda h, x: (h, logging.info("a step")), "`logging.info` logs"),
    (lambda: lambda h, x: (h * float(os.environ["GAIN"]), x), "`os.environ` is the environment, which may change"),
    (lambda: lambda h, x: (h * float(os.getenv("GAIN", "1")), x), "`os.getenv` reads the environment"),
    (lambda: lambda h, x: (h * context.get(), x), "`context` is a ContextVar, which may have another value in each"),
    (lambda: lambda h, x: (h * of_thread.gain, x), "`of_thread` may hold other values in each thread"),
    (lambda: lambda h, x: (h - weight.grad, x), "reads the gradient of the tensor `weight`"),
    (counter_of_the_class, "sets `type(step).t`"),
    (lambda: lambda h, x: (h if torch.is_grad_enabled() else 2 * h, x), "asks whether gradients are recorded"),
]


@pytest.mark.parametrize(("make", "why"), CASES, ids=[f"{i}:{why[:40]}" for i, (_, why) in enumerate(CASES)])
def test_an_obstacle_says_why(make: Callable[[], Any], why: str) -> None:
    obstacle = Guard.of(make(), ()).obstacle
    assert obstacle is not None
    assert why in obstacle


def test_the_line_is_named() -> None:
    obstacle = Guard.of(global_counter, ()).obstacle
    line = global_counter.__code__.co_firstlineno + 2
    assert obstacle == f"`global_counter` (line {line} of {__file__}) assigns to the global `calls`"


# What stays inside a call is none


class Pair:
    def __init__(self, h: Tensor, x: Tensor) -> None:
        self.h, self.x = h, x

    def swapped(self) -> "Pair":
        other = Pair(self.x, self.h)
        other.h = other.h + 1
        return other


class Surrogate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        ctx.save_for_backward(u)
        ctx.slope = 25.0
        return (u > 0).to(u)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (u,) = ctx.saved_tensors
        return dy / (ctx.slope * u.abs() + 1) ** 2


def test_values_of_the_step_itself_may_change() -> None:
    cells = nn.ModuleList([nn.RNNCell(2, 2), nn.GRUCell(2, 2)])

    def step(h: tuple[Tensor, ...], x: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        kept, named, total = [], {}, torch.zeros_like(x)
        for i, cell in enumerate(cells):
            x = cell(x, h[i])
            kept.append(x)
            named[str(i)] = x
            total += x
        total.mul_(2)
        total[:, 0] = 1
        pair = Pair(total, x).swapped()
        pair.h = Surrogate.apply(pair.h)

        def close() -> Tensor:
            nonlocal total
            total = total + pair.h
            return total

        return tuple(kept), close() if len(kept) > 1 else x

    guard = Guard.of(step, list(cells.parameters()))
    assert guard.obstacle is None
    assert None not in guard.paths
    assert guard.changed() is None
