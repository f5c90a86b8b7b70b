"""A compiled step through time by operations of torch, one step after the other, which any transform knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..policies import Policy
from ..steps import SplitStep
from .arguments import Arguments
from .plain_loop import by_plain_loop
from .pytrees import Form, split

__all__ = ["bare", "looped"]


def bare(carry: Form, x: Form, T: int) -> Arguments:
    """Arguments of these forms without a step and any tensor, for T steps."""
    return Arguments(_no_step, [], carry, [], x, T, None)


def _no_step(carry: Any, x: Any) -> tuple[Any, Any]:
    raise AssertionError("the traced step runs in its place")


def looped(
    given: Arguments,
    policy: Policy,
    parts: SplitStep,
    counts: tuple[int, int],
    B: int,
    tensors: Sequence[Tensor],
    xi: Tensor | None,
    resets: Tensor | None,
) -> tuple[Tensor, ...]:
    """The outputs by operations of torch, of the traced step, one step after the other.

    xi: the factors that the policy has drawn, `[T, B]`.
    """
    n, m = counts[0], sum(counts)
    captured = dict(zip(parts.captured, tensors[m:], strict=True))
    fixed = captured | parts.constants(1, captured)

    def step(carry: Any, x: Any) -> tuple[Any, Any]:
        values = dict(fixed)
        values |= zip(parts.carry, split(carry, given.carry_form)[0], strict=True)
        values |= zip(parts.x, split(x, given.x_form)[0], strict=True)
        for part in (parts.hoisted, parts.forward, parts.outputs):
            values |= part(B, values)
        return given.carry_form.join(values[name] for name in parts.next), tuple(values[name] for name in parts.y)

    call = replace(given, step=step, carry=list(tensors[:n]), xs=list(tensors[n:m]), resets=resets)
    final, ys = by_plain_loop(call, policy, xi)
    return (*split(final, given.carry_form)[0], *ys)
