"""A plain call of a traced step: without resets, factors or segments, by the kernel's whole passes.

It gives what `boundary.run` gives of the same program where that keeps all values, bit by bit, with less between the
caller and the kernel. Where a plan keeps the carries alone, such a call keeps nothing: its walk goes forward once more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function

from ..kernels import StepRequest, WholeStepKernel, WholeSteps
from .boundary import Boundary, Pullback, needs_gradient
from .plain import is_observed
from .step_plan import StepPlan
from .steps import StepProgram

__all__ = ["Again", "PlainSteps"]

Again = Callable[[Any, Any], Callable[[], Pullback]]
"""A function of what a caller says of a call and of the inputs of a program, which makes what `StepProgram` takes for
derivatives of higher order."""

MOST_BYTES = 2**16
"""Of all ys of a call: these are copied out of the tape, which in a large call takes longer than it saves."""

MOST_KEPT = 2**20
"""Bytes of what a backward pass needs, up to which it may be there at once where the plan keeps carries alone."""


@dataclass(frozen=True, eq=False, slots=True)
class PlainSteps:
    """All of a plain call of a step but its tensors, for calls of the same sizes.

    plan: of the same computation as a program.
    """

    plan: StepPlan
    passes: WholeSteps
    again: Again

    @classmethod
    def of(cls, plan: StepPlan, again: Again) -> PlainSteps | None:
        """The plain calls of a plan; None where it has none."""
        step, rows = plan.step, plan.T * plan.B
        if len(plan.starts) != 2 or not isinstance(plan.kernel, WholeStepKernel):
            return None
        if rows * step.row_bytes(step.y) > MOST_BYTES or not (
            plan.keeps or rows * step.row_bytes((*step.carry, *step.kept)) <= MOST_KEPT
        ):
            return None
        kept = plan if plan.keeps else replace(plan, keeps=True)
        core = kept.stage(False, True).core, kept.stage(True, True).core
        constants = kept.constants_forward, kept.constants_back
        request = StepRequest(
            step, plan.T, plan.B, plan.blocks.within(0, plan.T), core, constants, plan.early, plan.late
        )
        passes = plan.kernel.whole(request)
        return None if passes is None else cls(plan, passes, again)

    def __call__(self, of: Any, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """The outputs from the program's inputs, differentiable; None where these tensors need `boundary.run`.

        of: what is said of this call, for `again`.
        """
        if has_torch_function(tensors):
            return None
        places = self.passes.places(tensors)
        if places is None:
            return None
        if torch.is_grad_enabled() and needs_gradient(tensors):
            return _apply((self, of, places), *tensors)
        return self.passes.infer(tensors, places)

    def with_tape(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """The inputs and the tape, of a walk forward that keeps all values; None where it cannot tell."""
        places = self.passes.places(tensors)
        made = None if places is None else self.passes.taped(tensors, places)
        return None if made is None else (*tensors, made[0])

    def program(self, of: Any, tensors: tuple[Tensor, ...]) -> StepProgram:
        """The same computation as a program."""
        return StepProgram(self.plan, again=self.again(of, tensors))


class _Plain(Boundary):
    """The autograd function of a plain call. ctx.call: it, and what is said of this one."""

    @staticmethod
    def forward(ctx: Any, prepared: Any, *tensors: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]  # of any function
        call, of, places = prepared
        keeps, passes = call.plan.keeps, call.passes
        made: tuple[Tensor, ...] | None
        if keeps:
            made = passes.taped(tensors, places)
        else:
            outputs = passes.infer(tensors, places)
            made = None if outputs is None else (_NOTHING, *outputs)
        if made is None:
            outputs = call.program(of, tensors).forward(tensors, keep=False)[0]
            made = torch.empty(0, device="cpu"), *[t.clone() for t in outputs]
        ctx.save_for_backward(*tensors, made[0])
        ctx.set_materialize_grads(False)
        ctx.call = call, of
        return made[1:]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # raises where an earlier backward call has freed them
        call, of = ctx.call
        if not (torch.is_grad_enabled() or is_observed()):
            again = saved if call.plan.keeps else call.with_tape(saved[:-1])
            grads = None if again is None else call.passes.pulled(again, cotangents, ctx.needs_input_grad[1:])
            if grads is not None:
                return (None, *grads)
        count = len(saved) - 1
        ctx.program, ctx.ends, ctx.witnesses = call.program(of, saved[:count]), (count, count, count), _CHANGED
        return Boundary.backward(ctx, *cotangents)


_apply: Any = super(torch.autograd.Function, _Plain).apply
"""`_Plain.apply` without what that does for torch.func's transforms, in none of which a plain call is."""

with torch.inference_mode(False):  # whatever the mode in which this is imported
    _NOTHING = torch.empty(0, device="cpu")
    _CHANGED = (torch.empty(0, device="cpu").add_(0),)
"""A witness of a change, so that the tape is made again in the form that the program has."""
