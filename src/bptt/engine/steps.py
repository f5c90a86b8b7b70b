"""A traced step through time as a program: stage 1 forward, stages 3 and 4 back, by one kernel for its core.

Legend: T steps, B lanes, N columns of a sweep (see `kernels.frames`); a, b: a segment's first step, and the one after
its last; a value by row is `[T, B * k, ...]`, where it has k rows for each lane, or `[T * B * k, ...]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..kernels import Frames, StepValues
from ..steps import Part
from .boundary import Pullback, own_precision
from .crossing import block_sweep
from .records import Asked, Grads, Saved, Tensors, given
from .rerun import reversals
from .step_plan import StepPlan

__all__ = ["Check", "StepProgram"]

Check = Callable[[int, Sequence[Tensor], Sequence[Tensor]], None]

_Kept = tuple[Sequence[Tensor], Sequence[Tensor] | None]
"""Of a segment the carries, and the kept values; None where these are to be computed anew."""


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
        """No output: for derivatives of higher order, which are compared with the outputs, these are computed again."""
        return 0

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

    def forward(self, tensors: Tensors, keep: bool) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """See `Program.forward`. Taped: the carries `[T+1, B, ...]` and the kept values; or those at segment starts."""
        with unrecorded(), own_precision(given(tensors[0]).device):
            return self._forward(_Inputs(self.plan, tensors, self.plan.constants_forward), keep)

    def _forward(self, inputs: _Inputs, keep: bool) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        check, self.check = self.check, None
        if len(self.starts) == 2:
            last = [c.new_empty(c.shape) for c in inputs.carry]
            states, kept, ys = self._advance(inputs, inputs.carry, 0, self.T, keep and self.keeps, last=last)
            if check is not None:
                check(0, states, ys)
            return (*last, *ys), (*states, *kept) if keep else ()
        stored = {i: n for n, i in enumerate(self.schedule.stored_forward)} if keep else {}
        tape = [c.new_empty(len(stored), *c.shape) for c in inputs.carry] if stored else []
        carry, ys = inputs.carry, list[Tensor]()
        for i, (a, b) in enumerate(pairwise(self.starts)):
            for kept_carry, c in zip(tape if i in stored else (), carry, strict=False):
                kept_carry[stored[i]] = c
            states, _, parts = self._advance(inputs, carry, a, b, False)
            carry = [s[-1].clone() for s in states]
            if check is not None:
                check(a, states, parts)
            ys = ys or [y.new_empty(self.T, *y.shape[1:]) for y in parts]
            for y, part in zip(ys, parts, strict=True):
                y[a:b] = part
        return (*carry, *ys), tuple(tape)

    def _advance(
        self,
        inputs: _Inputs,
        carry: Sequence[Tensor],
        a: int,
        b: int,
        keep: bool,
        wants_y: bool = True,
        last: Sequence[Tensor] = (),
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Of the steps a to b-1: (the carries before step a and after each, the kept values if asked for, the ys).

        The kept values: the memory of those that lie in one, if any, and then the others. last: gets the final carry.
        """
        step, (core, late), values = self.step, self.plan.stage(keep, wants_y), inputs.values(a, b)
        resets = None if self.resets is None else self.resets[a:b]
        states, found = self.kernel.advance(step, values, carry, resets, b - a, core, last)
        places = self.plan.places(b - a, keep, wants_y)
        values.flat.update(found.flat)
        values.lay(places, (*states, *found.memories))
        self._reset(values, a, b)
        if late:
            values.compute(step.outputs)
        kept = [*found.memories, *(values.rows(n) for n in step.kept if n not in places)] if keep else []
        return states, kept, self._ys(values, states) if wants_y else []

    def _ys(self, values: StepValues, states: Sequence[Tensor]) -> list[Tensor]:
        """The ys, each of which the caller may write to."""
        step, made = self.step, self.plan.made
        ys: dict[str, Tensor] = {}
        found: list[Tensor] = []
        for n in step.y:
            if n not in ys and n in step.next:
                ys[n] = y = states[step.next.index(n)][1:]  # a part of what is kept
            elif n not in ys and n in made:
                ys[n] = y = values[n]
            else:
                y = values[n].clone()
            found.append(y)
        return found

    def _reset(self, values: StepValues, a: int, b: int) -> None:
        """Set the carries before each step to what resets leave of them."""
        if self.resets is not None:
            for name in self.step.carry:
                states = values[name]
                resets = self.resets[a:b].reshape(b - a, -1, *(1,) * (states.dim() - 2))
                values.flat[name] = states.masked_fill(resets, 0).flatten(0, 1)

    # Stages 3 and 4 ---------------------------------------------------------------------------------------------------

    def backward(self, saved: Saved, asked: Asked) -> Grads:
        """See `Program.backward`."""
        if saved.tape is None:
            if self.again is None:
                raise RuntimeError("this gradient cannot be differentiated again")
            outputs = self.forward(saved.inputs, keep=False)[0]
            return self.again().backward(saved._replace(outputs=outputs), asked)
        with unrecorded(), own_precision(given(saved.inputs[0]).device):
            return self._backward(_Inputs(self.plan, saved.inputs, self.plan.constants_back), saved.tape, asked)

    def _backward(self, inputs: _Inputs, tape: tuple[Tensor, ...], asked: Asked) -> Grads:
        tape = tuple([t.contiguous() for t in tape])  # hooks on what is saved may have laid it out differently
        back = _BackwardPass(self, inputs, asked)
        first = block_sweep(self.plan.blocks, back.segments(tape), asked.cotangents[: back.n], back.sweep)
        return back.grads(first)

    def recomputed(self, inputs: _Inputs, tape: tuple[Tensor, ...]) -> Iterator[tuple[int, int, _Kept]]:
        """The segments from the last to the first: (a, b, what is kept of the steps a to b-1)."""
        n = len(self.step.carry)
        if len(self.starts) == 2:
            yield 0, self.T, (tape[:n], tape[n:] if self.keeps else None)
            return

        def advance(a: int, b: int, carry: list[Tensor]) -> list[Tensor]:
            return [s[-1] for s in self._advance(inputs, carry, a, b, False, wants_y=False)[0]]

        def stored(row: int) -> list[Tensor]:
            return [t[row] for t in tape]

        kept_at: Mapping[int, Callable[[], list[Tensor]]] = {
            i: partial(stored, r) for r, i in enumerate(self.schedule.stored_forward)
        }
        for a, b, carry in reversals(self.starts, self.schedule.backward, inputs.carry, kept_at, advance):
            yield a, b, self._advance(inputs, carry, a, b, True, wants_y=False)[:2]

    def left(
        self, inputs: _Inputs, a: int, b: int, states: Sequence[Tensor], kept: Sequence[Tensor] | None
    ) -> StepValues:
        """The values of the steps a to b-1 that the forward pass left, or where it kept none, made from the carries."""
        step, T = self.step, b - a
        values = inputs.values(a, b, hoisted=kept is None)
        places = self.plan.places(T, True, False)
        if kept is None:
            values.lay(self.plan.places(T, False, False), states)
            self._reset(values, a, b)
            if step.kept:
                self._rebuild(values, T, states)
            return values
        own = [n for n in step.kept if n not in places]
        together = len(kept) - len(own)
        values.flat.update(zip(own, kept[together:], strict=True))
        values.lay(places, (*states, *kept[:together]))
        self._reset(values, a, b)
        return values

    def _rebuild(self, values: StepValues, T: int, states: Sequence[Tensor]) -> None:
        """Add the kept values of T steps from their carries: the core on all rows at once."""
        step, (core, late) = self.step, self.plan.stage(True, False)
        if core:
            for name in step.lanes.intersection(step.forward.inputs):
                values.rows(name)
            as_one = StepValues(step.values, 1, T * self.B, dict(values.flat))
            found = self.kernel.advance(step, as_one, [values.rows(n) for n in step.carry], None, 1, core)[1]
            values.flat.update(found.flat)
            values.lay(self.plan.places(T, True, False), (*states, *found.memories))
        if late:
            values.compute(step.outputs)


