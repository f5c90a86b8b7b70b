"""The short way of a call whose kind was met before: what an earlier one has decided is kept with its trace.

It is taken where nothing is special: a compiled step in one segment whose values are all kept, no resets, no mode or
transform of torch, and no comparison with the real step due. It compares what `compiled_step` would, and gives the same
bits, of the same random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, cast
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from ..engine import Again, PlainSteps, StepPlan, default_device, is_observed
from ..kernels import OutOfBounds
from ..memory import Checkpoints
from ..policies import Chunked, Full, Policy, Truncated, parse
from ..steps import origin
from .arguments import Arguments
from .compiled import Compiled
from .drawn import DrawnStates, drawn
from .pytrees import Form
from .surroundings import set_generators

__all__ = ["DirectCall", "direct_call", "remember"]

MOST_KNOWN = 512
"""Kinds of calls that are known."""

MOST_OF_A_TRACE = 32
"""Of one trace."""

NOTED = 256
"""Every so many calls one goes the other way, by which its trace counts as used."""

_FIXED = (Full, Chunked, Truncated)
"""Policies whose reach is the same in every call, and which draw nothing."""

_PLAIN = (Tensor, torch.nn.Parameter)


@dataclass(frozen=True)
class Asked:
    """What a call asks for besides its step, carry and xs, and the settings of torch in which it does.

    needs: which of xs have a gradient.
    """

    gradient: Policy
    memory: str | Checkpoints
    kernel: str
    settings: tuple[Any, ...]
    needs: tuple[bool, ...]


@dataclass(eq=False)
class DirectCall:
    """All of a call that is the same in the next one of its kind. It is kept by the trace, `entry`."""

    entry: Compiled
    asked: Asked
    carry_form: Form
    x_form: Form
    call: PlainSteps


_KNOWN: dict[Hashable, list[ReferenceType[DirectCall]]] = {}
"""Calls by the code of their step and their sizes."""


def direct_call(
    step: Callable[..., Any],
    carry: Any,
    xs: Any,
    length: int | None,
    gradient: Policy | str,
    memory: str | Checkpoints,
    kernel: str,
) -> tuple[Any, Any] | None:
    """What `scan` returns; None where the call is none of those known, or is observed."""
    try:
        known = _KNOWN.get(_key(step, carry, xs, length))
    except TypeError:  # of the sizes of a graph that is being made, which are no numbers
        return None
    if known is None or is_observed() or torch._C._len_torch_function_stack():
        return None
    if torch.nn.modules.module._has_any_global_hook():
        return None
    policy, settings = parse(gradient), _settings()
    for reference in known:
        direct = reference()
        if direct is None:
            continue
        asked = direct.asked
        if asked.kernel == kernel and asked.memory == memory and asked.gradient == policy:
            found = _run(direct, step, carry, xs) if asked.settings == settings else None
            if found is not None:
                return found
    return None


def _run(direct: DirectCall, step: Callable[..., Any], carry: Any, xs: Any) -> tuple[Any, Any] | None:
    entry, first, inputs = direct.entry, direct.carry_form.tensors(carry), direct.x_form.tensors(xs)
    calls, guard = entry.calls + 1, entry.guard
    if first is None or inputs is None or calls & (calls - 1) == 0 or calls % NOTED == 0 or entry.reason is not None:
        return None
    for t in first:
        if type(t) not in _PLAIN:
            return None
    for t, needed in zip(inputs, direct.asked.needs, strict=True):
        if type(t) not in _PLAIN or t.requires_grad is not needed:
            return None
    if guard is None or entry.y_form is None or guard.changed() is not None:
        return None
    captured = guard.captured_by(step)
    if isinstance(captured, str):
        return None
    outputs = _outputs(direct, step, first, inputs, captured)
    if outputs is None:
        return None
    entry.calls = calls
    n = len(first)
    return direct.carry_form.join(outputs[:n]), entry.y_form.join(outputs[n:])


def _outputs(
    direct: DirectCall,
    step: Callable[..., Any],
    carry: Sequence[Tensor],
    xs: Sequence[Tensor],
    captured: Sequence[Tensor],
) -> tuple[Tensor, ...] | None:
    """The tensors of the final carry and of ys; None, and the generators as they were, where the call goes the other
    way.
    """
    traced, call = direct.entry.traced, direct.call
    assert traced is not None
    if not traced.draws:
        outputs = _called(call, (step, [None] * call.plan.T), (*carry, *xs, *captured))
        return outputs if outputs is None or not traced.tells_by_nan or all(map(_finite, outputs)) else None
    if not all(t.is_contiguous() for t in (*carry, *xs)):
        return None
    given = Arguments(step, list(carry), direct.carry_form, list(xs), direct.x_form, call.plan.T, None)
    numbers, states = drawn(traced, given, captured, call.plan.B)
    assert isinstance(states, DrawnStates)
    outputs = _called(call, (step, states), (*carry, *xs, *numbers, *captured))
    if outputs is None or (traced.tells_by_nan and not all(map(_finite, outputs))):
        set_generators(states.before)
        return None
    return outputs


def _called(call: Callable[..., Any], step: Any, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """What a call gives; None where its whole numbers are too large for the kernel."""
    try:
        return cast("tuple[Tensor, ...] | None", call(step, tensors))
    except OutOfBounds:
        return None


def _finite(t: Tensor) -> bool:
    """Whether all values are finite: they are where their sum is; where it is not, each is looked at."""
    return isfinite(t.detach().sum().item()) or bool(t.isfinite().all())


def remember(
    given: Arguments,
    policy: Policy,
    memory: str | Checkpoints,
    kernel: str,
    entry: Compiled,
    plan: StepPlan,
    again: Again,
) -> None:
    """Keep what a call has decided, from the second one of its trace on, if the next one may go the short way.

    again: see `PlainSteps`; it holds no tensor of the call.
    """
    traced = entry.traced
    if entry.calls < 2 or entry.one_lane or given.resets is not None or type(policy) not in _FIXED or traced is None:
        return
    if traced.asks or traced.branches is not None or is_observed():
        return
    carry, xs = given.carry_form.join(given.carry), given.x_form.join(given.xs)
    key = _key(given.step, carry, xs, None if given.xs else given.T)
    asked = Asked(policy, memory, kernel, _settings(), tuple(x.requires_grad for x in given.xs))
    kind = key, asked, given.carry_form, given.x_form
    if kind in entry.direct:
        return
    if len(entry.direct) >= MOST_OF_A_TRACE:
        entry.direct.clear()
    call = PlainSteps.of(plan, again)
    entry.direct[kind] = None
    if call is None:
        return
    entry.direct[kind] = direct = DirectCall(entry, asked, given.carry_form, given.x_form, call)
    if len(_KNOWN) >= MOST_KNOWN:
        _KNOWN.clear()
    _KNOWN[key] = [r for r in _KNOWN.get(key, ()) if r() is not None] + [ref(direct)]


def _settings() -> tuple[Any, ...]:
    """What of torch tells kinds of calls apart that nobody observes."""
    inference = torch.is_inference_mode_enabled()
    return torch.get_autocast_dtype("cpu"), torch.get_default_dtype(), default_device(), inference


def _key(step: Callable[..., Any], carry: Any, xs: Any, length: int | None) -> Hashable:
    """What tells kinds of calls apart, by the id of their code, which lives as long as a call that is kept."""
    return id(origin(step)), _size(carry), _size(xs), length


def _size(tree: Any) -> Hashable:
    """The dimensions of the first tensor, for trees that are known to hold it there."""
    while type(tree) in (tuple, list) and tree:
        tree = tree[0]
    return tree.shape if isinstance(tree, Tensor) and not tree.is_nested else None
