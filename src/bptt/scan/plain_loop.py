"""A scan as a plain loop of recorded steps: inside the transforms of torch.func, and in forward mode.

The steps are operations of torch, and so is what a policy does between them: torch itself maps and differentiates the
loop, in any nesting. A time edge is the identity forward and multiplies adjoints by its factor backward, 0 where the
policy cuts it; a tangent crosses it as it is, since a policy changes adjoints alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..engine import EdgeFactor
from ..policies import Policy
from .arguments import Arguments
from .forward import StepResults
from .pytrees import Form, beside, differentiable, reset

__all__ = ["by_plain_loop", "drawn_factors"]


def by_plain_loop(given: Arguments, policy: Policy, xi: Tensor | None = None) -> tuple[Any, Any]:
    """(the final carry, ys in the order of the steps): see `scan`. xi: the factors that the policy has drawn before."""
    blocks = policy.reach(given.T).blocks(given.T)
    factors = drawn_factors(policy, given) if xi is None else xi
    results = StepResults(given.carry_form)
    entering: list[tuple[list[Tensor], Form]] = []  # the carries of the block before, from its earliest step on
    ys: list[list[Tensor]] = []
    carry, form, start = list(given.carry), given.carry_form, 0
    for earliest, first, last in blocks:
        if earliest > 0:
            carry, form = entering[earliest - start]
            carry = _crossed(carry, torch.zeros((), device="cpu"))
        else:
            carry, form = list(given.carry), given.carry_form
        start, entering = earliest, [(carry, form)]
        for t in range(earliest, last + 1):
            if factors is not None and t > earliest:
                carry = _crossed(carry, factors[t])
            results.form = form
            # Copies: a step may write to what it is given.
            own = [c.clone() for c in reset(carry, given.resets, t)]
            x = given.x_form.join([x[t].clone() for x in given.xs])
            carry, y = results.read(t, given.step(form.join(own), x), own)
            form = results.form
            entering.append((carry, form))
            if t >= first:
                ys.append([leaf.clone() for leaf in y])
    final, together = [c.clone() for c in carry], [torch.stack(steps) for steps in zip(*ys, strict=True)]
    return form.join(final), results.y_form.join(together)


def drawn_factors(policy: Policy, given: Arguments) -> Tensor | None:
    """The factors that a policy draws `[T, B]`; None for 1."""
    floats = [c for c in given.carry if differentiable(c)]
    if not policy.draws_factors or not floats:
        return None
    with torch.device("cpu"):  # as a policy's factors are, whatever the default device is
        drawn = policy.draw(given.T, given.lanes)
    return None if drawn is None else drawn.to(floats[0].device)


def _crossed(carry: Sequence[Tensor], factor: Tensor) -> list[Tensor]:
    """A carry after a time edge. factor: `[B]`, or one for all lanes."""
    return [EdgeFactor.apply(c, beside(factor.to(c), c)) if differentiable(c) else c for c in carry]
