"""The interface of a kernel for steps: it computes the core of a traced step, stage 1 forward and stage 3 back.

Legend: T steps, B lanes, N columns of a sweep (see `frames`); a value by row is `[T, B, ...]`, or where a value has
k rows for each lane (`Value.rows`) `[T, B * k, ...]`, or all rows in one dimension; one without rows is `[...]`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ..steps import Part, SplitStep
from .frames import Frames
from .row_parts import RowPart
from .step_memories import StepRequest
from .step_values import Layout, StepValues
from .whole_steps import WholeSteps

__all__ = ["StepKernel", "WholeStepKernel"]


class StepKernel(Protocol):
    """A kernel for traced steps. Outputs are fresh tensors."""

    name: str
    variant: str | None  # the instruction set it was compiled for, if it was
    by_operations: bool  # whether it calls one operation after another: it is given `step.for_operations`

    def __hash__(self) -> int: ...

    def refuses(self, step: SplitStep, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why this kernel cannot compute the core of a step whose carry has this device and dtype, or None."""
        ...

    def inputs(self, step: SplitStep) -> tuple[frozenset[str], frozenset[str]]:
        """The values that `advance` takes at most, and that `sweep` takes."""
        ...

    def advance(
        self,
        step: SplitStep,
        values: Mapping[str, Tensor],
        carry: Sequence[Tensor],
        resets: Tensor | None,
        T: int,
        keep: Sequence[str],
        last: Sequence[Tensor] = (),
    ) -> tuple[list[Tensor], StepValues]:
        """(the carries `[T+1, B, ...]`: the first, then that after each step; the values of `keep` by name, at all T).

        values: those that `step.forward` takes besides the carry. carry: the first, `[B, ...]`. resets: bool `[T, B]`
        (or `[T, 1]`), where the carry is zeroed before the step: the carries returned are those before that. None is
        nowhere. last: dense tensors that get the final carry, if any. Values that are of no use to the caller, but for
        the backward pass, may lie in one memory: see `layout`.
        """
        ...

    def layout(self, step: SplitStep, keep: Sequence[str], T: int, B: int) -> Layout:
        """Where in the memory that `advance` returns the values of `keep` lie that have no tensor of their own."""
        ...

    def sweep(
        self,
        step: SplitStep,
        values: Mapping[str, Tensor],
        frames: Frames,
        arriving: Sequence[Tensor | None],
        edge_factors: Tensor | None,
        leaving: bool,
    ) -> tuple[StepValues, list[Tensor | None]]:
        """The block sweep over all columns of the frames: (the values of `step.sent`, summed over columns, and those of
        `step.summed`, by name; what leaves each column at its first step `[N, ...]` by leaf of the carry, if leaving).

        values: those that `step.adjoint` takes besides the adjoints, at all T steps; those of `step.owned` count at a
        column's own losses only, and are zero elsewhere. arriving: by leaf of the carry with an adjoint, lambda with
        which columns begin at their top `[n, ...]`, of which `frames.arrives` names the row; None is zero.
        edge_factors: `[T, B]` (or `[T, 1]`), on the adjoint from step t to step t-1; where it is 0 nothing passes, not
        even a NaN. None is 1. Zero where no column walks.
        """
        ...


@runtime_checkable
class WholeStepKernel(Protocol):
    """A kernel for traced steps that may do whole passes."""

    def for_rows(self, step: SplitStep, parts: Sequence[Part], wanted: Sequence[str]) -> RowPart | None:
        """Parts of a step, one after the other, for all rows at once as a program; None where they are none."""
        ...

    def whole(self, request: StepRequest) -> WholeSteps | None:
        """The passes for calls of these sizes; None where it has none."""
        ...
