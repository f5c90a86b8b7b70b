"""One call of `scan` by a compiled step: its program, and the comparison with the step itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ..engine import Again, Check, StepProgram, run, seen
from ..kernels import OutOfBounds
from ..memory import Checkpoints
from ..memory import parse as parse_memory
from ..policies import Policy
from .arguments import Arguments
from .compiled import FEWEST_STEPS, Compiled, compiled_step
from .direct import remember
from .drawn import DrawnStates, DrawsLeftOut, drawn
from .forward import ScanResults
from .lanes import as_one_lane, lanes_differ, without_lane
from .pullback import ScanPullback, edge_factors
from .pytrees import Step, beside, differentiable, reset, split, split_y
from .replay import Replay
from .segments import KeptCarries
from .surroundings import GeneratorStates, Surroundings, generator_states, random_kept, set_generators
from .traced_loop import by_traced_loop, loop_suffices

__all__ = [
    "KERNELS",
    "FirstStepDiffers",
    "StepDiffers",
    "by_compiled_step",
    "comparison",
    "reason_not_to_compile",
    "reason_to_replay",
    "results_of",
]

KERNELS = ("auto", "interpreter", "eager", "replay")
"""What runs the steps: see `scan`."""


class StepDiffers(Exception):  # noqa: N818  the caller replays
    """The step itself gives another result than its trace."""


class _OtherWay(Exception):  # noqa: N818  the caller replays, or runs the first step by itself
    """The step's code branches another way than in its trace. t: at which step."""

    def __init__(self, t: int) -> None:
        super().__init__(t)
        self.t = t


class FirstStepDiffers(str):
    """The reason not to run a trace of all steps: the first one branches another way than those after it."""


def reason_to_replay(given: Arguments, kernel: str) -> str | None:
    """Why the steps of a call are not to be compiled, whatever they do; None where nothing speaks against it."""
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func is active"
    return reason_not_to_compile(given, kernel)


def reason_not_to_compile(given: Arguments, kernel: str) -> str | None:
    """`reason_to_replay` but for transforms, which are one."""
    if kernel == "replay":
        return "kernel='replay' was asked for"
    if kernel == "auto" and given.T < FEWEST_STEPS:
        return f"a trace pays from {FEWEST_STEPS} steps on, and this call has {given.T}"
    if seen(given.carry[0] if given.carry else None) or torch._C._len_torch_function_stack():
        return "a mode of torch observes the call"
    if torch.nn.modules.module._has_any_global_hook():
        return "hooks on all modules are registered"
    if given.carry and given.carry[0].dim() and given.carry[0].shape[0] == 0:
        return "there is no lane"
    return None


