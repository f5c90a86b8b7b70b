"""The settings of torch at the time of the backward call: a gradient is that of the forward call's settings."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import bptt

B, H, T = 3, 8, 12
MEMORIES = [
    ("replay", "auto"),
    ("replay", "states"),
    ("replay", "checkpoints:steps=4"),
    ("eager", "auto"),
    ("auto", "auto"),
]


class Spike(torch.autograd.Function):
    """A function of a user's own, which is given no zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Tensor | None:
        (x,) = ctx.saved_tensors
        return None if grad is None else grad / (1 + x.abs()) ** 2


def found(setting: Any, kernel: str, memory: str, policy: str, autocast: bool, late: bool = False) -> list[Tensor]:
    """The gradients of carry, xs and captured tensors, computed inside a setting."""
    torch.manual_seed(0)
    lin, scale = torch.nn.Linear(H, H), torch.rand(H, requires_grad=True)
    computed, extra = torch.exp(scale), [torch.rand(H, requires_grad=True) for _ in range(T)]

    def step(carry: Any, x: Tensor) -> tuple[Any, Tensor]:
        h, n = carry
        h = torch.tanh(lin(h).to(h.dtype) * computed + x) + 0.1 * Spike.apply(h)
        h = h * extra[n] if late else h
        return (h, n + 1 if late else n), h

    h, x = torch.randn(B, H, requires_grad=True), torch.randn(T, B, H, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        (h_T, _), ys = bptt.scan(
            step, (h, 0 if late else torch.zeros(B)), x, gradient=policy, kernel=kernel, memory=memory
        )
        loss = ys.float().square().sum() + h_T.sum()
    wanted = [h, x, scale, *lin.parameters(), *(extra if late else ())]
    with setting:
        loss.backward()
    return [t.grad for t in wanted]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("policy", ["full", "chunked:5", "truncated:4/2", "truncated:3"])
@pytest.mark.parametrize(("kernel", "memory"), MEMORIES)
def test_inside_autocast(kernel: str, memory: str, policy: str, autocast: bool) -> None:
    outside = found(torch.autocast("cpu", enabled=False), kernel, memory, policy, autocast)
    inside = found(torch.autocast("cpu", torch.bfloat16), kernel, memory, policy, autocast)
    tolerance = {"rtol": 0.02, "atol": 0.02} if autocast else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(inside, outside, **tolerance)


def test_what_no_observed_step_captures_has_the_gradient_of_a_plain_loop_inside_autocast() -> None:
    outside = found(torch.autocast("cpu", enabled=False), "replay", "auto", "full", False, late=True)
    inside = found(torch.autocast("cpu", torch.bfloat16), "replay", "auto", "full", False, late=True)
    torch.testing.assert_close(inside, outside, rtol=0.1, atol=0.1)
    assert all(grad.abs().sum() > 0 for grad in inside)


@contextmanager
def default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


SETTINGS = {"default dtype": default_dtype, "deterministic": deterministic, "no grad": torch.no_grad,
            "inference": torch.inference_mode, "grad": torch.enable_grad}  # fmt: skip


@pytest.mark.parametrize("policy", ["full", "truncated:4/2"])
@pytest.mark.parametrize(("kernel", "memory"), MEMORIES)
@pytest.mark.parametrize("name", SETTINGS)
def test_inside_another_setting(name: str, kernel: str, memory: str, policy: str) -> None:
    expected = found(torch.enable_grad(), kernel, memory, policy, False)
    torch.testing.assert_close(found(SETTINGS[name](), kernel, memory, policy, False), expected)
