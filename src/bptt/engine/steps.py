"""A traced step through time as a program: stage 1 forward, stages 3 and 4 back, by one kernel for its core.

Legend: T steps, B lanes, N columns of a sweep (see `kernels.frames`); a, b: a segment's first step, and the one after
its last; a value by row is `[T, B * k, ...]`, where it has k rows for each lane.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from ..kernels import Frames, StepKernel
from ..memory import Checkpoints, Memory, keeps_gates
from ..policies import Reach
from ..schedules import Schedule, binomial
from ..steps import SplitStep
from .boundary import Pullback, own_precision
from .crossing import Crossing
from .records import Asked, Grads, Saved, Tensors, given
from .rerun import reversals

__all__ = ["StepPlan", "StepProgram"]

Values = dict[str, Tensor]

Check = Callable[[int, Sequence[Tensor], Sequence[Tensor]], None]


@dataclass(frozen=True, eq=False)
class StepPlan:
    """What a call of a step decides beforehand, the same for all calls of its kind.

    reach: of the policy. starts, schedule: the segments, and which carries are kept. keeps: whether the values of all
    steps are, where there is one segment; else they are computed anew, by the core on all rows at once. lanes: which
    captured tensors have a row for each lane.
    """

    step: SplitStep
    kernel: StepKernel
    reach: Reach
    T: int
    B: int
    starts: tuple[int, ...]
    schedule: Schedule
    keeps: bool
    lanes: tuple[bool, ...]

    @classmethod
    def of(
        cls,
        step: SplitStep,
        kernel: StepKernel,
        reach: Reach,
        T: int,
        B: int,
        memory: Memory,
        lanes: tuple[bool, ...] = (),
    ) -> StepPlan:
        """The plan of a memory policy. Raises ValueError for a budget that is too small."""
        return _planned(step, kernel, reach, T, B, memory, lanes)

    @cached_property
    def frames(self) -> Frames:
        """The columns of the policy's blocks."""
        return Frames.of(self.reach, None, self.T, self.B)


@lru_cache(maxsize=256)
def _planned(
    step: SplitStep, kernel: StepKernel, reach: Reach, T: int, B: int, memory: Memory, lanes: tuple[bool, ...]
) -> StepPlan:
    starts, schedule = (0, T), binomial(1, 0)
    state, kept = (B * step.row_bytes(names) for names in (step.carry, step.kept))
    if isinstance(memory, Checkpoints):
        try:
            cut = memory.cut(T, state, state + kept)
        except ValueError:
            cut = memory.cut(T, state, state)  # the budget is for the carries alone, where there is none for more
        if cut.steps < T:
            chunk = reach.every if reach.stops_at_start and reach.every is not None else T
            steps = cut.steps // chunk * chunk if chunk <= cut.steps else cut.steps
            starts = (*range(0, T, steps), T)
            schedule = binomial(len(starts) - 1, memory.slots(len(starts) - 1, steps, state, state + kept))
    keeps = len(starts) == 2 and (isinstance(memory, Checkpoints) or keeps_gates(memory, T * kept))
    if reach.every is not None and reach.window == reach.every and T % reach.every == 0:
        reach = replace(reach, stops_at_start=True)
    return StepPlan(step, kernel, reach, T, B, starts, schedule, keeps, lanes)


