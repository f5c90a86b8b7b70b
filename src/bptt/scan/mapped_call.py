"""One call of `scan` by a compiled step inside the transforms of torch.func: what vmap maps over becomes lanes."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad

from ..engine import Check, MappedSteps, forward_mode, reaches_all, run
from ..kernels import OutOfBounds
from ..memory import parse as parse_memory
from ..policies import Policy
from ..steps import Unwrapped, holds_wrapped, is_mapped, origin
from .arguments import Arguments
from .compiled import compiled_step
from .compiled_call import StepDiffers, comparison, reason_not_to_compile, results_of
from .forward import ScanResults
from .lanes import as_one_lane, lanes_differ
from .looped import bare, looped
from .plain_loop import drawn_factors
from .pytrees import differentiable
from .smoothness import is_smooth
from .surroundings import Surroundings, generator_states, set_generators
from .tangents import pushed

__all__ = ["by_mapped_step"]


def by_mapped_step(given: Arguments, policy: Policy, kernel: str) -> ScanResults | None:
    """The results of a call inside transforms by a compiled step; None where a plain loop has to run instead.

    That is where the call does what an ordinary one would not be compiled for, or the step draws random numbers, and
    where it captures what a vmap maps over, or in an object of its own class what another transform has wrapped; in
    forward mode and in the gradient of a gradient also where its gradient is not the derivative of its operations, and
    in the latter where a policy cuts time edges.
    """
    if reason_not_to_compile(given, kernel) is not None:
        return None
    if torch._C._is_any_autocast_enabled():
        return None
    code = origin(given.step)
    if not isinstance(code, Hashable) or code in _WRAPPED:
        return None
    own: Unwrapped | None = None
    with temporarily_clear_interpreter_stack(), forward_ad._set_fwd_grad_enabled(False):
        one = _of_the_first(given)
        if holds_wrapped(given.step):
            own = Unwrapped.of(given.step, _bare)
            if own is None or any(map(is_mapped, own.given.values())):
                return None
            one = replace(one, step=own.step)
        surroundings = Surroundings.current(one.devices)
        with nullcontext() if own is None else own.within():
            entry, captured = compiled_step(one, surroundings, not lanes_differ(given, policy))
        if entry.guard is None or any(map(functorch.is_functorch_wrapped_tensor, captured)):
            while len(_WRAPPED) >= MOST:
                _WRAPPED.pop(next(iter(_WRAPPED)))
            _WRAPPED[code] = None
            return None
    if own is not None:
        one = replace(one, step=own)
    if entry.one_lane and entry.reason is None:
        given, one = as_one_lane(given), as_one_lane(one)
    B = given.carry[0].shape[0]
    traced = entry.traced
    if entry.obstacle(captured, B) is not None or traced is None or entry.y_form is None:
        return None
    if traced.draws or traced.opaque or traced.tells_by_nan or traced.asks or traced.branches is not None:
        return None
    reach, whole = policy.reach(given.T).within(given.T), parse_memory("states")

    def plan_for(B: int) -> Any:
        return entry.plan("auto", one.carry, reach, given.T, B, whole)

    loop = partial(
        looped,
        bare(given.carry_form, given.x_form, given.T),
        policy,
        plan_for(B).step,
        (len(given.carry), len(given.xs)),
    )
    with temporarily_clear_interpreter_stack(), forward_ad._set_fwd_grad_enabled(False):
        smooth = is_smooth(entry, one, captured)
    if (forward_mode() and not smooth) or (
        _nested_gradients() and not (smooth and reaches_all(reach, given.T) and not policy.draws_factors)
    ):
        return None
    check = [_of_first_rows(comparison(one, entry, surroundings, []), B)] if entry.due() else []
    program = MappedSteps(plan_for, B, loop, check, tangent=partial(pushed, entry), smooth=smooth)
    before = generator_states(one.devices) if policy.draws_factors else {}
    factors = getattr(policy, "generator", None)
    factors_before = None if factors is None else factors.get_state()
    xi = drawn_factors(policy, given)
    held = tuple(None if t is None else t.expand(given.T, B)[..., None] for t in (xi, given.resets))
    program = program.holding(held) if policy.draws_factors or given.resets is not None else program
    tensors = *given.carry, *given.xs, *(captured if own is None else own.wrapped(captured))
    try:
        outputs = program.unflat(run(program, *program.rows(tensors)))
    except (OutOfBounds, StepDiffers) as error:  # the step itself says which index it is
        entry.reason = str(error) if isinstance(error, StepDiffers) else entry.reason
        set_generators(before)
        if factors is not None and factors_before is not None:
            factors.set_state(factors_before)  # the same factors are drawn again
        return None
    return results_of(entry, given, outputs)


MOST = 128
"""Steps of which it is known that they run as a plain loop in transforms."""

_WRAPPED: dict[Hashable, None] = {}
"""The code of such steps: what they capture is wrapped where it takes a long look to see that."""


def _nested_gradients() -> bool:
    """Whether there is a gradient within a gradient."""
    return [i.key() for i in functorch.get_interpreter_stack() or ()].count(functorch.TransformType.Grad) > 1


def _of_the_first(given: Arguments) -> Arguments:
    """The first of the calls that are mapped over, by tensors that no transform has wrapped."""
    carry, xs = ([_bare(t) for t in tensors] for tensors in (given.carry, given.xs))
    resets = None if given.resets is None else _bare(given.resets)
    return replace(given, carry=carry, resets=resets, xs=[x.requires_grad_(differentiable(x)) for x in xs])


def _bare(t: Tensor) -> Tensor:
    """A tensor as the first of the mapped calls has it. Transforms are not active."""
    dims: list[int | None] = []
    while functorch.is_functorch_wrapped_tensor(t):
        dims.append(functorch.maybe_get_bdim(t) if functorch.is_batchedtensor(t) else None)
        t = functorch.get_unwrapped(t)
    for dim in reversed(dims):
        if dim is not None:
            t = t.select(dim, 0) if t.shape[dim] else t.new_zeros(t.movedim(dim, 0).shape[1:])
    return t.detach()


def _of_first_rows(check: Check, B: int) -> Check:
    """A comparison of the first mapped call's rows, which come first."""

    def of_first(a: int, states: Sequence[Tensor], ys: Sequence[Tensor]) -> None:
        check(a, [s[:, :B] for s in states], [y[:, :B] for y in ys])

    return of_first
