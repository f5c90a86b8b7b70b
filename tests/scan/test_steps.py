"""What a step may do beside computing: state of its own, writing in place, dicts in any order; and what is refused."""

import random as python_random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck

from bptt import Full, Truncated, scan
from bptt.policies import Policy

from .loops import DOUBLE, RESETS, Agree, B, Case, H, Step, T, expected, floats, loop, measured, random, weighed

ANOTHER = "step, run again in backward, gave another result at step"
each_order = pytest.mark.parametrize("create_graph", [False, True])


# A step that does not do the same again


def with_a_list(h: Tensor, x: Tensor) -> Step:
    seen: list[int] = []

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(0)
        h = torch.sin(h * len(seen) + x)
        return h, h

    return step


def with_a_growing_y(h: Tensor, x: Tensor) -> Step:
    calls: list[int] = []

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Any]:
        calls.append(0)
        return torch.sin(h + x), (h,) * (1 if len(calls) <= T + 1 else 2)

    return step


def with_numpys_random_numbers(h: Tensor, x: Tensor) -> Step:
    generator = np.random.default_rng(0)
    return lambda h, x: (torch.sin(h * generator.random() + x), h)


def with_pythons_random_numbers(h: Tensor, x: Tensor) -> Step:
    generator = python_random.Random(0)
    return lambda h, x: (torch.sin(h * generator.random() + x), h)


def with_a_generator_of_its_own(h: Tensor, x: Tensor) -> Step:
    generator = torch.Generator().manual_seed(0)
    return lambda h, x: (torch.sin(h * torch.rand(H, generator=generator, dtype=DOUBLE) + x), h)


def with_noise_in_y_alone(h: Tensor, x: Tensor) -> Step:
    generator = torch.Generator().manual_seed(0)
    return lambda h, x: (torch.sin(h + x), h * torch.rand(H, generator=generator, dtype=DOUBLE))


CHANGING = [
    with_a_list,
    with_a_growing_y,
    with_numpys_random_numbers,
    with_pythons_random_numbers,
    with_a_generator_of_its_own,
    with_noise_in_y_alone,
]


@pytest.mark.parametrize("make", CHANGING)
@pytest.mark.parametrize("policy", [Full(), Truncated(3)], ids=str)
@pytest.mark.parametrize("rows", ["auto", "coupled", "independent"])
@pytest.mark.parametrize("resets", [None, RESETS], ids=["", "resets"])
@each_order
def test_a_step_that_does_not_replay(
    make: Callable[[Tensor, Tensor], Step], policy: Policy, rows: Any, resets: Tensor | None, create_graph: bool
) -> None:
    h, xs = random(B, H), random(T, B, H)
    final, ys = scan(make(h, xs), h, xs, gradient=policy, rows=rows, resets=resets)
    with pytest.raises(RuntimeError, match=f"{ANOTHER} [0-6]: it must depend on carry, x and captured tensors alone"):
        torch.autograd.grad(weighed(floats((final, ys)), 0), [h, xs], create_graph=create_graph)


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("module", [nn.Dropout(0.5), nn.BatchNorm1d(H, dtype=DOUBLE)], ids=["dropout", "batch_norm"])
@each_order
def test_a_module_switched_to_eval(module: nn.Module, T: int, create_graph: bool) -> None:
    h, xs = random(B, H), random(T, B, H)
    module.train()
    final, _ = scan(lambda h, x: (torch.tanh(module(h) + x), None), h, xs)
    module.eval()
    with pytest.raises(RuntimeError, match=ANOTHER):
        torch.autograd.grad(final.sum(), h, create_graph=create_graph)


@pytest.mark.parametrize("policy", [Full(), Truncated(3)], ids=str)
def test_state_that_does_not_reach_the_result(policy: Policy, agree: Agree) -> None:
    norm, calls, largest = nn.BatchNorm1d(H, dtype=DOUBLE), [], torch.zeros((), dtype=DOUBLE)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(h.shape)
        with torch.no_grad():
            largest.copy_(torch.maximum(largest, h.abs().max()))
        h = torch.tanh(norm(h) + x)
        return h, h

    case = step, random(B, H), random(T, B, H), list(norm.parameters())
    agree(measured(case, policy), expected(case, policy))


def test_rows_declared_independent_that_give_another_result() -> None:
    h, xs = random(B, H), random(T, B, H)
    _, ys = scan(lambda h, x: (torch.softmax(h + x, 0), h), h, xs, gradient=Truncated(2), rows="independent")
    with pytest.raises(ValueError, match="rows='independent' does not hold: on the rows of several blocks"):
        ys.sum().backward()


@pytest.mark.parametrize("rows", ["auto", "independent"])
def test_rows_side_by_side_without_a_carry(rows: Any, agree: Agree) -> None:
    w, xs = random(H), random(T, B, H)
    _, ys = scan(lambda c, x: (c, torch.sin(x * w)), (), xs, gradient=Truncated(2), rows=rows)
    got, want = (torch.autograd.grad(weighed([values], 0), [w, xs]) for values in (ys, torch.sin(xs * w)))
    agree(got, want)


# Dicts in any order


