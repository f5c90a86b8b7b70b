"""Random cores in the interpreter: operations, views and products drawn one after the other, forward and back."""

import random
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from bptt.kernels.frames import Frames
from bptt.kernels.interpreter import Interpreter
from bptt.policies import Chunked, Full, Truncated
from bptt.steps import SplitStep

from . import handmade
from .test_interpreter import drawn, start, taped

Agree = Callable[..., None]


def core_of(
    seed: int, H: int
) -> Callable[[list[Tensor], list[Tensor], list[Tensor]], tuple[list[Tensor], list[Tensor]]]:
    """A core on two carries `[R, H]` and `[R, 2, H]`, x `[R, 3 H]`, a matrix `[H, 2 H]` and a vector `[H]`."""

    def core(carry: list[Tensor], x: list[Tensor], w: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        draw = random.Random(seed)
        pool = [carry[0], *carry[1].unbind(1), *x[0].chunk(3, 1), w[1]]

        def rows() -> Tensor:
            while (found := draw.choice(pool)).dim() < 2:
                pass
            return found

        def product() -> Tensor:
            a, b = torch.mm(rows(), w[0]).chunk(2, 1)
            return a + b * draw.choice(pool)

        def normalised() -> Tensor:
            a = rows()
            return a - a.mean(1, keepdim=True)

        def softmax() -> Tensor:
            e = torch.exp(torch.tanh(rows()))
            return e / e.sum(1, keepdim=True)

        def stacked() -> Tensor:
            both = torch.stack([rows(), rows()], 1)
            return torch.bmm(torch.sigmoid(both), both.transpose(1, 2)).reshape(-1, 4)[:, 1:2] * rows()

        def turned() -> Tensor:
            a = torch.cat([rows(), rows(), rows()], 1).view(-1, 3, H).transpose(1, 2)
            return a[:, :, draw.randrange(3)] + a.amax(2)

        operations: list[Callable[[], Tensor]] = [
            lambda: rows() + draw.choice(pool), lambda: rows() - draw.choice(pool), lambda: rows() * draw.choice(pool),
            lambda: rows() * draw.choice(pool) + draw.choice(pool), lambda: torch.tanh(rows()),
            lambda: torch.sigmoid(rows()), lambda: torch.sin(rows()), lambda: torch.relu(rows()) * 0.5,
            lambda: torch.where(rows() > draw.choice(pool), rows(), draw.choice(pool)),
            lambda: torch.maximum(rows(), draw.choice(pool)), lambda: torch.nn.functional.softplus(rows()),
            lambda: rows().clamp(-0.5, 0.75), lambda: torch.exp(-rows() ** 2), product, normalised, softmax, stacked,
            turned,
        ]  # fmt: skip
        for _ in range(14):
            pool.append(torch.tanh(draw.choice(operations)()) * 0.9)
        a, b, c = pool[-1], pool[-2] + 0 * carry[1][:, 0], pool[-3]
        return [a + 0.1 * carry[0], torch.stack([b, c], 1)], [torch.cat([pool[-4], pool[-1]], 1), rows() * 2]

    return core


@cache
def step_of(seed: int) -> SplitStep:
    H = 3 + seed % 5
    weights = [torch.zeros(H, 2 * H), torch.zeros(H)]
    return handmade.split(core_of(seed, H), [(H,), (2, H)], [(3 * H,)], weights)


@cache
def expected(seed: int) -> list[tuple[str, tuple[Any, ...], Any]]:
    """What each stage is given, and what torch operations make of it: once for all variants of the interpreter."""
    step, T, B = step_of(seed), 5, 1 + seed % 3
    torch.manual_seed(20)
    values, carry = drawn(step, [*step.x, *step.captured], T, B), start(step, B)
    given: tuple[Any, ...] = (step, values, carry, None, T, step.y)
    found = [("forward", given, handmade.advance(*given))]
    tape = taped(step, T, B)
    for policy in (Full(), Chunked(2), Truncated(3)):
        given = step, tape, Frames.of(policy.reach(T), None, T, B), [*carry], None, True
        found.append((str(policy), given, handmade.sweep(*given)))
    return found


@pytest.mark.parametrize("seed", range(10))
def test_a_random_core(interpreter: Interpreter, seed: int, agree: Agree) -> None:
    assert interpreter.refuses(step_of(seed), torch.device("cpu"), torch.float64) is None
    for stage, given, value in expected(seed):
        agree((interpreter.advance if stage == "forward" else interpreter.sweep)(*given), value, stage)
