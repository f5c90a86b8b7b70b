"""`plan_scan`: the memory and time that a scan will need, estimated before it is run.

Legend: T steps, B lanes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .. import policies
from ..clock import Guard, Timing, now
from ..engine import StepPlan
from ..memory import Checkpoints
from ..memory import parse as parse_memory
from ..scan import scan
from ..scan.arguments import Arguments
from ..scan.compiled import compiled_step
from ..scan.compiled_call import KERNELS, reason_to_replay
from ..scan.leaves import leaves_of
from ..scan.pytrees import Step, differentiable
from ..scan.recorded import recordable
from ..scan.segments import KeptCarries
from ..scan.surroundings import Surroundings
from ..scan.traced_loop import loop_suffices
from ..schedules import Schedule
from ._planned import Plan

__all__ = ["bytes_of_step", "plan_scan"]

ENOUGH, SAMPLES = 0.05, 5
"""Seconds after which a run is long enough to be scaled; runs of that length."""

FEW = 4
"""Steps that are recorded to tell what the graph of a step holds: first so many, then twice as many."""

Kept = tuple[int, int, int, float]
"""(bytes, segments, steps of the longest one, forward steps that run again, divided by T)."""


def plan_scan(
    step: Step,
    carry: Any,
    xs: Any = None,
    *,
    gradient: policies.Policy | str = "full",
    resets: Tensor | None = None,
    length: int | None = None,
    memory: str | Checkpoints = "auto",
    kernel: str = "auto",
) -> Plan:
    """Estimate the tape, recomputation and time of forward and backward through a scan of any step.

    step, carry, xs, gradient, resets, length, memory, kernel: as for `bptt.scan`. For sizes alone xs may be one step,
    expanded: nothing of the length of xs is written but what a run of its first steps takes.

    tape_bytes is what the forward call leaves for the backward call, beyond the inputs, captured tensors and ys, and
    what exists of the tape of the current segment at one time. Of a step that is compiled it is counted: its carries,
    and the values that its adjoint needs, as the trace tells them. Of steps that are recorded it is measured on the
    first ones and scaled. A small compiled call whose kind was met before keeps a copy of its ys besides, where these
    take at most 64 KiB. Of steps that are replayed it is the carries that are kept; the graph of the one step that
    runs, of all blocks that reach it, comes on top. Time is that of the first steps, scaled as in `plan`. Torch's
    generators are left alone.

    Raises ValueError for a budget that is too small; else what `bptt.scan` raises.

    >>> import torch, bptt
    >>> cell = torch.nn.GRUCell(8, 16)
    >>> def step(h, x):
    ...     h = cell(x, h)
    ...     return h, h
    >>> xs = torch.zeros(1, 4, 8).expand(1000, 4, 8)
    >>> told = bptt.plan_scan(step, torch.zeros(4, 16), xs, memory="checkpoints:steps=100")
    >>> told.segments, told.steps
    (10, 100)
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(map(repr, KERNELS))}: got {kernel!r}")
    policy, kept = policies.parse(gradient), parse_memory(memory)
    if kept == "gates":
        raise ValueError(
            "memory must be 'auto', 'states' or Checkpoints, since a step of one's own has no gates: got 'gates'"
        )
    if isinstance(policy, policies.Randomized):
        policy = replace(policy, generator=None)
    given = Arguments.of(step, carry, xs, length, resets)
    devices = [d for d in given.devices if d.type == "cuda"]
    settings: dict[str, Any] = {"gradient": policy, "memory": memory, "kernel": kernel}

    def first_steps(n: int) -> tuple[Any, Any]:
        inputs = given.x_form.join(x[:n].detach().requires_grad_(x.requires_grad) for x in given.xs)
        few = None if given.resets is None else given.resets[:n]
        return scan(step, carry, inputs, length=n, resets=few, **settings)

    guard = Guard()
    guard.look()
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices):
        tape, segments, steps, again = _kept(given, policy, kept, kernel, first_steps)
        factors = policy.draw(2, given.lanes)
        if factors is not None or given.resets is not None:
            tape += given.T * given.lanes * given.carry[0].element_size()
        time = _seconds(given.T, first_steps, given.carry[0].device)
    guard.look()
    return Plan(str(memory), tape, segments, steps, again, time.median, time.low, time.high, guard.disturbed)