@pytest.mark.parametrize("policy", [Full(), Truncated(3)], ids=str)
def test_dicts_are_matched_by_key(policy: Policy, agree: Agree) -> None:
    w, calls = random(H), []

    def ordered(carry: dict[str, Any], x: Tensor) -> tuple[dict[str, Any], dict[str, Tensor]]:
        h, c = carry["in"]["h"], carry["in"]["c"]
        new = {"h": torch.sin(c * w + x), "c": h * carry["n"]}
        return {"in": new, "n": carry["n"] + 1}, {"a": new["h"] * w, "b": h}

    def step(carry: dict[str, Any], x: Tensor) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The order of the dicts is another one in every second call, in forward or in backward."""
        calls.append(None)
        carry, ys = ordered(carry, x)
        if len(calls) % 2:
            return carry, ys
        return {"n": carry["n"], "in": dict(reversed(carry["in"].items()))}, dict(reversed(ys.items()))

    carry, xs = {"in": {"h": random(B, H), "c": random(B, H)}, "n": 1}, random(T, B, H)
    want = expected((ordered, carry, xs, [w]), policy)
    agree(measured((step, carry, xs, [w]), policy), want)
    calls.append(None)
    agree(measured((step, carry, xs, [w]), policy), want)
    final, ys = scan(step, carry, xs, gradient=policy)
    inputs = [*floats(carry), xs, w]
    once, twice = (
        torch.autograd.grad(weighed(floats((final, ys)), 0), inputs, create_graph=order, retain_graph=True)
        for order in (False, True)
    )
    agree(twice, once)


@pytest.mark.parametrize("other", [{"a": 1.0}, {"a": 1.0, "c": 1.0}, {"b": 1.0, "a": (1.0,)}])
def test_dicts_with_other_keys_are_refused(other: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="carry must have the same structure after step 0"):
        scan(lambda c, _: (other, None), {"a": 1.0, "b": 1.0}, length=2)


# Writing in place


def writing_to_x() -> Case:
    w = random(H)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        x.mul_(w).sin_()
        h = torch.tanh(h + x)
        return h, x

    return step, random(B, H), random(T, B, H), [w]


def writing_to_the_carry() -> Case:
    w = random(H)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h[:, 0].mul_(2)
        h.mul_(w).add_(x).sin_()
        return h, h

    return step, random(B, H), random(T, B, H), [w]


@pytest.mark.parametrize("make", [writing_to_x, writing_to_the_carry])
@pytest.mark.parametrize("policy", [Full(), Truncated(3)], ids=str)
@pytest.mark.parametrize("resets", [None, RESETS], ids=["", "resets"])
def test_a_step_may_write_to_what_it_is_given(
    make: Callable[[], Case], policy: Policy, resets: Tensor | None, agree: Agree
) -> None:
    step, carry, xs, captured = make()
    before = carry.detach().clone(), xs.detach().clone()
    got = measured((step, carry, xs, captured), policy, resets=resets)
    with torch.no_grad():
        scan(step, carry, xs, resets=resets)
    torch.testing.assert_close((carry.detach(), xs.detach()), before, rtol=0, atol=0)

    def copying(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h, y = step(h.clone(), x.clone())
        return h.clone(), y.clone()

    agree(got, expected((copying, carry, xs, captured), policy, resets=resets))


@pytest.mark.parametrize("make", [writing_to_x, writing_to_the_carry])
def test_second_derivatives_of_a_step_that_writes(make: Callable[[], Case]) -> None:
    step, h, xs, (w,) = make()

    def gradient(h: Tensor, xs: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        loss = weighed(floats(scan(step, h, xs)), 0)
        return torch.autograd.grad(loss, [h, xs], create_graph=True)

    assert gradcheck(gradient, (h, xs[:3].detach().requires_grad_(), w))


# Errors


@dataclass
class State:
    h: Tensor


@dataclass(slots=True)
class Slotted:
    h: tuple[Tensor, ...]


@pytest.mark.parametrize(
    "held", [State(torch.ones(2)), Slotted((torch.ones(2),)), torch.distributions.Normal(torch.zeros(2), 1.0)]
)
def test_an_unregistered_object_that_holds_tensors(held: Any) -> None:
    message = f"carry holds a {type(held).__name__}, which is not a registered pytree: register it"
    with pytest.raises(TypeError, match=message):
        scan(lambda c, _: (c, None), (torch.ones(2), held), length=2)
    with pytest.raises(TypeError, match=message):
        scan(lambda c, _: (held, None), torch.ones(2), length=2)
    with pytest.raises(ValueError, match=f"y must hold tensors, numbers or None: got {type(held).__name__}"):
        scan(lambda c, _: (c, (c, held)), torch.ones(2), length=2)


def test_arrays_pass_as_python_values() -> None:
    (h, n), _ = scan(lambda c, _: ((c[0] * 2, c[1] + 1), None), (torch.ones(2), np.zeros(3)), length=4)
    assert h.tolist() == [16, 16]
    assert n.tolist() == [4, 4, 4]


@pytest.mark.parametrize("length", [3.0, "3", torch.tensor(3.0)])
def test_a_length_that_is_no_integer(length: Any) -> None:
    with pytest.raises(TypeError, match="length must be an integer or None: got "):
        scan(lambda c, _: (c, None), torch.ones(2), length=length)


def test_a_length_of_another_integer_type() -> None:
    final, _ = scan(lambda c, _: (c + 1, None), torch.zeros(()), length=np.int64(3))
    assert final.item() == 3


def test_functional_transforms_without_gradients() -> None:
    def run(h: Tensor) -> Tensor:
        return scan(lambda h, x: (torch.sin(h + x), None), h, torch.ones(T, H))[0]

    h = torch.rand(B, H)
    with torch.no_grad():
        torch.testing.assert_close(torch.func.vmap(run)(h), loop(lambda h, x: (torch.sin(h + 1), None), h, None, T)[0])
