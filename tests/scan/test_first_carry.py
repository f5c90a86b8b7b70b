"""A first carry of another kind than those after it: one that broadcasts, one that autocast casts, none at all."""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bptt
from bptt import scan
from bptt.policies import Policy

from .loops import DOUBLE, POLICIES, Agree, B, Case, H, T, X, expected, loop, measured, random

compiled = importlib.import_module("bptt.scan.compiled")
KERNELS = ["eager", "replay"]


@pytest.fixture(autouse=True)
def _traced_as_often_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test makes steps of its own of the same code."""
    monkeypatch.setattr(compiled, "MOST_OF_A_KIND", 10_000)


def one_state_for_all_lanes() -> Case:
    w, u = random(X, H), random(H, H)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(x @ w + h @ u)
        return h, h

    return step, random(1, H), random(T, B, X), [w, u]


def two_states() -> Case:
    cell = nn.Linear(X + H, H, dtype=DOUBLE)

    def step(c: dict[str, Tensor], x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        h = torch.tanh(cell(torch.cat([x, c["h"]], 1)) + c["slow"])
        return {"h": h, "slow": 0.9 * c["slow"] + 0.1 * h}, h

    return step, {"h": random(B, H), "slow": random(H)}, random(T, B, X), list(cell.parameters())


BROADCAST = {"one state for all lanes": one_state_for_all_lanes, "two states": two_states}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("name", BROADCAST)
def test_a_carry_that_broadcasts(name: str, policy: Policy, kernel: str, agree: Agree) -> None:
    torch.manual_seed(0)
    case = BROADCAST[name]()
    agree(measured(case, policy, kernel=kernel), expected(case, policy))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("memory", ["states", "checkpoints:steps=2"])
def test_a_carry_that_broadcasts_with_resets_and_checkpoints(memory: str, kernel: str, agree: Agree) -> None:
    torch.manual_seed(0)
    case = one_state_for_all_lanes()
    resets = torch.tensor([0, 1, 0, 0, 0, 1, 0]).bool()
    for policy in (POLICIES["chunked"], POLICIES["truncated"]):
        got = measured(case, policy, memory=memory, resets=resets, kernel=kernel)
        agree(got, expected(case, policy, resets=resets[:, None]))


@pytest.mark.parametrize("kernel", KERNELS)
def test_draws_that_depend_on_the_shape_of_the_carry_are_not_taken_for_the_same(kernel: str) -> None:
    w = random(X, H)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(x @ w + h + torch.randn_like(h))
        return h, h

    torch.manual_seed(0)
    with pytest.raises((ValueError, RuntimeError), match=r"must be the same after step 0|cannot run this step"):
        scan(step, random(1, H), random(T, B, X), kernel=kernel)


def test_a_step_that_tells_the_shapes_apart_gets_the_error_it_had() -> None:
    w = random(X, H)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(x @ w + h / len(h))
        return h, h

    with pytest.raises(ValueError, match=r"carry must be the same after step 0 as before it"):
        scan(step, random(1, H), random(T, B, X))


def with_a_state_of_its_own(empty: Any) -> Case:
    first, w, u = random(H), random(X, H), random(H, H)

    def step(h: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        if h is None or h.numel() == 0:
            h = first.expand(len(x), H)
        h = torch.tanh(x @ w + h @ u)
        return h, h

    return step, empty, random(T, B, X), [first, w, u]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("empty", [None, torch.empty(0, dtype=DOUBLE)], ids=["None", "empty"])
def test_a_step_that_makes_its_first_state(empty: Any, reverse: bool, kernel: str, agree: Agree) -> None:
    torch.manual_seed(0)
    step, carry, xs, captured = with_a_state_of_its_own(empty)
    for steps in (1, 2, T):
        case = step, carry, xs.detach()[:steps].requires_grad_(), captured
        final, ys = scan(step, carry, case[2], reverse=reverse, kernel=kernel)
        end, each = loop(step, carry, case[2], steps, reverse=reverse)
        agree(final, end)
        agree(ys, torch.stack(each))
        inputs = [case[2], *captured]
        got = torch.autograd.grad(ys.sin().sum() + final.sum(), inputs, materialize_grads=True)
        agree(got, torch.autograd.grad(torch.stack(each).sin().sum() + end.sum(), inputs, materialize_grads=True))


@pytest.mark.parametrize("policy", ["chunked", "truncated"])
def test_a_step_that_makes_its_first_state_is_refused_where_gradients_are_cut(policy: str) -> None:
    step, carry, xs, _ = with_a_state_of_its_own(None)
    with pytest.raises(ValueError, match=r"must be the same after step 0 as before it: expected NoneType"):
        scan(step, carry, xs, gradient=POLICIES[policy])


def test_none_that_stays_none_is_no_state(agree: Agree) -> None:
    w = random(X, H)

    def step(c: Any, x: Tensor) -> tuple[Any, Tensor]:
        h = torch.tanh(c[0] + x @ w)
        return (h, None), h

    case = step, (random(B, H), None), random(T, B, X), [w]
    for kernel in KERNELS:
        agree(measured(case, bptt.Full(), kernel=kernel), expected(case, bptt.Full()))


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_carry_that_autocast_casts_from_a_value_that_bfloat16_holds(kernel: str) -> None:
    torch.manual_seed(0)
    cell = nn.Linear(X + H, H)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(cell(torch.cat([x, h.to(x.dtype)], 1)))
        return h, h

    xs = torch.randn(T, B, X)
    with torch.autocast("cpu", torch.bfloat16):
        h = torch.zeros(B, H, requires_grad=True)
        _, ys = scan(step, h, xs, kernel=kernel)
        (got,) = torch.autograd.grad(ys.float().sum(), h)
        with torch.no_grad():
            values = torch.stack(loop(step, h, xs, T)[1])
        (want,) = torch.autograd.grad(torch.stack(loop(step, h, xs, T)[1]).float().sum(), h)
        assert got.dtype == torch.float32
        torch.testing.assert_close(ys, values, rtol=0.02, atol=0.02)
        torch.testing.assert_close(got, want, rtol=0.05, atol=0.02)
        with pytest.raises((ValueError, RuntimeError), match=r"must be the same after step 0|cannot run this step"):
            scan(step, torch.full((B, H), 1.001), xs, kernel=kernel)
