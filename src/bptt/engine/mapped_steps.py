"""A traced step through time as a program that transforms can map: its lanes lie where those of a net do.

Legend: T steps, B lanes, F values of a leaf for each lane, however they are shaped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from .mapped import lane, unfolded
from .records import Asked, Grads, Saved, Tensors, given
from .rules import AS_ROWS, RULES, AsRows, reaches_all
from .step_plan import StepPlan
from .steps import Check, StepProgram

__all__ = ["MappedSteps"]


class Loop(Protocol):
    """The same results as a program's by operations of torch that any transform knows."""

    def __call__(
        self, B: int, tensors: Sequence[Tensor], xi: Tensor | None, resets: Tensor | None
    ) -> tuple[Tensor, ...]: ...


class Push(Protocol):
    """The tangents of a program's outputs from its inputs and their tangents, compiled; None where that has no way."""

    def __call__(self, program: MappedSteps, inputs: Tensors, tangents: Tensors) -> tuple[Tensor, ...] | None: ...


@dataclass(eq=False)
class MappedSteps:
    """A step through time for transforms. Inputs: the first carry `[B, F]`, xs `[T, B, F]`, captured tensors, `[B, F]`
    those with a row for each lane. Outputs: the final carry `[B, F]`, ys `[T, B, F]`. Taped: the carries `[T+1, B, F]`.

    plan_for: the plan of a number of lanes; it keeps nothing but the carries, in one segment. loop: see `Loop`; it is
    given and gives tensors as the step knows them. check: see `StepProgram`; it is asked for in the first call. looped:
    whether the loop is what runs, which a tracer can see. tangent: see `Push`.
    smooth: whether the step's gradient is the derivative of its operations.
    xi: the factors that a policy draws for the time edges `[T, B, 1]`; resets: bool, likewise.
    """

    name: ClassVar[str] = "scan"
    reads: ClassVar[int] = 0

    plan_for: Callable[[int], StepPlan]
    B: int
    loop: Loop
    check: list[Check]
    looped: bool = False
    tangent: Push | None = None
    smooth: bool = True
    xi: Tensor | None = None
    resets: Tensor | None = None

    def __post_init__(self) -> None:
        self.plan = self.plan_for(self.B)
        step = self.plan.step
        self.own = [step.values[n].shape for n in (*step.carry, *step.x)]
        self.out = [step.values[n].shape for n in (*step.next, *step.y)]
        self.lanes = [
            step.values[n].shape if own else None for n, own in zip(step.captured, self.plan.lanes, strict=True)
        ]

    @property
    def outputs(self) -> int:
        return len(self.out)

    @property
    def held(self) -> Tensors:
        return () if self.xi is None and self.resets is None else (self.xi, self.resets)

    @property
    def weights(self) -> tuple[int, ...]:
        """The inputs that are the same for all lanes."""
        return tuple(len(self.own) + i for i, shape in enumerate(self.lanes) if shape is None)

    def holding(self, tensors: Tensors) -> MappedSteps:
        return replace(self, xi=tensors[0], resets=tensors[1]) if tensors else self

    def of_lanes(self, times: int) -> MappedSteps:
        """The program of so many times the lanes."""
        return replace(self, B=self.B * times)

    def forward(self, tensors: Tensors, keep: bool) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """See `Program.forward`."""
        whole = self.whole(tensors)
        if self.looped:
            return self._by_loop(whole), ()
        program = self._program(self.check.pop() if self.check else None)
        outputs, tape = program.forward(whole, keep)
        return tuple(map(self._flat_output, range(self.outputs), outputs)), tuple(flat(t, 2) for t in tape)

    def backward(self, saved: Saved, asked: Asked) -> Grads:
        """See `Program.backward`."""
        if saved.tape is None or self.looped:
            return self._recorded(saved, asked) if asked.lane_groups is None else self._by_group(saved, asked)
        n, step = len(self.plan.step.carry), self.plan.step
        tape = tuple(shaped(t, step.values[name].shape) for t, name in zip(saved.tape, step.carry, strict=True))
        cotangents = tuple(None if c is None else shaped(c, s) for c, s in zip(asked.cotangents, self.out, strict=True))
        found = self._program(None).backward(
            Saved(self.whole(saved.inputs), (), tape), asked._replace(cotangents=cotangents)
        )
        return Grads(tuple(None if g is None else self._flat_input(i, g, n) for i, g in enumerate(found.inputs)))

    def _recorded(self, saved: Saved, asked: Asked) -> Grads:
        """The gradients by operations that torch can record."""
        self.check_smooth()
        at = [i for i, need in enumerate(asked.needs) if need]

        def outputs(*some: Tensor) -> tuple[Tensor, ...]:
            return self._arriving(asked, self.by_loop(changed(saved.inputs, at, some)))

        _, back = torch.func.vjp(outputs, *[given(saved.inputs[i]) for i in at])  # type: ignore[misc]  # as many as there are
        grads = back(tuple(c for c in asked.cotangents if c is not None))
        return Grads(changed((None,) * len(saved.inputs), at, grads))

    def _by_group(self, saved: Saved, asked: Asked) -> Grads:
        """`_recorded` of each group of lanes alone."""
        assert asked.lane_groups is not None
        groups, held, weights = asked.lane_groups, self.held, self.weights
        alone = replace(self, B=self.B // groups)

        def apart(tensors: Tensors, shared: Sequence[int] = ()) -> list[Sequence[Tensor | None]]:
            return [[t] * groups if t is None or i in shared else unfolded(t, groups).unbind(lane(t))
                    for i, t in enumerate(tensors)]  # fmt: skip

        inputs, cotangents, own = apart(saved.inputs, weights), apart(asked.cotangents), apart(held)
        of_each = []
        for g in range(groups):
            given, arrived = tuple(t[g] for t in inputs), tuple(t[g] for t in cotangents)
            program = alone.holding(tuple(t[g] for t in own))
            found = program._recorded(Saved(given, (), None), Asked(arrived, asked.needs))
            of_each.append(found.inputs)
        return Grads(tuple(
            None if parts[0] is None else torch.stack(parts) if i in weights else torch.cat(parts, lane(parts[0]))
            for i, parts in enumerate(zip(*of_each, strict=True))
        ))  # fmt: skip

    def check_smooth(self) -> None:
        """Raise NotImplementedError where the derivative of the step's operations is another than its gradient."""
        if not self.smooth:
            raise NotImplementedError(
                "a derivative of higher order of this bptt.scan inside torch.func's transforms: its step detaches, or "
                "has an autograd.Function of its own, so that its gradient is not the derivative of its operations. "
                "Pass kernel='replay', which runs the step itself there"
            )

    @staticmethod
    def _arriving(asked: Asked, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(o for o, c in zip(outputs, asked.cotangents, strict=True) if c is not None)

    def by_loop(self, tensors: Tensors) -> tuple[Tensor, ...]:
        """The outputs by operations that torch can record."""
        return self._by_loop(self.whole(tensors))

    def _by_loop(self, whole: Sequence[Tensor]) -> tuple[Tensor, ...]:
        xi, resets = (None if t is None else t.squeeze(-1) for t in (self.xi, self.resets))
        return tuple(map(self._flat_output, range(self.outputs), self.loop(self.B, whole, xi, resets)))

    def _program(self, check: Check | None) -> StepProgram:
        """The program of the step as the step knows its tensors."""
        xi, resets = (None if t is None else t.squeeze(-1) for t in (self.xi, self.resets))
        factors = xi
        if resets is not None:
            step = self.plan.step
            types = [step.values[n].dtype for n in step.carry if step.values[n].dtype.is_floating_point]
            kept = (~resets).to(reduce(torch.promote_types, types))
            factors = kept if xi is None else xi * kept
        return StepProgram(self.plan, factors, resets, check=check)

    # Shapes -----------------------------------------------------------------------------------------------------------

    def whole(self, tensors: Tensors) -> tuple[Tensor, ...]:
        """The inputs as the step knows them."""
        shapes = [*self.own, *self.lanes]
        return tuple(given(t) if s is None else shaped(given(t), s) for t, s in zip(tensors, shapes, strict=True))

    def rows(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """The inputs of a call, that the step knows, as those of the program."""
        return [self._flat_input(i, t, len(self.plan.step.carry)) for i, t in enumerate(tensors)]

    def _flat_input(self, i: int, t: Tensor, carries: int) -> Tensor:
        first = len(self.own)
        if i >= first and self.lanes[i - first] is None:
            return t
        return flat(t, 2 if carries <= i < first else 1)

    def _flat_output(self, i: int, t: Tensor) -> Tensor:
        return flat(t, 1 if i < len(self.plan.step.carry) else 2)

    def flat_outputs(self, tensors: Tensors) -> Tensors:
        """Tensors like the outputs, that the step knows, as the program knows them."""
        return tuple(None if t is None else self._flat_output(i, t) for i, t in enumerate(tensors))

    def shaped_inputs(self, tensors: Tensors) -> Tensors:
        """Tensors like the inputs as the step knows them."""
        shapes = [*self.own, *self.lanes]
        return tuple(t if t is None or s is None else shaped(t, s) for t, s in zip(tensors, shapes, strict=True))

    def unflat(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs as the step knows them."""
        return [shaped(o, s) for o, s in zip(outputs, self.out, strict=True)]


def flat(t: Tensor, leading: int) -> Tensor:
    """`[leading dimensions, ...]` -> `[leading dimensions, F]`."""
    return t.unsqueeze(-1) if t.dim() == leading else t.flatten(leading)


def shaped(t: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `flat`."""
    return t.unflatten(-1, shape) if shape else t.squeeze(-1)


def changed(tensors: Sequence[Any], at: Sequence[int], some: Sequence[Any]) -> tuple[Any, ...]:
    """Tensors with others in some places."""
    new = dict(zip(at, some, strict=True))
    return tuple(new.get(i, t) for i, t in enumerate(tensors))


class _StepRules:
    """See `rules.Rules`."""

    def weights(self, program: MappedSteps) -> Sequence[int]:
        return program.weights

    def tapes(self, program: MappedSteps) -> bool:
        return not program.looped

    def visible(self, program: MappedSteps) -> MappedSteps:
        return replace(program, looped=True)

    def of_lanes(self, program: MappedSteps, times: int) -> MappedSteps:
        return program.of_lanes(times)

    def sums_by_group(self, program: MappedSteps) -> bool:
        return program.plan.sums_by_group

    def is_uncut(self, program: MappedSteps, x: Tensor) -> bool:
        return program.xi is None and reaches_all(program.plan.reach, program.plan.T)

    def by_tangents(self, program: MappedSteps, x: Tensor) -> bool:
        return program.tangent is not None and not program.looped and self.is_uncut(program, x)

    def push(self, program: MappedSteps, inputs: Tensors, tangents: Tensors) -> tuple[Tensor, ...]:
        program.check_smooth()
        compiled = None if program.tangent is None or program.looped else program.tangent(program, inputs, tangents)
        if compiled is not None:
            return compiled
        at = [i for i, t in enumerate(tangents) if t is not None]
        moved = torch.func.jvp(
            lambda *some: program.by_loop(changed(inputs, at, some)),
            tuple(given(inputs[i]) for i in at),
            tuple(given(tangents[i]) for i in at),
        )[1]
        return tuple(moved)


RULES[MappedSteps] = _StepRules()


def _as_rows(program: StepProgram, saved: Saved) -> AsRows:
    """A call of a step's program, for cotangents that are mapped over."""
    plan = program.plan

    def plan_for(B: int) -> StepPlan:
        return StepPlan.of(plan.step, plan.kernel, plan.reach, plan.T, B, "states", plan.lanes)

    xi, resets = (None if t is None else t.expand(plan.T, plan.B)[..., None] for t in program.held or (None, None))
    rows = MappedSteps(plan_for, plan.B, _no_loop, [], xi=xi, resets=resets)
    carries = saved.tape[: len(plan.step.carry)] if saved.tape and len(plan.starts) == 2 else ()
    inputs, tape = tuple(rows.rows(map(given, saved.inputs))), tuple(flat(t, 2) for t in carries)
    return AsRows(rows, Saved(inputs, (), tape), rows.flat_outputs, rows.shaped_inputs)


def _no_loop(B: int, tensors: Sequence[Tensor], xi: Tensor | None, resets: Tensor | None) -> tuple[Tensor, ...]:
    raise NotImplementedError(
        "bptt has no derivative of higher order of the backward call of a scan (bptt.scan, bptt.nn.Recurrent) with "
        "is_grads_batched=True: use torch.autograd.grad(..., create_graph=True) for one cotangent after the other, or "
        "torch.func.vmap over torch.func.vjp"
    )


AS_ROWS[StepProgram] = _as_rows
