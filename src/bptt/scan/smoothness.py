"""Whether a step's gradient is the derivative of its operations: it is not where the step detaches, and where an
autograd function of its own has a gradient of its own, as spikes have.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ..engine import Asked, MappedSteps, Saved
from ..memory import parse as parse_memory
from ..policies import Full
from .arguments import Arguments
from .compiled import Compiled
from .looped import bare, looped

__all__ = ["is_smooth"]

MOST_STEPS = 2
"""That are looked at."""


def is_smooth(entry: Compiled, given: Arguments, captured: Sequence[Tensor]) -> bool:
    """Whether the traced gradient of some steps is that of their traced operations, near the values of a call.

    It is asked once for a trace. Only such a step has tangents, and gradients of gradients, by its operations.
    """
    if entry.smooth is None:
        entry.smooth = _is_smooth(entry, given, captured)
    return entry.smooth


def _is_smooth(entry: Compiled, given: Arguments, captured: Sequence[Tensor]) -> bool:
    T, B = min(MOST_STEPS, given.T), given.carry[0].shape[0]
    plan = entry.plan("auto", given.carry, Full().reach(T).within(T), T, B, parse_memory("states"))
    loop = partial(
        looped, bare(given.carry_form, given.x_form, T), Full(), plan.step, (len(given.carry), len(given.xs))
    )
    program = MappedSteps(lambda _: plan, B, loop, [])
    near = [_near(t.detach()) for t in (*given.carry, *(x[:T] for x in given.xs))]
    inputs = tuple(program.rows((*near, *(t.detach() for t in captured))))
    with torch.enable_grad():
        outputs, tape = program.forward(inputs, keep=True)
        cotangents = tuple(_waves(o) if o.is_floating_point() else None for o in outputs)
        needs = tuple(t.is_floating_point() for t in near) + tuple(t.requires_grad for t in captured)
        asked = Asked(cotangents, needs)
        both = [program.backward(Saved(inputs, outputs, of), asked).inputs for of in (tape, None)]
    return all(_alike(a, b) for a, b in zip(*both, strict=True))


def _near(t: Tensor) -> Tensor:
    """Values near those of a tensor: at 0 a product has no derivative by either factor."""
    return t + 0.1 * _waves(t) if t.is_floating_point() else t


def _waves(t: Tensor) -> Tensor:
    """Values of a tensor's shape that differ from one another."""
    return torch.arange(1, t.numel() + 1, device=t.device).to(t.dtype).cos().view(t.shape)


def _alike(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return all(t is None or not t.any() for t in (a, b))
    tolerance = torch.finfo(a.dtype).eps ** 0.5
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * max(float(b.abs().max()), 1e-30), equal_nan=True)