def _kept(given: Arguments, policy: policies.Policy, memory: Any, kernel: str, first_steps: Any) -> Kept:
    T, reach = given.T, policy.reach(given.T).within(given.T)
    if reason_to_replay(given, kernel) is None:
        entry, captured = compiled_step(given, Surroundings.current(given.devices))
        if entry.parts is not None and entry.traced is not None and entry.reason is None:
            as_it_is = entry.as_it_is(kernel, given.carry, (*given.xs, *captured))
            if as_it_is is None or not loop_suffices(given, policy, memory, entry):
                core, B = entry.choice(kernel, given.carry).kernel, 1 if entry.one_lane else len(given.carry[0])
                return _of_program(StepPlan.of(entry.parts, core, reach, T, B, memory, entry.traced.lanes))
    if recordable(memory, "auto"):
        few, more = min(FEW, T), min(2 * FEW, T)
        small, large = _graph_bytes(first_steps, few, given), _graph_bytes(first_steps, more, given)
        slope = (large - small) / (more - few) if more > few else 0.0
        return round(small + slope * (T - few)), 1, T, 0.0
    state = sum(c.nbytes for c in given.carry)
    kept = KeptCarries.of(memory, T, given.carry)
    if kept.whole:
        return T * state, 1, T, 1.0
    longest = max(b - a for a, b in pairwise(kept.starts))
    again = T + sum(b - a - 1 for a, b in pairwise(kept.starts)) + _advanced(kept.schedule, kept.starts)
    return (kept.schedule.held + longest + 1) * state, len(kept.starts) - 1, longest, again / T


def bytes_of_step(given: Arguments, kernel: str) -> tuple[int, int]:
    """(the bytes of a carry, those that a step adds to the tape of steps that are all kept); each at least 1."""
    state = sum(c.nbytes for c in given.carry)
    if reason_to_replay(given, kernel) is None:
        entry, _ = compiled_step(given, Surroundings.current(given.devices))
        if entry.parts is not None and entry.reason is None:
            B = 1 if entry.one_lane else len(given.carry[0])
            return max(1, state), max(1, state + B * entry.parts.row_bytes(entry.parts.kept))
    devices = [d for d in given.devices if d.type == "cuda"]

    def first_steps(n: int) -> tuple[Any, Any]:
        xs = given.x_form.join(x[:n] for x in given.xs)
        return scan(given.step, given.carry_form.join(given.carry), xs, length=n, kernel="replay")

    few, more = min(FEW, given.T), min(2 * FEW, given.T)
    with torch.enable_grad(), torch.random.fork_rng(devices):
        small, large = (_graph_bytes(first_steps, n, given) for n in (few, more))
    own = (large - small) // (more - few) if more > few else small // few
    return max(1, state), max(1, state, own)


def _of_program(program: StepPlan) -> Kept:
    """What a compiled step keeps: carries before each step and after the last, and the values for its adjoint."""
    step, T, starts = program.step, program.T, program.starts
    state, kept = (program.B * step.row_bytes(names) for names in (step.carry, step.kept))
    if len(starts) == 2:
        put_out = program.B * step.row_bytes(set(step.next) & set(step.y))  # the ys are these carries, not copies
        return (T + 1) * (state - put_out) + T * kept, 1, T, 0.0
    longest = max(b - a for a, b in pairwise(starts))
    again = (T + _advanced(program.schedule, starts)) / T
    return program.schedule.held * state + (longest + 1) * state + longest * kept, len(starts) - 1, longest, again


def _advanced(schedule: Schedule, starts: Sequence[int]) -> int:
    """The steps that the backward pass runs on its way to a segment."""
    return sum(starts[a.last] - starts[a.first] for a in schedule.backward if a.kind == "A")


def _graph_bytes(first_steps: Any, n: int, given: Arguments) -> int:
    """The bytes of what autograd keeps of n steps, beyond leaves, inputs and outputs."""
    saved: dict[int, Tensor] = {}
    inputs = {t.untyped_storage().data_ptr() for t in (*given.carry, *given.xs)}

    def pack(t: Tensor) -> Tensor:
        base = t if t._base is None else t._base
        address = t.untyped_storage().data_ptr()
        if not (base.is_leaf and base.requires_grad) and address not in inputs:
            saved.setdefault(address, t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        final, ys = first_steps(n)
    outputs = {t.untyped_storage().data_ptr() for t in _floats((final, ys))}
    return sum(t.untyped_storage().nbytes() for address, t in saved.items() if address not in outputs)


def _floats(value: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, Tensor) and differentiable(t)]


def _seconds(T: int, first_steps: Any, device: torch.device) -> Timing:
    """The seconds of forward and backward, from runs of the first steps, each about twice as long as the one before."""

    def once(n: int) -> float:
        start = now(device)
        outputs = [t for t in _floats(first_steps(n)) if t.requires_grad]
        if outputs:
            total = torch.stack([t.double().sum() for t in outputs]).sum()
            torch.autograd.grad(total, leaves_of(total), allow_unused=True)
        return now(device) - start

    n = min(T, 16)
    once(n)
    while once(n) < ENOUGH and n < T:
        n = min(2 * n, T)
    return Timing.of([T / n * once(n) for _ in range(SAMPLES)])
