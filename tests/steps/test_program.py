"""A traced step as a program, against autograd of a loop for each block: policies, memories, resets, factors."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from steps_by_loop import STEPS, Stepped, by_loop

from bptt.engine import StepPlan, StepProgram, run
from bptt.kernels import EagerSteps, Interpreter, variants
from bptt.memory import parse as parse_memory
from bptt.policies import parse
from bptt.steps import SplitStep, TracedStep, split, trace

POLICIES = ["full", "chunked:3", "truncated:4", "truncated:4/2", "truncated:6/2"]


REFUSED = {"convolution", "leaky with a counter"}
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


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("memory", ["auto", "states", "checkpoints:steps=3", "checkpoints:bytes=3000"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", STEPS)
def test_every_gradient_is_that_of_the_loop(name: str, policy: str, memory: str, kernel: str) -> None:
    made, traced, step = traced_step(name)
    reason = KERNELS[kernel].refuses(step, made.carry[0].device, made.carry[0].dtype)
    if reason is not None:
        assert name in REFUSED, reason
        return
    for cut in (False, True):
        resets = torch.rand(T, B) < 0.2 if cut else None
        factors = (torch.rand(T, B, dtype=torch.float64) + 0.5) * ~resets if resets is not None else None
        reach = parse(policy).reach(T).within(T)
        plan = StepPlan.of(step, KERNELS[kernel], reach, T, B, parse_memory(memory), traced.lanes)
        outputs = run(StepProgram(plan, factors, resets), *made.carry, *made.xs, *traced.tensors)
        n = len(made.carry)
        cotangents = [torch.randn_like(t) if t.is_floating_point() else None for t in outputs]
        final, ys, want = by_loop(made, reach.blocks(T), resets, cotangents[:n], cotangents[n:], factors)
        for got, expected in zip(outputs, (*final, *ys), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
        wanted = [p for p in (*made.carry, *made.xs, *made.captured) if p.requires_grad]
        pairs = [(t, c) for t, c in zip(outputs, cotangents, strict=True) if t.requires_grad]
        got = torch.autograd.grad([t for t, _ in pairs], wanted, [c for _, c in pairs], allow_unused=True)
        by_id = dict(zip(map(id, wanted), got, strict=True))
        for p, expected in zip((*made.carry, *made.xs, *made.captured), want, strict=True):
            if p.requires_grad:
                found = by_id[id(p)]
                found = torch.zeros_like(p) if found is None else found
                torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
