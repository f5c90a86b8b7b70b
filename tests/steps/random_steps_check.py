"""The check of a random step: its program against autograd of a loop for each block."""

from __future__ import annotations

from random import Random

import torch
from steps_by_loop import Step, Stepped, by_loop

from bptt.engine import StepPlan, StepProgram, run
from bptt.kernels import EagerSteps, Interpreter, StepKernel, variants
from bptt.memory import parse as parse_memory
from bptt.policies import parse
from bptt.steps import split, trace

from .random_steps import Leaves, drawn

__all__ = ["check"]

POLICIES = ["full", "full", "chunked:2", "chunked:3", "truncated:3", "truncated:4/2", "truncated:2", "truncated:5/3"]
MEMORIES = ["auto", "auto", "states", "checkpoints:steps=2", "checkpoints:steps=3"]


def check(random: Random) -> str:
    """Check a random step; the names of the kernels that ran it. Raises NotTraceable where it is refused."""
    T, B = random.choice([1, 4, 5, 7]), random.choice([1, 2, 3, 5])
    made = drawn(random, T, B)
    policy, memory = random.choice(POLICIES), random.choice(MEMORIES)
    reset, scaled = random.random() < 0.4, random.random() < 0.3
    step = made.step

    def cloned(c: Leaves, x: Leaves) -> tuple[Leaves, Leaves]:
        return step([t.clone() for t in c], [t.clone() for t in x])

    try:
        return _checked(made.carry, made.xs, Stepped(cloned, made.carry, made.xs, list(made.captured.values())), step,
                        policy, memory, reset, scaled, random)  # fmt: skip
    except Exception as error:
        shapes = {n: (list(t.shape), t.requires_grad) for n, t in made.captured.items()}
        given = [(list(t.shape), t.requires_grad) for t in (*made.carry, *made.xs)]
        error.add_note(
            f"{made.text}\nT={T}, B={B}, {policy}, {memory}, resets {reset}, factors {scaled}\n{shapes}\n{given}"
        )
        raise


def _checked(
    carry: Leaves,
    xs: Leaves,
    oracle: Stepped,
    step: Step,
    policy: str,
    memory: str,
    reset: bool,
    scaled: bool,
    random: Random,
) -> str:
    T, B = len(xs[0]) if xs else 4, len(carry[0])
    generator = torch.Generator().manual_seed(random.randrange(10**6))
    traced = trace(step, carry, [x[0] for x in xs])
    resets = torch.rand(T, B, generator=generator) < 0.25 if reset else None
    factors = torch.rand(T, B, generator=generator, dtype=torch.float64) + 0.5 if scaled else None
    if resets is not None:
        factors = (torch.ones(T, B, dtype=torch.float64) if factors is None else factors) * ~resets
    parts = split(traced)
    kernels: list[StepKernel] = [EagerSteps(), Interpreter(random.choice(variants()))]
    reach = parse(policy).reach(T).within(T)
    n, expected, ran = len(carry), None, []
    for kernel in kernels:
        if kernel.refuses(parts, carry[0].device, carry[0].dtype) is not None:
            continue
        ran.append(kernel.name)
        plan = StepPlan.of(parts, kernel, reach, T, B, parse_memory(memory), traced.lanes)
        program = StepProgram(plan, factors, resets)
        outputs = run(program, *carry, *xs, *traced.tensors)
        if expected is None:
            cotangents = [
                torch.randn(list(t.shape), generator=generator, dtype=t.dtype) if t.is_floating_point() else None
                for t in outputs
            ]
            xs_given = oracle if xs else Stepped(oracle.step, oracle.carry, [torch.zeros(T, B)], oracle.captured)
            expected = by_loop(xs_given, reach.blocks(T), resets, cotangents[:n], cotangents[n:], factors)
        final, ys, want = expected
        for got, value in zip(outputs, (*final, *ys), strict=True):
            torch.testing.assert_close(got, value, rtol=1e-8, atol=1e-10)
        wanted = [p for p in (*carry, *xs, *oracle.captured) if p.requires_grad]
        inputs = [*carry, *xs_given.xs, *oracle.captured]
        pairs = [(t, c) for t, c in zip(outputs, cotangents, strict=True) if t.requires_grad]
        found = (
            torch.autograd.grad([t for t, _ in pairs], wanted, [c for _, c in pairs], allow_unused=True)
            if pairs and wanted
            else [None] * len(wanted)
        )
        by_id = dict(zip(map(id, wanted), found, strict=True))
        for p, value in zip(inputs, want, strict=True):
            if p.requires_grad:
                grad = by_id[id(p)]
                torch.testing.assert_close(torch.zeros_like(p) if grad is None else grad, value, rtol=1e-7, atol=1e-9)
    return " ".join(ran)