def by_compiled_step(
    given: Arguments,
    policy: Policy,
    memory: str | Checkpoints,
    kernel: str,
    surroundings: Surroundings,
    independent: bool = False,
) -> ScanResults | str:
    """The results of a call by a compiled step; or the reason why there is none.

    independent: rows are said to be so.
    """
    asked = given
    whole = not independent and not lanes_differ(given, policy)
    entry, captured = compiled_step(given, surroundings, whole, kernel != "auto")
    if entry.one_lane and entry.reason is None:
        given = as_one_lane(given)
    n = len(given.carry)
    B = given.carry[0].shape[0] if n and given.carry[0].dim() else 1
    obstacle = entry.obstacle(captured, B)
    if obstacle is not None:
        return obstacle
    assert entry.traced is not None
    traced = entry.traced
    if traced.asks and (told := _told_otherwise(given, policy, captured)) is not None:
        return told
    if entry.as_it_is(kernel, given.carry, (*given.xs, *captured)) and loop_suffices(given, policy, memory, entry):
        entry.calls += 1
        return by_traced_loop(asked, policy, traced.writes)
    reach = policy.reach(given.T).within(given.T)
    plan = entry.plan(kernel, given.carry, reach, given.T, B, parse_memory(memory))
    if traced.draws and independent:
        return "it draws random numbers"
    if traced.draws and not all(t.is_contiguous() for t in (*given.carry, *(x[0] for x in given.xs))):
        return "it draws random numbers, in an order that may be another where carry or x is not contiguous"
    undone = entry.calls == 0 or traced.branches is not None or traced.tells_by_nan or entry.counts
    before = generator_states(given.devices) if undone else {}
    own = getattr(policy, "generator", None)
    factors_before = None if own is None or not undone else own.get_state()

    def undo() -> None:
        """Put the random generators back, so that the way that is taken instead draws the same."""
        set_generators(before)
        if own is not None and factors_before is not None:
            own.set_state(factors_before)

    numbers, states = drawn(traced, given, captured, B)
    tensors = (*given.carry, *given.xs, *numbers, *captured)
    differentiated = torch.is_grad_enabled() and True in [t.requires_grad for t in tensors]
    factors = edge_factors(policy, given) if differentiated else None
    again = partial(_pullback, given, policy, entry, captured, surroundings, factors, states)
    check = comparison(given, entry, surroundings, states, torch.is_grad_enabled()) if entry.due() else None
    check = check if traced.branches is None else _branches_then(check, given, entry)
    program = StepProgram(plan, factors, given.resets, again if differentiated else None, check)
    try:
        outputs = run(program, *tensors)
    except OutOfBounds:
        undo()
        entry.plans.clear()
        entry.direct.clear()
        entry.itself.clear()
        return by_compiled_step(asked, policy, memory, kernel, surroundings, independent)  # by another kernel
    except _OtherWay as error:
        undo()
        reason = f"its Python code reads a value of its carry, and branches another way at step {error.t}"
        if error.t == 1:
            entry.reason = reason = FirstStepDiffers(reason)
        return reason
    except StepDiffers as error:
        if entry.calls > 1:
            raise RuntimeError(
                f"step no longer does what it did when it was traced: {error}. Something that it depends on has "
                "changed where no guard can see it, so that earlier calls may be wrong too: pass kernel='replay'"
            ) from None
        entry.reason = str(error)
        undo()
        return entry.reason
    if traced.tells_by_nan and not all(bool(t.isfinite().all()) for t in outputs):
        undo()
        if traced.solves:
            return "it solves linear systems, and a matrix may be singular: a result is not finite"
        return "its Python code checks values, and a check may have failed: a result is not finite"
    remember(given, policy, memory, kernel, entry, plan, _again(given, policy, entry, surroundings))
    return results_of(entry, given, outputs)


def results_of(entry: Compiled, given: Arguments, outputs: Sequence[Tensor]) -> ScanResults:
    """The results of a call from the outputs of its program."""
    assert entry.y_form is not None
    n = len(given.carry)
    final, ys = (outputs[:n], outputs[n:]) if not entry.one_lane else without_lane(outputs[:n], outputs[n:])
    return ScanResults(final, given.carry_form, ys, entry.y_form)


def _told_otherwise(given: Arguments, policy: Policy, captured: Sequence[Tensor]) -> str | None:
    """Why code that asks whether a tensor has a gradient would be told otherwise than in a trace, where all of the
    carry have one; None where it would not.
    """
    recording = torch.is_grad_enabled()
    if recording and len(policy.reach(given.T).blocks(given.T)) == 1:
        if all(c.requires_grad for c in given.carry if differentiable(c)):
            return None
        if given.T > 1 and any(t.requires_grad for t in (*given.carry, *given.xs, *captured)):
            return FirstStepDiffers(_ASKS)
    return _ASKS


_ASKS = "its Python code asks by `requires_grad` whether gradients are recorded, which not all of its carry have"


def _branches_then(check: Check | None, given: Arguments, entry: Compiled) -> Check:
    """The comparison of the branches of the step's code at every step, and then another one."""

    def branches(a: int, states: Sequence[Tensor], ys: Sequence[Tensor]) -> None:
        entering = [s[:-1] for s in states]
        if given.resets is not None:
            resets = given.resets[a : a + len(entering[0])]
            entering = [s.masked_fill(beside(resets, s), 0) for s in entering]
        t = entry.other_way(entering)
        if t is not None:
            raise _OtherWay(a + t)
        if check is not None:
            check(a, states, ys)

    return branches