class StepProgram:
    """A step through time as a program. Inputs: the first carry, xs `[T, B, ...]`, captured tensors. Outputs: the final
    carry, ys `[T, B, ...]`.

    edge_factors: `[T, B]` or `[T, 1]`, 0 at resets too. resets: bool, the same shapes. again: gives the same as a graph
    that autograd records, for derivatives of higher order. check: is called in the forward pass with a segment's first
    step, its carries, and its ys.
    """

    name: ClassVar[str] = "scan"

    def __init__(
        self,
        plan: StepPlan,
        edge_factors: Tensor | None = None,
        resets: Tensor | None = None,
        again: Callable[[], Pullback] | None = None,
        check: Check | None = None,
    ) -> None:
        self.plan, self.edge_factors, self.resets, self.again, self.check = plan, edge_factors, resets, again, check
        self.step, self.kernel, self.T, self.B = plan.step, plan.kernel, plan.T, plan.B
        self.starts, self.schedule, self.keeps = plan.starts, plan.schedule, plan.keeps

    @property
    def reads(self) -> int:
        """How many outputs `backward` reads: the graph for derivatives of higher order is checked against all."""
        return self.outputs if self.again is not None else 0

    @property
    def outputs(self) -> int:
        return len(self.step.carry) + len(self.step.y)

    @property
    def held(self) -> Tensors:
        if self.edge_factors is None and self.resets is None:
            return ()
        return self.edge_factors, self.resets

    def holding(self, tensors: Tensors) -> StepProgram:
        if not tensors:
            return self
        return StepProgram(self.plan, tensors[0], tensors[1], self.again, self.check)

    # Stage 1 ----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def forward(self, tensors: Tensors, keep: bool) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """See `Program.forward`. Taped: the carries `[T+1, B, ...]` and the kept values; or those at segment starts."""
        with own_precision(given(tensors[0]).device):
            return self._forward(_Inputs(self, tensors), keep)

    def _forward(self, inputs: _Inputs, keep: bool) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        if len(self.starts) == 2:
            states, kept, ys = self._advance(inputs, inputs.carry, 0, self.T, keep and self.keeps)
            taped = (*states, *kept) if keep else ()
            if self.check is not None:
                self.check(0, states, ys)
            return (*(s[-1].clone() for s in states), *ys), taped
        stored = {i: n for n, i in enumerate(self.schedule.stored_forward)} if keep else {}
        tape = [c.new_empty(len(stored), *c.shape) for c in inputs.carry] if stored else []
        carry, ys = inputs.carry, list[Tensor]()
        for i, (a, b) in enumerate(pairwise(self.starts)):
            for kept_carry, c in zip(tape if i in stored else (), carry, strict=False):
                kept_carry[stored[i]] = c
            states, _, parts = self._advance(inputs, carry, a, b, False)
            carry = [s[-1].clone() for s in states]
            if self.check is not None:
                self.check(a, states, parts)
            ys = ys or [y.new_empty(self.T, *y.shape[1:]) for y in parts]
            for y, part in zip(ys, parts, strict=True):
                y[a:b] = part
        return (*carry, *ys), tuple(tape)

    def _advance(
        self, inputs: _Inputs, carry: Sequence[Tensor], a: int, b: int, keep: bool, wants_y: bool = True
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Of the steps a to b-1: (the carries before step a and after each, the kept values if asked for, the ys)."""
        step = self.step
        values = inputs.values(a, b)
        resets = None if self.resets is None else self.resets[a:b]
        late = bool(step.outputs.outputs) and (wants_y or keep)
        wanted = (
            {n for n in step.kept if keep} | set(step.y if wants_y else ()) | set(step.outputs.inputs if late else ())
        )
        core = [n for n in step.forward.outputs if n in wanted and n not in step.next and n not in values]
        states, found = self.kernel.advance(step, values, carry, resets, b - a, core)
        values |= found
        self._add_states(values, states, a, b)
        if late:
            values |= step.at_once(step.outputs, values, b - a, self.B)
        kept = [values[n] for n in step.kept] if keep else []
        ys = list[Tensor]()
        if wants_y:
            own = {id(t) for t in states}  # a y that is a carry is a part of what is kept
            for n in step.y:
                y = values[n]
                fresh = n in found or n in step.outputs.outputs or n in step.next
                ys.append(y.clone() if not fresh or id(y) in own else y)
                own.add(id(y))
        return states, kept, ys

    def _add_states(self, values: Values, states: Sequence[Tensor], a: int, b: int) -> None:
        """Add the carries before each step, after resets, and after it."""
        step = self.step
        for name, s in zip(step.next, states, strict=True):
            values.setdefault(name, s[1:])
        for name, s in zip(step.carry, states, strict=True):
            values[name] = s[:-1] if self.resets is None else _reset(s[:-1], self.resets[a:b])

    # Stages 3 and 4 ---------------------------------------------------------------------------------------------------

    def backward(self, saved: Saved, asked: Asked) -> Grads:
        """See `Program.backward`."""
        if saved.tape is None:
            if self.again is None:
                raise RuntimeError("this gradient cannot be differentiated again")
            return self.again().backward(saved, asked)
        with own_precision(given(saved.inputs[0]).device):
            return self._backward(_Inputs(self, saved.inputs), saved.tape, asked)

    @torch.no_grad()
    def _backward(self, inputs: _Inputs, tape: tuple[Tensor, ...], asked: Asked) -> Grads:
        n = len(self.step.carry)
        whole = len(self.starts) == 2
        back = _BackwardPass(self, inputs, asked)

        def advance(i: int, carry: list[Tensor]) -> list[Tensor]:
            a, b = self.starts[i : i + 2]
            return [s[-1] for s in self._advance(inputs, carry, a, b, False, wants_y=False)[0]]

        def stored(row: int) -> list[Tensor]:
            return [t[row] for t in tape]

        kept_at: Mapping[int, Callable[[], list[Tensor]]] = (
            {} if whole else {i: partial(stored, r) for r, i in enumerate(self.schedule.stored_forward)}
        )
        for i, carry in reversals(self.schedule.backward, inputs.carry, kept_at, advance):
            a, b = self.starts[i : i + 2]
            states: Sequence[Tensor]
            kept: Sequence[Tensor] | None
            if not whole:
                states, kept, _ = self._advance(inputs, carry, a, b, True, wants_y=False)
            elif self.keeps:
                states, kept = tape[:n], tape[n:]
            else:
                states, kept = tape, None
            back.reverse(a, b, states, kept)
        return back.grads()

    def rebuilt(self, values: Values, T: int) -> Values:
        """The kept values of T steps from their carries: the core on all rows at once."""
        step = self.step
        if not step.kept:
            return {}
        core = [n for n in step.forward.outputs if n in {*step.kept, *step.outputs.inputs} and n not in values]
        found: Values = {}
        if core:
            flat = {n: values[n].flatten(0, 1)[None] if step.values[n].rows else values[n]
                    for n in step.forward.inputs if n not in step.carry}  # fmt: skip
            carry = [values[n].flatten(0, 1) for n in step.carry]
            made = self.kernel.advance(step, flat, carry, None, 1, core)[1]
            found = {n: v[0].unflatten(0, (T, self.B * step.values[n].rows)) for n, v in made.items()}
        if step.outputs.outputs:
            found |= step.at_once(step.outputs, values | found, T, self.B)
        return found


class _Inputs:
    """The inputs of a program's call by name, segment by segment."""

    def __init__(self, program: StepProgram, tensors: Tensors) -> None:
        step = program.step
        n, m = len(step.carry), len(step.x)
        everything = [given(t) for t in tensors]
        self.program, self.carry = program, [t.detach() for t in everything[:n]]
        self.xs, captured = everything[n : n + m], everything[n + m :]
        self.lanes = {name: t for name, t, own in zip(step.captured, captured, program.plan.lanes, strict=True) if own}
        shared = {name: t for name, t in zip(step.captured, captured, strict=True) if name not in self.lanes}
        self.constants = shared | step.constants(1, shared)

    def values(self, a: int, b: int, hoisted: bool = True) -> Values:
        """All values that need no carry, at the steps a to b-1. hoisted: products among them too."""
        step, T = self.program.step, b - a
        values = dict(self.constants)
        for name, x in zip(step.x, self.xs, strict=True):
            values[name] = x[a:b].contiguous()
        for name, t in self.lanes.items():
            values[name] = t.expand(T, *t.shape).contiguous()
        return values | step.at_once(step.hoisted, values, T, self.program.B) if hoisted else values


class _BackwardPass:
    """One backward call: segments from the last to the first, and what they have sent so far."""

    def __init__(self, program: StepProgram, inputs: _Inputs, asked: Asked) -> None:
        self.program, self.inputs, step = program, inputs, program.step
        n, m = len(step.carry), len(step.x)
        self.asked, self.n, self.m = asked, n, m
        self.final, self.dys = asked.cotangents[:n], asked.cotangents[n:]
        self.first: list[Tensor | None] = [None] * n
        self.dxs: list[Tensor | None] = [None] * m
        self.captured: list[Tensor | None] = [None] * len(step.captured)
        whole = len(program.starts) == 2
        self.frames = program.plan.frames
        self.crossing = None if whole else Crossing(_Frames(self.frames))  # type: ignore[arg-type]  # frames are all it reads
        self.walks = any(asked.needs[:n]) or bool(step.sent or step.summed)

    def reverse(self, a: int, b: int, states: Sequence[Tensor], kept: Sequence[Tensor] | None) -> None:
        """Sweep the blocks through the steps a to b-1. kept: the kept values; None: to be computed anew."""
        program, step, T, B = self.program, self.program.step, b - a, self.program.B
        values = self.inputs.values(a, b, hoisted=kept is None)
        program._add_states(values, states, a, b)
        values |= program.rebuilt(values, T) if kept is None else dict(zip(step.kept, kept, strict=True))
        device = states[0].device
        for name, dy in zip(step.dys, self.dys, strict=True):
            if name is not None:
                values[name] = step.zeros(name, T, B, device) if dy is None else dy[a:b].contiguous()
        values |= step.at_once(step.errors, values, T, B)
        if self.walks:
            values |= self._sweep(values, a, b)
        self._finish(values | step.at_once(step.deferred, values, T, B), a, b)

    def _sweep(self, values: Values, a: int, b: int) -> Values:
        program, step = self.program, self.program.step
        factors = None if program.edge_factors is None else program.edge_factors[a:b]
        frames, arriving = self.frames, tuple(self.final)
        if self.crossing is not None:
            columns = self.crossing.within(a, b)
            final = arriving if b == program.T else (None,) * self.n
            frames, arriving = self.crossing.arriving(0, columns.frames[0], final)
        arriving = tuple(None if name is None else t for name, t in zip(step.adjoints, arriving, strict=True))
        leaving = any(self.asked.needs[: self.n]) or self.crossing is not None
        sums, left = program.kernel.sweep(step, values, frames, arriving, factors, leaving)
        if self.crossing is not None and a > 0:
            self.crossing.leave(0, frames, _filled(left, values, step, len(frames.start)))
        elif leaving:
            self.first = [None if t is None else _initial(frames, t) for t in left]
        return sums

    def _finish(self, values: Values, a: int, b: int) -> None:
        """Add what the segment sends to xs and to captured tensors."""
        step, program = self.program.step, self.program
        for i, name in enumerate(step.dx):
            if name is not None and self.asked.needs[self.n + i]:
                if self.dxs[i] is None:
                    self.dxs[i] = values[name].new_empty(program.T, *values[name].shape[1:])
                given(self.dxs[i])[a:b] = values[name]
        for i, name in enumerate(step.dcaptured):
            if name is None or not self.asked.needs[self.n + self.m + i]:
                continue
            found, before = values[name], self.captured[i]
            if program.plan.lanes[i]:
                found = found.sum(0)
            self.captured[i] = found if before is None else before + found

    def grads(self) -> Grads:
        found = [*self.first, *self.dxs, *self.captured]
        return Grads(tuple(g if need else None for g, need in zip(found, self.asked.needs, strict=True)))


@dataclass(frozen=True)
class _Frames:
    """The columns of a whole call, of which segments take theirs."""

    frames: Frames

    def within(self, a: int, b: int) -> _Part:
        return _Part((self.frames.within(a, b),))


@dataclass(frozen=True)
class _Part:
    frames: tuple[Frames, ...]


def _filled(left: Sequence[Tensor | None], values: Values, step: SplitStep, N: int) -> tuple[Tensor, ...]:
    """What leaves a segment, with zeros for leaves without a gradient."""
    return tuple(values[c].new_zeros(N, *values[c].shape[2:]) if t is None else t
                 for c, t in zip(step.carry, left, strict=True))  # fmt: skip


def _initial(frames: Frames, leaving: Tensor) -> Tensor:
    """`[N, ...]` -> `[B, ...]`: what reaches the first carry of each lane."""
    if frames.whole:
        return leaving
    columns = (frames.start == 0).nonzero()[:, 0].to(leaving.device)
    lane = frames.lane.to(leaving.device)[columns]
    return leaving.new_zeros(frames.B, *leaving.shape[1:]).index_add(0, lane, leaving[columns])


def _reset(states: Tensor, resets: Tensor) -> Tensor:
    return states.masked_fill(resets.reshape(*resets.shape, *(1,) * (states.dim() - 2)), 0)
