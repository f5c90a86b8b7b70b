"""Random steps against autograd of a loop, in both kernels; and those that once were wrong, by name."""

from __future__ import annotations

from contextlib import suppress
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from steps_by_loop import Leaves

from bptt.engine import StepPlan, StepProgram, run
from bptt.kernels import EagerSteps, Interpreter
from bptt.memory import parse as parse_memory
from bptt.policies import Full
from bptt.steps import NotTraceable, split, trace

from .random_steps_check import check


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 10**9))
def test_a_random_step_has_the_outputs_and_gradients_of_the_loop(seed: int) -> None:
    with suppress(NotTraceable):  # what cannot be traced is replayed
        check(Random(seed))


def test_a_leaf_whose_next_has_no_gradient_hands_what_ys_send_to_the_first_carry() -> None:
    h = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)

    def step(c: Leaves, x: Leaves) -> tuple[Leaves, Leaves]:
        return [torch.cos(c[0]).detach()], [torch.sin(c[0])]

    traced = trace(step, [h], [])
    parts = split(traced)
    for kernel in (EagerSteps(), Interpreter()):
        program = StepProgram(StepPlan.of(parts, kernel, Full().reach(4).within(4), 4, 3, parse_memory("auto")))
        _, ys = run(program, h)
        (grad,) = torch.autograd.grad(ys, h, torch.ones_like(ys))
        torch.testing.assert_close(grad, torch.cos(h.detach()))


def test_constants_of_several_elements_are_compared_by_value() -> None:
    h = torch.randn(3, 2, dtype=torch.float64)
    traced = trace(lambda c, x: ([c[0] * torch.tensor([1.5, 2.5], dtype=torch.float64)], []), [h], [])
    assert traced.constants == (True,)
    with pytest.raises(NotTraceable):
        trace(lambda c, x: ([c[0] * torch.tensor([1.0 + len(c[0]), 2.5])], []), [h.float()], [])


@pytest.mark.parametrize(
    "expression",
    [
        "h[:, ::2].repeat(1, 2)", "F.mish(h)", "torch.einsum('bij,jk->bik', h.unsqueeze(1), w).squeeze(1)",
        "(h * w.sum(0)).sum(-1, keepdim=True) * w.sum()", "torch.stack([h, h * w[0]], 1).flatten(1)[:, 2:6]",
    ],
)  # fmt: skip
def test_is_traced(expression: str) -> None:
    h = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    w = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    step = eval(f"lambda c, x: (lambda h: ([torch.tanh({expression}) + 0 * h], []))(c[0])",
                {"torch": torch, "F": torch.nn.functional, "w": w})  # fmt: skip
    split(trace(step, [h], []))