def unrecorded() -> AbstractContextManager[Any]:
    """A context without grad mode."""
    return torch.no_grad() if torch.is_grad_enabled() else _UNRECORDED


_UNRECORDED: AbstractContextManager[Any] = nullcontext()


class _Inputs:
    """The inputs of a program's call by name, segment by segment.

    constants: what is computed of captured tensors alone.
    """

    def __init__(self, plan: StepPlan, tensors: Tensors, constants: Part) -> None:
        step = plan.step
        n, m = len(step.carry), len(step.x)
        everything = [given(t) for t in tensors]
        self.plan, self.carry, self.xs = plan, everything[:n], everything[n : n + m]
        self.fixed = dict(zip(step.captured, everything[n + m :], strict=True))
        self.lanes = {}
        if any(plan.lanes):
            self.lanes = {
                name: self.fixed.pop(name) for name, own in zip(step.captured, plan.lanes, strict=True) if own
            }
        if constants.outputs:
            self.fixed |= constants(1, self.fixed)

    def values(self, a: int, b: int, hoisted: bool = True) -> StepValues:
        """All values that need no carry, at the steps a to b-1. hoisted: products among them too."""
        step, T, whole = self.plan.step, b - a, a == 0 and b == self.plan.T
        flat = dict(self.fixed)
        for name, x in zip(step.x, self.xs, strict=True):
            flat[name] = (x if whole else x[a:b]).flatten(0, 1)
        values = StepValues(step.values, T, self.plan.B, flat, lanes=self.lanes)
        if hoisted:
            self.plan.compute(step.hoisted, values)
        return values


