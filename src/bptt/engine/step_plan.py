"""The plan of a traced step's calls: what is decided beforehand, the same for all calls of a kind.

Legend: T steps, B lanes; k rows of a value for each lane.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from math import prod
from typing import NamedTuple

from ..kernels import Blocks, Place, RowPart, StepKernel, StepValues, WholeStepKernel
from ..memory import Checkpoints, Memory, keeps_gates
from ..policies import Reach
from ..schedules import Schedule, binomial
from ..steps import Part, SplitStep

__all__ = ["StepPlan"]

MOST_ROWS, MOST_WORK = 4096, 4e6
"""Up to so many rows, and multiplications of all of them, parts for all rows at once are programs."""


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
        step = step.for_operations if kernel.by_operations else step
        starts: tuple[int, ...] = (0, T)
        schedule = binomial(1, 0)
        state, kept = (B * step.row_bytes(names) for names in (step.carry, step.kept))
        if isinstance(memory, Checkpoints):
            try:
                cut = memory.cut(T, state, state + kept)
            except ValueError:
                cut = memory.cut(T, state, state)  # the budget is for the carries alone, where there is none for more
            if cut.steps < T:
                starts = reach.segment_starts(T, cut.steps)
                longest = max(b - a for a, b in pairwise(starts))
                schedule = binomial(len(starts) - 1, memory.slots(len(starts) - 1, longest, state, state + kept))
        keeps = len(starts) == 2 and (isinstance(memory, Checkpoints) or keeps_gates(memory, T * kept))
        return cls(step, kernel, reach.where_whole(T), T, B, starts, schedule, keeps, lanes)

    _stages: dict[tuple[bool, bool], Stage] = field(default_factory=dict, init=False)
    _places: dict[tuple[int, bool, bool], dict[str, Place]] = field(default_factory=dict, init=False)

    @cached_property
    def blocks(self) -> Blocks:
        """The columns of the policy's blocks."""
        return Blocks(self.reach, None, self.T, self.B)

    @cached_property
    def known(self) -> frozenset[str]:
        """Values that need no carry."""
        step = self.step
        return frozenset({*step.captured, *step.x, *step.constants.outputs, *step.hoisted.outputs})

    @cached_property
    def made(self) -> frozenset[str]:
        """Values that stage 1 makes, in memory that the caller has no part of."""
        return frozenset({*self.step.forward.outputs, *self.step.outputs.outputs}) - self.known

    @cached_property
    def constants_forward(self) -> Part:
        """What of captured tensors alone is computed on the way forward: what the kernel takes, and others do."""
        step = self.step
        return step.constants.only(
            {*step.hoisted.inputs, *self.kernel.inputs(step)[0], *step.outputs.inputs, *step.y, *step.kept}
        )

    @cached_property
    def constants_back(self) -> Part:
        """What of them is on the way back."""
        step = self.step
        again = () if self.keeps else self.constants_forward.outputs
        return step.constants.only({*step.errors.inputs, *self.kernel.inputs(step)[1], *step.deferred.inputs, *again})

    @cached_property
    def early(self) -> RowPart | None:
        """What is hoisted, as a program, where calls are so small that this is worth it."""
        return self._for_rows(self.step.hoisted)

    @cached_property
    def late(self) -> RowPart | None:
        """What is deferred, likewise."""
        return self._for_rows(self.step.deferred)

    def _for_rows(self, part: Part) -> RowPart | None:
        step, rows = self.step, self.T * self.B
        if rows > MOST_ROWS or not part.outputs or not isinstance(self.kernel, WholeStepKernel):
            return None
        made = self.kernel.for_rows(step, (step.constants, part), part.outputs)
        return made if made is not None and rows * made.row_work <= MOST_WORK else None

    def compute(self, part: Part, values: StepValues) -> None:
        """Add what is hoisted or deferred to the values of some steps."""
        step = self.step
        program = self.early if part is step.hoisted else self.late if part is step.deferred else None
        if program is None:
            values.compute(part)
        else:
            values.flat.update(program(values.T * values.B, values.rows))

    @cached_property
    def sums(self) -> Part:
        """What is deferred, as far as gradients of captured tensors that are the same for all lanes need it."""
        return self.step.deferred.only(self._shared)

    @cached_property
    def by_row(self) -> Part:
        """The rest of what is deferred."""
        step = self.step
        return step.deferred.only({n for n in step.deferred.outputs if n not in self._shared or n in step.dx})

    @property
    def _shared(self) -> set[str]:
        """The names of these gradients."""
        return {n for n, own in zip(self.step.dcaptured, self.lanes, strict=True) if n is not None and not own}

    @cached_property
    def sums_by_group(self) -> bool:
        """Whether these gradients can be told apart by groups of lanes: none is summed over rows in the walk."""
        step, part = self.step, self.step.deferred
        alone = not set(step.summed).intersection((*part.inputs, *self._shared))
        return alone and self._shared <= set(part.outputs) and all(step.values[n].rows >= 0 for n in part.inputs)

    def stage(self, keep: bool, wants_y: bool) -> Stage:
        """What stage 1 computes."""
        found = self._stages.get((keep, wants_y))
        if found is None:
            step = self.step
            late = bool(step.outputs.outputs) and (wants_y or keep)
            wanted = {
                *(step.kept if keep else ()),
                *(step.y if wants_y else ()),
                *(step.outputs.inputs if late else ()),
            }
            core = [n for n in step.forward.outputs if n in wanted and n not in step.next and n not in self.known]
            found = self._stages[keep, wants_y] = Stage(tuple(core), late)
        return found

    def places(self, T: int, keep: bool, wants_y: bool) -> dict[str, Place]:
        """Where values of T steps lie in memories: the carries by leaf, then what the kernel has kept in one."""
        found = self._places.get((T, keep, wants_y))
        if found is None:
            step = self.step
            nexts = {name: self._of_carry(i, T, 1) for i, name in reversed([*enumerate(step.next)])}
            found = {name: place for name, place in nexts.items() if name not in self.known}
            found |= {name: self._of_carry(i, T, 0) for i, name in enumerate(step.carry)}
            own = self.kernel.layout(step, self.stage(keep, wants_y).core, T, self.B)
            found |= {name: place._replace(memory=len(step.carry)) for name, place in own.places.items()}
            self._places[T, keep, wants_y] = found
        return found

    def _of_carry(self, leaf: int, T: int, first: int) -> Place:
        """Where the carries of T steps lie, from the number `first` on."""
        kind = self.step.values[self.step.carry[leaf]]
        return Place.of(kind, T, self.B, leaf, first * self.B * kind.rows * prod(kind.shape))


class Stage(NamedTuple):
    """What stage 1 computes: the values that the core brings back, and whether there are some to compute after it."""

    core: tuple[str, ...]
    late: bool
