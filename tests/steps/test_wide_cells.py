"""Cells with memories of another form than a vector: convolved, solved, attended, of outer products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from steps_by_loop import Stepped, by_loop
from torch import Tensor
from torch.nn.functional import conv1d, conv2d

from bptt.bench.step_cells import STEP_CELLS
from bptt.engine import StepPlan, StepProgram, run
from bptt.kernels import EagerSteps, Interpreter, variants
from bptt.memory import parse as parse_memory
from bptt.policies import parse
from bptt.scan import scan
from bptt.steps import split, trace

T, B = 7, 3

KERNELS = {"eager": EagerSteps(), **{v: Interpreter(v) for v in variants()}}


def of_bench(name: str) -> Stepped:
    step, carry, xs, parameters = STEP_CELLS[name].make(B, 19, torch.float64, T=T)
    leaves = list(carry) if isinstance(carry, tuple) else [carry]

    def flat(c: list[Tensor], x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        new, y = step(tuple(c) if isinstance(carry, tuple) else c[0], x[0])
        return (list(new) if isinstance(new, tuple) else [new]), [y]

    return Stepped(flat, [c.requires_grad_() for c in leaves], [xs.requires_grad_()], parameters)


def convolved(convolve: Any, *size: int, taps: tuple[int, ...], padding: int, channels: int = 3) -> Stepped:
    """A state of some channels that is convolved with the input, in which products are shared by cat."""
    w = (torch.randn(channels, channels + 2, *taps, dtype=torch.float64) * 0.2).requires_grad_()
    b = torch.randn(channels, dtype=torch.float64, requires_grad=True)
    h = torch.randn(B, channels, *size, dtype=torch.float64, requires_grad=True)
    x = torch.randn(T, B, 2, *size, dtype=torch.float64, requires_grad=True)

    def step(carry: list[Tensor], x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        new = convolve(torch.cat([carry[0], x[0]], 1), w, b, padding=padding).tanh()
        return [new], [new * 2]

    return Stepped(step, [h], [x], [w, b])


def cumulated() -> Stepped:
    w = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    h = torch.randn(B, 4, 5, dtype=torch.float64, requires_grad=True)
    x = torch.randn(T, B, 4, 5, dtype=torch.float64, requires_grad=True)

    def step(carry: list[Tensor], x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        sums = carry[0].cumsum(1) * w + carry[0].flip(2).cumsum(-1)
        new = torch.tanh(0.3 * sums + x[0].flip(1))
        return [new], [new.sum(1) + new.amax(1)]

    return Stepped(step, [h], [x], [w])


CELLS = {
    "cumulated": cumulated,
    "kalman": lambda: of_bench("kalman"),
    "attention": lambda: of_bench("attention"),
    "selective": lambda: of_bench("selective"),
    "gated delta": lambda: of_bench("gated-delta"),
    "conv1d": lambda: convolved(conv1d, 7, taps=(5,), padding=2),
    "conv2d": lambda: convolved(conv2d, 4, 5, taps=(3, 3), padding=1),
    "conv2d of wide images": lambda: convolved(conv2d, 3, 35, taps=(3, 3), padding=1, channels=2),
    "conv2d of more channels": lambda: convolved(conv2d, 4, 5, taps=(3, 3), padding=1, channels=5),
    "conv2d by 1": lambda: convolved(conv2d, 2, 3, taps=(1, 1), padding=0),
}


@pytest.mark.parametrize("policy", ["full", "truncated:4/2"])
@pytest.mark.parametrize("name", CELLS)
def test_gradients_are_those_of_the_loop(name: str, policy: str) -> None:
    torch.manual_seed(0)
    made = CELLS[name]()
    traced = trace(made.step, made.carry, [x[0] for x in made.xs])
    step, reach = split(traced), parse(policy).reach(T).within(T)
    given = [*made.carry, *made.xs, *traced.tensors]
    cotangents, want = None, None
    for kernel in KERNELS.values():
        assert kernel.refuses(step, made.carry[0].device, torch.float64) is None
        plan = StepPlan.of(step, kernel, reach, T, B, parse_memory("auto"), traced.lanes)
        outputs = run(StepProgram(plan), *given)
        if want is None:
            cotangents = [torch.randn_like(t) for t in outputs]
            n = len(made.carry)
            want = by_loop(made, reach.blocks(T), None, cotangents[:n], cotangents[n:], None)
        leaves = [*made.carry, *made.xs, *made.captured]
        got = torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True)
        for found, expected in zip((*outputs, *got), (*want[0], *want[1], *want[2]), strict=True):
            found = torch.zeros_like(expected) if found is None else found
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_reductions_of_the_gradient_are_computed_in_the_walk() -> None:
    made = of_bench("selective")
    step = split(trace(made.step, made.carry, [x[0] for x in made.xs]))
    widest = max(step.row_bytes([name]) for name in step.sent)
    assert widest < step.row_bytes([step.carry[0]])
    by_operations = step.for_operations
    assert max(by_operations.row_bytes([name]) for name in by_operations.sent) >= by_operations.row_bytes(step.carry)


@pytest.mark.parametrize("kernel", ["auto", "eager"])
def test_a_singular_matrix_raises_what_the_loop_raises(kernel: str) -> None:
    def step(S: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return S * 1.0, torch.linalg.solve(S, x)

    S = torch.eye(3).repeat(2, 1, 1)
    xs = torch.randn(9, 2, 3, 1)
    _, y = scan(step, S, xs, kernel=kernel)
    torch.testing.assert_close(y, xs)
    S[1, 2, 2] = 0
    with pytest.raises(RuntimeError, match="singular"):
        scan(step, S, xs, kernel=kernel)