def _pullback(
    given: Arguments,
    policy: Policy,
    entry: Compiled,
    captured: Sequence[Tensor],
    surroundings: Surroundings,
    factors: Tensor | None,
    states: Sequence[GeneratorStates | None],
) -> ScanPullback | DrawsLeftOut:
    """The call as a graph that autograd records, for derivatives of higher order."""
    assert entry.traced is not None
    assert entry.y_form is not None
    replay = Replay(
        given.step, [given.carry_form] * given.T, given.x_form, entry.y_form, tuple(captured), (), states,
        surroundings, overwrites=True, opaque=entry.traced.opaque,
    )  # fmt: skip
    counts, reads = (len(given.carry), len(given.xs)), len(given.carry) + len(entry.traced.y)
    kept = KeptCarries.of("auto", given.T, given.carry)
    reach = policy.reach(given.T)
    pullback = ScanPullback(counts, replay, reach, factors, given.resets, "coupled", kept, reads)
    first, draws = sum(counts), len(entry.traced.draws)
    return DrawsLeftOut(pullback, slice(first, first + draws)) if draws else pullback


def _again(
    given: Arguments,
    policy: Policy,
    entry: Compiled,
    surroundings: Surroundings,
) -> Again:
    """`_pullback` of a later call of the same kind, of its step and the generator states before each of its steps. It
    holds no tensor of this one.
    """
    forms, counts, T = (given.carry_form, given.x_form), (len(given.carry), len(given.xs)), given.T
    draws = len(entry.traced.draws) if entry.traced is not None else 0

    def again(
        call: tuple[Step, Sequence[GeneratorStates | None]], tensors: Sequence[Tensor]
    ) -> Callable[[], ScanPullback | DrawsLeftOut]:
        n, m = counts[0], sum(counts)
        step, states = call
        later = Arguments(step, list(tensors[:n]), forms[0], list(tensors[n:m]), forms[1], T, None)
        return partial(_pullback, later, policy, entry, tensors[m + draws :], surroundings, None, states)

    return again


def comparison(
    given: Arguments,
    entry: Compiled,
    surroundings: Surroundings,
    before: Sequence[GeneratorStates | None],
    recording: bool = False,
) -> Check:
    """What compares the step itself with its program at some steps.

    recording: autograd records, as where the step was traced: its code may differentiate something inside.
    """
    T, by_nan = given.T, entry.traced is not None and entry.traced.tells_by_nan
    times = sorted({0, T // 2, T - 1}) if entry.calls == 1 else [entry.calls * 7919 % T]

    rounding = 0.0 if entry.traced is None else entry.traced.rounding
    drawing = before.at(times) if isinstance(before, DrawnStates) else {}

    def check(a: int, states: Sequence[Tensor], ys: Sequence[Tensor]) -> None:
        for t in times:
            if a <= t < a + len(states[0]) - 1:
                carry = reset([s[t - a].detach() for s in states], given.resets, t)
                expected = [*(s[t - a + 1] for s in states), *(y[t - a] for y in ys)]
                if by_nan and not all(bool(e.isfinite().all()) for e in expected):
                    return  # the step itself is run then
                state = drawing.get(t)
                grad_mode, device = torch.set_grad_enabled(recording), surroundings.on_default_device()
                with grad_mode, surroundings.entered(), device, random_kept([state]):
                    xs = [x[t].detach().requires_grad_(recording and x.requires_grad).clone() for x in given.xs]
                    carry = [c.requires_grad_(recording and differentiable(c)).clone() for c in carry]
                    if state is not None:
                        set_generators(state)
                    result = given.step(given.carry_form.join(carry), given.x_form.join(xs))
                got = [*split(result[0], given.carry_form)[0], *split_y(result[1], entry.y_form)[0]]
                if not all(_alike(g, e, rounding) for g, e in zip(got, expected, strict=True)):
                    raise StepDiffers(f"at step {t} it gives another result than its trace")

    return check


def _alike(got: Tensor, expected: Tensor, rounding: float) -> bool:
    """Whether two results are the same up to rounding, which may flip a comparison in a few places.

    rounding: the relative error of the least precise type on the way to them, as under autocast to float32 results.
    """
    got = got.detach()
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return False
    if not differentiable(got):
        return bool((got != expected).float().mean() <= _FLIPPED) if got.numel() else True
    tolerance = max(torch.finfo(got.dtype).eps, rounding) ** 0.5
    off = ~torch.isclose(got, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    return not got.numel() or bool(off.float().mean() <= _FLIPPED)


_FLIPPED = 0.005
"""The share of values that a comparison on the edge may flip."""
