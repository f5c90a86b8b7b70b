"""A first carry of another kind than those after it, where the step takes both for the same.

`[1, H]` in the place of `[B, H]`, or float32 in the place of the bfloat16 that autocast makes: a plain loop goes on
with what the step returns. A scan, whose carries are all of one kind, may begin with the carry expanded and cast, where
the step then gives the same. A state that the step itself makes (of None, or of an empty tensor) has no such carry:
there the first step runs by itself, where the policy cuts no gradient between it and the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..policies import Policy
from .arguments import Arguments
from .pytrees import Form, reset, split, split_y
from .surroundings import Surroundings, generator_states, random_kept, set_generators

__all__ = ["FirstCarryChanges", "fitted", "makes_its_own", "may_fit", "with_first_step_alone"]

Scanned = tuple[Any, Any]


class FirstCarryChanges(Exception):  # noqa: N818  # an event that is handled
    """A step cannot be run as it is, perhaps because the carry changes its kind after the first step.

    reason: the error where no other first carry helps.
    """

    def __init__(self, reason: Exception) -> None:
        super().__init__(str(reason))
        self.reason = reason


def may_fit(given: Arguments, surroundings: Surroundings) -> bool:
    """Whether a carry of another kind than the first one is to be expected, by the arguments alone."""
    lanes = max([x.shape[1] for x in given.xs if x.dim() > 1], default=1)
    cast = any(enabled for enabled, _ in surroundings.autocast.values())
    return cast or makes_its_own(given) or (lanes > 1 and True in [c.shape[:1] != (lanes,) for c in given.carry])


def makes_its_own(given: Arguments) -> bool:
    """Whether the step may make its own first state: of None, or of an empty tensor."""
    return any(leaf is None for leaf in given.carry_form.leaves) or 0 in [c.numel() for c in given.carry]


def fitted(given: Arguments, surroundings: Surroundings) -> Arguments | None:
    """The arguments with a first carry of the kind that the step returns; None where it is not known to be the same."""
    first = _first_step(given, given.carry, surroundings)
    if first is None or len(first[0]) != len(given.carry) or any(leaf is None for leaf in given.carry_form.leaves):
        return None
    carry = [_like(c, n) for c, n in zip(given.carry, first[0], strict=True)]
    if any(c is None for c in carry) or all(c is g for c, g in zip(carry, given.carry, strict=True)):
        return None
    made = [c for c in carry if c is not None]
    exactly = any(c.dtype != g.dtype for c, g in zip(made, given.carry, strict=True))
    second = _first_step(given, made, surroundings)
    if second is None or not _same([*first[0], *first[1]], [*second[0], *second[1]], exactly):
        return None
    return replace(given, carry=made)


def _first_step(
    given: Arguments, carry: Sequence[Tensor], surroundings: Surroundings
) -> tuple[list[Tensor], list[Tensor]] | None:
    """(carry, y) after the first step; None where it does not take the carry, or returns one of another structure."""
    state = generator_states(given.devices)
    with torch.no_grad(), surroundings.entered(), random_kept([state]):
        set_generators(state)
        try:
            result = given.step(given.carry_form.join(reset([c.clone() for c in carry], given.resets, 0)), _x(given))
        except (RuntimeError, ValueError, TypeError, IndexError):
            return None
    if not isinstance(result, tuple) or len(result) != 2:
        return None
    new, form = split(result[0], given.carry_form)
    return (new, split_y(result[1])[0]) if form.spec == given.carry_form.spec else None


def _x(given: Arguments) -> Any:
    return given.x_form.join(x[0].clone() for x in given.xs)


def _like(c: Tensor, new: Tensor) -> Tensor | None:
    """The carry in the kind of another one; None where it would have other values."""
    made = c
    if c.dtype != new.dtype:
        made = c.to(new.dtype)
        if not new.is_floating_point() or not torch.equal(made.detach().to(c.dtype), c.detach()):
            return None
    if c.shape != new.shape:
        if not c.numel() or c.dim() > new.dim():
            return None
        aligned = zip(c.shape[::-1], new.shape[::-1], strict=False)
        if any(a not in (1, b) for a, b in aligned):
            return None
        made = made.expand(new.shape)
    return made if c.device == new.device else None


def _same(first: Sequence[Tensor], second: Sequence[Tensor], exactly: bool) -> bool:
    """Whether two results are the same. exactly: to the last bit; else up to the rounding of products."""
    if len(first) != len(second):
        return False
    for a, b in zip(first, second, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        if exactly or not a.is_floating_point():
            if not torch.equal(a, b):
                return False
        elif not torch.allclose(
            a, b, rtol=64 * torch.finfo(a.dtype).eps, atol=64 * torch.finfo(a.dtype).eps, equal_nan=True
        ):
            return False
    return True


def with_first_step_alone(
    given: Arguments, policy: Policy, scan_rest: Callable[[Arguments], Scanned]
) -> Scanned | None:
    """The results where the first step runs by itself, as in a plain loop, and makes the state that is scanned.

    None where the policy has a gradient of its own for the edge after it, or where the step makes no state.
    """
    blocks = policy.reach(given.T).blocks(given.T)
    if len(blocks) > 1 or policy.draws_factors:
        return None
    state = given.carry_form.join(reset([c.clone() for c in given.carry], given.resets, 0))
    result = given.step(state, _x(given))
    if not isinstance(result, tuple) or len(result) != 2:
        return None
    carry, form = split(result[0])
    if form.values or any(leaf is None for leaf in form.leaves) or any(c.numel() == 0 for c in carry):
        return None
    y, y_form = split_y(result[1])
    if given.T == 1:
        return form.join(carry), y_form.join(leaf[None] for leaf in y)
    resets = None if given.resets is None else given.resets[1:]
    rest = replace(given, carry=carry, carry_form=form, xs=[x[1:] for x in given.xs], T=given.T - 1, resets=resets)
    final, ys = scan_rest(rest)
    return final, _joined(y, y_form, ys)


def _joined(y: Sequence[Tensor], form: Form, ys: Any) -> Any:
    """The ys `[T, ...]` of the first step and the others."""
    others, other_form = split(ys, form)
    if other_form.spec != form.spec:
        raise ValueError(
            f"y must have the same structure at step 1 as at the first: expected {form.spec}, got {other_form.spec}"
        )
    return form.join(torch.cat([a[None], b]) for a, b in zip(y, others, strict=True))
