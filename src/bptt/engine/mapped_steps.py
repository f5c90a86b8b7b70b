"""A traced step through time as a program that transforms can map: its lanes lie where those of a net do.

Legend: T steps, B lanes, F values of a leaf for each lane, however they are shaped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from .records import Asked, Grads, Saved, Tensors, given
from .rules import RULES, reaches_all
from .step_plan import StepPlan
from .steps import Check, StepProgram

__all__ = ["MappedSteps"]


class Loop(Protocol):
    """The same results as a program's by operations of torch that any transform knows."""

    def __call__(self, B: int, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]: ...


@dataclass(eq=False)
class MappedSteps:
    """A step through time for transforms. Inputs: the first carry `[B, F]`, xs `[T, B, F]`, captured tensors, `[B, F]`
    those with a row for each lane. Outputs: the final carry `[B, F]`, ys `[T, B, F]`. Taped: the carries `[T+1, B, F]`.

    plan_for: the plan of a number of lanes; it keeps nothing but the carries, in one segment. loop: see `Loop`; it is
    given and gives tensors as the step knows them. check: see `StepProgram`; it is asked for in the first call. looped:
    whether the loop is what runs, which a tracer can see.
    """

    name: ClassVar[str] = "scan"
    held: ClassVar[Tensors] = ()
    reads: ClassVar[int] = 0

    plan_for: Callable[[int], StepPlan]
    B: int
    loop: Loop
    check: list[Check]
    looped: bool = False

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

    def holding(self, tensors: Tensors) -> MappedSteps:
        return self

    def forward(self, tensors: Tensors, keep: bool) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """See `Program.forward`."""
        if self.looped:
            return self.by_loop(tensors), ()
        program = StepProgram(self.plan, check=self.check.pop() if self.check else None)
        outputs, tape = program.forward(self.whole(tensors), keep)
        return self._flat(outputs), tuple(flat(t, 2) for t in tape)

    def backward(self, saved: Saved, asked: Asked) -> Grads:
        """See `Program.backward`."""
        if saved.tape is None or self.looped:
            return self._recorded(saved, asked)
        tape = tuple(map(shaped, saved.tape, self.own))  # of the carries, which come first
        cotangents = tuple(None if c is None else shaped(c, s) for c, s in zip(asked.cotangents, self.out, strict=True))
        found = StepProgram(self.plan).backward(
            Saved(self.whole(saved.inputs), (), tape), Asked(cotangents, asked.needs)
        )
        return Grads(tuple(None if g is None else self._flat_input(i, g) for i, g in enumerate(found.inputs)))

    def _recorded(self, saved: Saved, asked: Asked) -> Grads:
        """The gradients by operations that torch can record."""
        at = [i for i, need in enumerate(asked.needs) if need]

        def outputs(*some: Tensor) -> tuple[Tensor, ...]:
            made = self.by_loop(changed(saved.inputs, at, some))
            return tuple(o for o, c in zip(made, asked.cotangents, strict=True) if c is not None)

        _, back = torch.func.vjp(outputs, *[given(saved.inputs[i]) for i in at])  # type: ignore[misc]  # as many as there are
        grads = back(tuple(c for c in asked.cotangents if c is not None))
        return Grads(changed((None,) * len(saved.inputs), at, grads))

    def by_loop(self, tensors: Tensors) -> tuple[Tensor, ...]:
        """The outputs by operations that torch can record."""
        return self._flat(self.loop(self.B, self.whole(tensors)))

    # Shapes -----------------------------------------------------------------------------------------------------------

    def whole(self, tensors: Tensors) -> tuple[Tensor, ...]:
        """The inputs as the step knows them."""
        shapes = [*self.own, *self.lanes]
        return tuple(given(t) if s is None else shaped(given(t), s) for t, s in zip(tensors, shapes, strict=True))

    def rows(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """The inputs of a call, that the step knows, as those of the program."""
        return [self._flat_input(i, t) for i, t in enumerate(tensors)]

    def _flat_input(self, i: int, t: Tensor) -> Tensor:
        first = len(self.own)
        if i >= first and self.lanes[i - first] is None:
            return t
        return flat(t, 2 if len(self.plan.step.carry) <= i < first else 1)

    def _flat(self, outputs: Iterable[Tensor]) -> tuple[Tensor, ...]:
        n = len(self.plan.step.carry)
        return tuple(flat(t, 1 if i < n else 2) for i, t in enumerate(outputs))

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
        return [len(program.own) + i for i, shape in enumerate(program.lanes) if shape is None]

    def tapes(self, program: MappedSteps) -> bool:
        return not program.looped

    def visible(self, program: MappedSteps) -> MappedSteps:
        return replace(program, looped=True)

    def of_lanes(self, program: MappedSteps, times: int) -> MappedSteps:
        return replace(program, B=program.B * times)

    def sums_by_group(self, program: MappedSteps) -> bool:
        return False

    def is_uncut(self, program: MappedSteps, x: Tensor) -> bool:
        return reaches_all(program.plan.reach, program.plan.T)

    def push(self, program: MappedSteps, inputs: Tensors, tangents: Tensors) -> tuple[Tensor, ...]:
        at = [i for i, t in enumerate(tangents) if t is not None]
        moved = torch.func.jvp(
            lambda *some: program.by_loop(changed(inputs, at, some)),
            tuple(given(inputs[i]) for i in at),
            tuple(given(tangents[i]) for i in at),
        )[1]
        return tuple(moved)


RULES[MappedSteps] = _StepRules()
