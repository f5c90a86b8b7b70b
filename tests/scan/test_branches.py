"""Steps whose Python code branches on whole numbers of the carry: compiled as long as each branch goes one way."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

import bptt
from bptt import scan

B, H, T = 3, 4, 12
DOUBLE = torch.float64


def rows(*sizes: int) -> Tensor:
    return torch.randn(*sizes, dtype=DOUBLE, requires_grad=True)


class Counting:
    """A step that begins from the input where its counter is zero."""

    def __init__(self, grows: bool = True) -> None:
        self.w, self.start, self.grows = rows(H, H), rows(H), grows

    def of(self) -> Any:
        w, start, grows = self.w, self.start, self.grows

        def step(carry: Any, x: Tensor) -> Any:
            h, n = carry
            if torch.all(n == 0):
                h = start.expand_as(h) * x
            h = torch.tanh(h @ w + x)
            return (h, n + 1 if grows else n), h

        return step


def looped(step: Any, carry: Any, xs: Tensor, resets: Tensor | None = None) -> tuple[Any, Tensor]:
    ys = []
    for t, x in enumerate(xs):
        if resets is not None:
            carry = tuple(c.masked_fill(resets[t].view(-1, *(1,) * (c.dim() - 1)), 0) for c in carry)
        carry, y = step(carry, x)
        ys.append(y)
    return carry, torch.stack(ys)


def agree(step: Any, n: Tensor, inputs: list[Tensor], resets: Tensor | None = None, **kw: Any) -> None:
    h, xs = rows(B, H), rows(T, B, H)
    expected, got = looped(step, (h, n), xs, resets), scan(step, (h, n), xs, resets=resets, **kw)
    torch.testing.assert_close(got, expected)
    inputs = [h, xs, *inputs]
    losses = (ys.square().sum() + carry[0].sin().sum() for carry, ys in (got, expected))
    found, want = (torch.autograd.grad(loss, inputs, allow_unused=True) for loss in losses)
    for g, w, p in zip(found, want, inputs, strict=True):
        torch.testing.assert_close(*(torch.zeros_like(p) if t is None else t for t in (g, w)))


ZERO = torch.zeros(B, dtype=torch.int64)


@pytest.mark.parametrize("kernel", ["auto", "eager"])
def test_the_first_step_runs_by_itself_and_the_rest_is_compiled(kernel: str) -> None:
    made = Counting()
    step = made.of()
    for first in (ZERO, ZERO, ZERO + 5, torch.arange(B), ZERO):
        agree(step, first, [made.w, made.start], kernel=kernel)


def test_the_rest_is_not_called() -> None:
    made, xs = Counting(), torch.randn(T, B, H, dtype=DOUBLE)
    step, carry = made.of(), (torch.zeros(B, H, dtype=DOUBLE), ZERO)
    for _ in range(9):
        scan(step, carry, xs, kernel="eager")
    calls = list[int]()

    def trace(frame: FrameType, event: str, arg: Any) -> None:
        if event == "call" and frame.f_code is step.__code__:
            calls.append(1)

    sys.setprofile(trace)
    try:
        for _ in range(6):
            scan(step, carry, xs, kernel="eager")
    finally:
        sys.setprofile(None)
    assert 6 <= len(calls) <= 8  # the first steps, and perhaps one that is compared


def test_a_branch_that_always_goes_one_way_is_compiled_under_every_policy() -> None:
    made = Counting(grows=False)
    step = made.of()
    for first in (ZERO, ZERO + 1):
        results = []
        for kernel in ("eager", "replay"):
            torch.manual_seed(0)
            h, xs = rows(B, H), rows(T, B, H)
            _, ys = scan(step, (h, first), xs, gradient="truncated:4/2", kernel=kernel)
            results.append((ys, *torch.autograd.grad(ys.sum(), (xs, made.w))))
        torch.testing.assert_close(*results)


def test_where_the_branch_is_taken_again_or_the_policy_cuts_the_step_is_replayed() -> None:
    made = Counting()
    step, resets = made.of(), torch.zeros(T, B, dtype=torch.bool)
    resets[6] = True
    agree(step, ZERO, [made.w, made.start], resets)
    agree(step, ZERO + 1, [made.w, made.start], resets)
    h, xs = torch.zeros(B, H, dtype=DOUBLE), torch.randn(T, B, H, dtype=DOUBLE)
    with pytest.raises(RuntimeError, match="reads a value of its carry, and branches another way at step 6"):
        scan(step, (h, ZERO + 1), xs, resets=resets, kernel="eager")
    with pytest.raises(RuntimeError, match="reads a value of its carry, and branches another way at step 1"):
        scan(step, (h, ZERO), xs, gradient="chunked:4", kernel="eager")
    results = [scan(step, (h, ZERO), xs, gradient="chunked:4", kernel=kernel)[1] for kernel in ("auto", "replay")]
    torch.testing.assert_close(*results)
    results = [torch.autograd.grad(ys.sum(), made.w)[0] for ys in results]
    torch.testing.assert_close(*results)


def test_numbers_that_the_state_decides_are_compared_at_every_step() -> None:
    w = rows(H, H)

    def step(carry: Any, x: Tensor) -> Any:
        h, n = carry
        h = torch.tanh(h @ w + x)
        if (n > 3).any():
            h = h * 0.5
        return (h, n + (h[:, 0] > 0)), h

    for _ in range(4):
        agree(step, ZERO, [w])


@pytest.mark.parametrize("memory", ["states", "checkpoints:steps=3"])
def test_every_memory(memory: str) -> None:
    made = Counting()
    agree(made.of(), ZERO, [made.w, made.start], memory=memory, kernel="eager")


def test_other_branches_on_values_are_replayed() -> None:
    w = rows(H, H)

    def by_state(carry: Any, x: Tensor) -> Any:
        h, n = carry
        return (torch.tanh((h if torch.all(h > 0) else -h) @ w + x), n), h

    def drawing(carry: Any, x: Tensor) -> Any:
        h, n = carry
        h = h if torch.all(n == 0) else -h
        return (torch.tanh(h @ w + x) + 0 * torch.rand_like(h), n + 1), h

    for step in (by_state, drawing):
        assert "reads a value" in bptt.explain(step, (rows(B, H), ZERO), rows(B, H)).reason
        agree(step, ZERO, [w])


def test_a_branch_that_goes_the_other_way_in_a_later_call_runs_the_step() -> None:
    w, flag = rows(H, H), torch.zeros(B, dtype=torch.int64)

    def by_captured(carry: Any, x: Tensor) -> Any:
        h, n = carry
        return (torch.tanh((h if torch.all(flag == 0) else -h) @ w + x), n), h

    assert bptt.explain(by_captured, (rows(B, H), ZERO), rows(B, H)).kernel == "interpreter"
    agree(by_captured, ZERO, [w])
    flag[1] = 1
    agree(by_captured, ZERO, [w])