class _BackwardPass:
    """One backward call: segments from the last to the first, and what they have sent so far."""

    def __init__(self, program: StepProgram, inputs: _Inputs, asked: Asked) -> None:
        self.program, self.inputs, step = program, inputs, program.step
        n, m = len(step.carry), len(step.x)
        self.asked, self.n, self.m = asked, n, m
        self.dys = asked.cotangents[n:]
        self.kept: _Kept = (), None
        self.dxs: list[Tensor | None] = [None] * m
        self.captured: list[Tensor | None] = [None] * len(step.captured)
        self.whole = len(program.starts) == 2
        self.to_first = any(asked.needs[:n])
        self.walks = self.to_first or bool(step.sent or step.summed)

    def segments(self, tape: tuple[Tensor, ...]) -> Iterator[tuple[int, int]]:
        """The segments from the last to the first, each with what is kept of it."""
        for a, b, self.kept in self.program.recomputed(self.inputs, tape):  # noqa: B020  a field, not `self`
            yield a, b
            self.kept = (), None  # released before the next segment is run again

    def sweep(self, a: int, b: int, frames: Frames, arriving: Tensors) -> Iterator[tuple[Frames, Tensors]]:
        """Sweep columns through the steps a to b-1: see `block_sweep`."""
        program, step = self.program, self.program.step
        states, kept = self.kept
        values = program.left(self.inputs, a, b, states, kept)
        for name, dy in zip(step.dys, self.dys, strict=True):
            if name is not None:
                values.flat[name] = (
                    values.zeros(name, states[0].device)
                    if dy is None
                    else (dy if self.whole else dy[a:b]).flatten(0, 1)
                )
        values.compute(step.errors)
        if self.walks:
            factors = None if program.edge_factors is None else program.edge_factors[a:b]
            begin = tuple([None if name is None else t for name, t in zip(step.adjoints, arriving, strict=True)])
            leaving = self.to_first or a > 0
            sums, left = program.kernel.sweep(step, values, frames, begin, factors, leaving)
            values.flat.update(sums.flat)
            if leaving:
                yield frames, tuple(left)
        if self.asked.lane_groups is None:
            program.plan.compute(step.deferred, values)
        else:
            values.compute(program.plan.by_row)
            self._add_by_group(values, self.asked.lane_groups)
        self._finish(values, a, b)

    def _finish(self, values: StepValues, a: int, b: int) -> None:
        """Add what the segment sends to xs and to captured tensors."""
        step, program, needs = self.program.step, self.program, self.asked.needs
        for i, name in enumerate(step.dx):
            if name is None or not needs[self.n + i]:
                continue
            found, whole = values[name], self.dxs[i]
            if self.whole:
                # What is given out twice is copied: autograd may add to it in place.
                own = name in step.own and name not in (*step.dx[:i], *step.dcaptured)
                self.dxs[i] = found if own else found.clone()
                continue
            if whole is None:
                self.dxs[i] = whole = found.new_empty(program.T, *found.shape[1:])
            whole[a:b] = found
        for i, name in enumerate(step.dcaptured):
            if name is None or not needs[self.n + self.m + i]:
                continue
            if self.asked.lane_groups is not None and not program.plan.lanes[i]:
                continue
            before = self.captured[i]
            if program.plan.lanes[i]:
                found = step.over_time(name, values)
            else:
                found = values.rows(name)
                if before is None and name not in step.own:
                    found = found.clone()
            self.captured[i] = found if before is None else before + found

    def _add_by_group(self, values: StepValues, groups: int) -> None:
        """Add what the segment sends to captured tensors that are the same for all lanes, apart for each group."""
        plan, step = self.program.plan, self.program.step
        part = plan.sums
        used = [bool(n.users) for n in part.graph.nodes if n.op == "placeholder"][1:]
        given = [values.rows(name) if wanted else None for name, wanted in zip(part.inputs, used, strict=True)]
        rows = [step.values[name].rows for name in part.inputs]
        of_each = []
        for g in range(groups):
            some = [t if t is None or not k else t.unflatten(0, (values.T, groups, -1))[:, g].flatten(0, 1)
                   for t, k in zip(given, rows, strict=True)]  # fmt: skip
            of_each.append(part.function(values.T * values.B // groups, *some))
        found = dict(zip(part.outputs, map(torch.stack, zip(*of_each, strict=True)), strict=True))
        for i, (name, own) in enumerate(zip(step.dcaptured, plan.lanes, strict=True)):
            if name is not None and not own and self.asked.needs[self.n + self.m + i]:
                before = self.captured[i]
                self.captured[i] = found[name].clone() if before is None else before + found[name]

    def grads(self, first: Tensors) -> Grads:
        """The gradients of all inputs. first: that of the first carry."""
        found = [*first, *self.dxs, *self.captured]
        return Grads(tuple(g if need else None for g, need in zip(found, self.asked.needs, strict=True)))
