"""A traced step as a program, against autograd of a loop for each block: policies, memories, resets, factors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import combinations, product

import pytest
import torch
from steps_by_loop import STEPS, Stepped, by_loop
from torch import Tensor

from bptt.engine import StepPlan, StepProgram, run
from bptt.kernels import EagerSteps, Interpreter, variants
from bptt.memory import parse as parse_memory
from bptt.policies import Reach, parse
from bptt.steps import SplitStep, TracedStep, split, trace

POLICIES = ["full", "chunked:3", "truncated:4", "truncated:4/2", "truncated:6/2"]
MEMORIES = ["auto", "states", "checkpoints:steps=3", "checkpoints:bytes=3000"]

REFUSED = {"leaky with a counter"}
"""Steps whose core the interpreter has no instructions for."""

KERNELS = {"eager": EagerSteps(), **{f"interpreter, {v}": Interpreter(v) for v in variants()}}


T, B = 11, 5


@cache
def traced_step(name: str) -> tuple[Stepped, TracedStep, SplitStep]:
    """A step with its arguments, its trace and its parts."""
    torch.manual_seed(0)
    made = STEPS[name](T, B)
    traced = trace(made.step, made.carry, [x[0] for x in made.xs])
    assert {id(t) for t in traced.tensors if t.requires_grad} == {id(t) for t in made.captured}
    return made, traced, split(traced)


@dataclass(frozen=True)
class Expected:
    """What the loop finds of a step under a policy, and what it was given: the same for all memories and kernels."""

    reach: Reach
    resets: Tensor | None
    factors: Tensor | None
    cotangents: list[Tensor | None]
    outputs: list[Tensor]
    gradients: list[Tensor]


@cache
def expected(name: str, policy: str, cut: bool) -> Expected:
    """The loop's answer, with resets and factors at random edges or without."""
    made, *_ = traced_step(name)
    torch.manual_seed(1)
    resets = torch.rand(T, B) < 0.2 if cut else None
    factors = (torch.rand(T, B, dtype=torch.float64) + 0.5) * ~resets if resets is not None else None
    reach = parse(policy).reach(T).within(T)
    carry, ys = made.step([c.clone() for c in made.carry], [x[0] for x in made.xs])
    likes = [*carry, *(y.expand(T, *y.shape) for y in ys)]
    cotangents = [torch.randn(t.shape, dtype=t.dtype) if t.is_floating_point() else None for t in likes]
    n = len(carry)
    final, ys, gradients = by_loop(made, reach.blocks(T), resets, cotangents[:n], cotangents[n:], factors)
    return Expected(reach, resets, factors, cotangents, [*final, *ys], gradients)


def covering() -> list[tuple[str, str, str, str]]:
    """Each step with each policy and each memory, and for each of these one of the kernels in turn.

    Any three of step, policy, memory and kernel meet in every way, and so do any two; of all fours a part is left out.
    """
    names = list(KERNELS)
    return [
        (name, policy, memory, names[(i + j + k) % len(names)])
        for i, name in enumerate(STEPS)
        for j, policy in enumerate(POLICIES)
        for k, memory in enumerate(MEMORIES)
    ]


def test_three_of_step_policy_memory_and_kernel_meet_in_every_way() -> None:
    axes = [list(STEPS), POLICIES, MEMORIES, list(KERNELS)]
    for three in combinations(range(4), 3):
        met = {tuple(case[axis] for axis in three) for case in covering()}
        assert met == set(product(*(axes[axis] for axis in three)))


@pytest.mark.parametrize(("name", "policy", "memory", "kernel"), covering())
def test_every_gradient_is_that_of_the_loop(name: str, policy: str, memory: str, kernel: str) -> None:
    made, traced, step = traced_step(name)
    reason = KERNELS[kernel].refuses(step, made.carry[0].device, made.carry[0].dtype)
    if reason is not None:
        assert name in REFUSED, reason
        return
    for cut in (False, True):
        want = expected(name, policy, cut)
        plan = StepPlan.of(step, KERNELS[kernel], want.reach, T, B, parse_memory(memory), traced.lanes)
        outputs = run(StepProgram(plan, want.factors, want.resets), *made.carry, *made.xs, *traced.tensors)
        for got, value in zip(outputs, want.outputs, strict=True):
            torch.testing.assert_close(got, value, rtol=1e-10, atol=1e-12)
        wanted = [p for p in (*made.carry, *made.xs, *made.captured) if p.requires_grad]
        pairs = [(t, c) for t, c in zip(outputs, want.cotangents, strict=True) if t.requires_grad]
        got = torch.autograd.grad([t for t, _ in pairs], wanted, [c for _, c in pairs], allow_unused=True)
        by_id = dict(zip(map(id, wanted), got, strict=True))
        for p, value in zip((*made.carry, *made.xs, *made.captured), want.gradients, strict=True):
            if p.requires_grad:
                found = by_id[id(p)]
                found = torch.zeros_like(p) if found is None else found
                torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-11)
