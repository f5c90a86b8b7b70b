"""One call of `scan` by a compiled step inside the transforms of torch.func: what vmap maps over becomes lanes."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from ..engine import Check, MappedSteps, forward_mode, run
from ..kernels import OutOfBounds
from ..memory import parse as parse_memory
from ..policies import Policy
from ..steps import SplitStep, holds_wrapped, origin
from .arguments import Arguments
from .compiled import compiled_step
from .compiled_call import StepDiffers, comparison, reason_not_to_compile, results_of
from .forward import ScanResults
from .lanes import as_one_lane
from .plain_loop import by_plain_loop
from .pytrees import differentiable, split
from .surroundings import Surroundings

__all__ = ["by_mapped_step"]


def by_mapped_step(given: Arguments, policy: Policy, kernel: str) -> ScanResults | None:
    """The results of a call inside transforms by a compiled step; None where a plain loop has to run instead.

    That is where the call does what an ordinary one would not be compiled for, draws random numbers or has resets, in
    forward mode and in the gradient of a gradient, and where the step captures what a transform has wrapped.
    """
    if reason_not_to_compile(given, kernel) is not None or not _only_maps_and_one_gradient():
        return None
    if given.resets is not None or policy.draws_factors or torch._C._is_any_autocast_enabled():
        return None
    code = origin(given.step)
    if holds_wrapped(given.step) or not isinstance(code, Hashable) or code in _WRAPPED:
        return None
    with temporarily_clear_interpreter_stack():
        one = _of_the_first(given)
        surroundings = Surroundings.current(one.devices)
        entry, captured = compiled_step(one, surroundings)
        if entry.guard is None or any(map(functorch.is_functorch_wrapped_tensor, captured)):
            while len(_WRAPPED) >= MOST:
                _WRAPPED.pop(next(iter(_WRAPPED)))
            _WRAPPED[code] = None
            return None
    if entry.one_lane and entry.reason is None:
        given, one = as_one_lane(given), as_one_lane(one)
    B = given.carry[0].shape[0]
    traced = entry.traced
    if entry.obstacle(captured, B) is not None or traced is None or entry.y_form is None:
        return None
    if traced.draws or traced.opaque or traced.tells_by_nan or traced.branches is not None:
        return None
    reach, whole = policy.reach(given.T).within(given.T), parse_memory("states")

    def plan_for(B: int) -> Any:
        return entry.plan("auto", one.carry, reach, given.T, B, whole)

    parts, bare = plan_for(B).step, replace(given, step=_no_step, carry=[], xs=[])  # which holds no tensor
    loop = partial(_looped, bare, policy, parts, (len(given.carry), len(given.xs)))
    check = [_of_first_rows(comparison(one, entry, surroundings, []), B)] if entry.due() else []
    program = MappedSteps(plan_for, B, loop, check)
    try:
        outputs = program.unflat(run(program, *program.rows((*given.carry, *given.xs, *captured))))
    except OutOfBounds:
        return None  # the step itself says which index it is
    except StepDiffers as error:
        entry.reason = str(error)
        return None
    return results_of(entry, given, outputs)


MOST = 128
"""Steps of which it is known that they run as a plain loop in transforms."""

_WRAPPED: dict[Hashable, None] = {}
"""The code of such steps: what they capture is wrapped where it takes a long look to see that."""


def _only_maps_and_one_gradient() -> bool:
    """Whether the transforms are vmap, any number of times, and grad or vjp, at most once."""
    kinds = [i.key() for i in functorch.get_interpreter_stack() or ()]
    maps = kinds.count(functorch.TransformType.Vmap)
    gradients = kinds.count(functorch.TransformType.Grad)
    return not forward_mode() and gradients <= 1 and maps + gradients == len(kinds)


def _of_the_first(given: Arguments) -> Arguments:
    """The first of the calls that are mapped over, by tensors that no transform has wrapped."""
    carry, xs = ([_bare(t) for t in tensors] for tensors in (given.carry, given.xs))
    return replace(given, carry=carry, xs=[x.requires_grad_(differentiable(x)) for x in xs])


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


def _no_step(carry: Any, x: Any) -> tuple[Any, Any]:
    raise AssertionError("the traced step runs in its place")


def _looped(
    given: Arguments, policy: Policy, parts: SplitStep, counts: tuple[int, int], B: int, tensors: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The outputs by operations of torch, of the traced step, one step after the other."""
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

    final, ys = by_plain_loop(replace(given, step=step, carry=list(tensors[:n]), xs=list(tensors[n:m])), policy)
    return (*split(final, given.carry_form)[0], *ys)
