"""The interpreter: a kernel for traced steps whose cores are programs, run by compiled code (csrc/interpreter.hpp).

Legend: T steps, B lanes, N columns of a sweep (see `frames`); k rows of a value for each lane (`Value.rows`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..steps import Part, SplitStep
from .frames import Frames
from .heap import keep_heap
from .joined import with_constants
from .lowering import ELEMENT_WISE, Lowering
from .prepared import PROGRAM, Prepared, Run
from .program import Program, Refused
from .row_parts import RowPart
from .step_memories import NotWhole, StepRequest
from .step_values import Layout, StepValues
from .variants import chosen_variant
from .whole_numbers import COUNTS, Bounds, OutOfBounds, check
from .whole_steps import WholeSteps

__all__ = ["Interpreter"]

FORWARD_BUFFERS = frozenset({"carry"})
SWEEP_BUFFERS = frozenset({"input", "owned", "output", "adjoint", "back", "lane"})
"""The kinds of slots that have a buffer beside where they lie: what is reset, gathered or scattered."""


class Interpreter:
    """The kernel that runs cores as programs: on the CPU, in float32 and float64.

    variant: an instruction set by name; None is the widest that this machine runs.
    """

    name = "interpreter"
    by_operations = False

    def __init__(self, variant: str | None = None) -> None:
        self.variant: str | None
        self.variant, self._variant = chosen_variant(variant)
        self._programs: WeakKeyDictionary[SplitStep, dict[tuple[str, ...] | None, Program | Refused]]
        self._programs = WeakKeyDictionary()
        self._beyond: WeakKeyDictionary[SplitStep, str] = WeakKeyDictionary()
        self._prepared: WeakKeyDictionary[SplitStep, dict[tuple[str, ...] | None, Prepared]] = WeakKeyDictionary()

    def refuses(self, step: SplitStep, device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cpu":
            return f"it runs on the CPU, not on {device}"
        if dtype not in PROGRAM:
            return f"it computes float32 and float64, not {dtype}"
        if step in self._beyond:
            return self._beyond[step]
        for name in step.carry:
            if step.values[name].dtype not in (dtype, torch.bool, *COUNTS):
                return f"the carry {name} is {step.values[name].dtype}, not {dtype}"
        try:
            self.forward_program(step, [name for name in step.forward.outputs if name not in step.next])
            self.adjoint_program(step)
        except Refused as refused:
            return str(refused)
        return None

    def forward_program(self, step: SplitStep, keep: Sequence[str]) -> Program:
        """The program of the core of stage 1 that brings back these values.

        Raises Refused where an operation has no instruction.
        """
        return self._program(step, tuple(keep))

    def adjoint_program(self, step: SplitStep) -> Program:
        """The program of the core of stage 3. Raises Refused where an operation has no instruction."""
        return self._program(step, None)

    def _program(self, step: SplitStep, keep: tuple[str, ...] | None) -> Program:
        known = self._programs.setdefault(step, {})
        found = known.get(keep)
        if found is None:
            try:
                found = _adjoint(step) if keep is None else _forward(step, keep)
            except Refused as refused:
                found = Refused(*refused.args)
            known[keep] = found
        if isinstance(found, Refused):
            raise found
        return found

    def inputs(self, step: SplitStep) -> tuple[frozenset[str], frozenset[str]]:
        program = self._program(step, tuple(name for name in step.forward.outputs if name not in step.next))
        return frozenset(program.inputs), frozenset(self.adjoint_program(step).inputs)

    def layout(self, step: SplitStep, keep: Sequence[str], T: int, B: int) -> Layout:
        return self._ready(step, tuple(dict.fromkeys(keep))).sized(T, B).layout

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
        kinds = step.values
        B = carry[0].shape[0] // kinds[step.carry[0]].rows
        ready = self._ready(step, tuple(dict.fromkeys(keep)))
        self._look_at(step, ready.program.assumed, {**values, **dict(zip(step.carry, carry, strict=True))})
        run, new = Run(ready, T, B), ready.like.new_empty
        carries: list[Tensor] = []
        for (name, at, after, size, whole), first in zip(run.sized.carries, carry, strict=True):
            states = new(whole)
            carries.append(states)
            address = run.addresses[after] = states.data_ptr()
            if at >= 0:
                run.addresses[at] = address
            run.moves += (address, run.checked(name, first, size, size), first.numel() * ready.itemsize)
        run.before = len(carries)
        for states, end in zip(carries, last, strict=False):
            if end.dtype == ready.dtype:
                run.moves += (end.data_ptr(), states.data_ptr() + T * end.nbytes, end.nbytes)
        run.give(values)
        layout = run.sized.layout
        keep_heap(layout.size * ready.itemsize + sum([states.nbytes for states in carries]))
        memories: tuple[Tensor, ...] = ()
        if run.sized.together:
            memories = (new((layout.size,)),)
            first_address = memories[0].data_ptr()
            for at, distance in run.sized.together:
                run.addresses[at] = first_address + distance
        own: dict[str, Tensor] = {}
        for name, at, size in run.sized.own:
            own[name] = made = new(size)
            run.addresses[at] = made.data_ptr()
        if resets is not None:
            resets = resets.to(torch.bool).expand(T, B).contiguous()
            run.walk.resets = resets.data_ptr()
        if T and B:
            run(self._variant)
        else:
            for states, first, end in zip_longest(carries, carry, last):
                states[0].copy_(first)
                if end is not None:
                    end.copy_(first)
        for name in ready.exact:
            own[name] = own[name].to(kinds[name].dtype)
        for i, name in enumerate(step.carry):
            if kinds[name].dtype != ready.dtype:
                if kinds[name].dtype != torch.bool:
                    self._look_at(step, {name: ready.program.assumed.get(name, ready.program.room)}, {name: carries[i]})
                carries[i] = carries[i].to(kinds[name].dtype)
                if last:
                    last[i].copy_(carries[i][-1])
        return carries, StepValues(kinds, T, B, own, layout.places, memories)

    def _look_at(self, step: SplitStep, assumed: Mapping[str, Bounds], values: Mapping[str, Tensor]) -> None:
        """Raise OutOfBounds, now, and say so in `refuses`, where whole numbers are not what a program is made for."""
        for name, bounds in assumed.items():
            try:
                check(name, values[name], bounds)
            except OutOfBounds as beyond:
                self._beyond[step] = str(beyond)
                raise

    def sweep(
        self,
        step: SplitStep,
        values: Mapping[str, Tensor],
        frames: Frames,
        arriving: Sequence[Tensor | None],
        edge_factors: Tensor | None,
        leaving: bool,
    ) -> tuple[StepValues, list[Tensor | None]]:
        ready, walks, kinds = self._ready(step, None), frames.walks, step.values
        T, B, N = frames.T, frames.B, frames.start.shape[0]
        run, addresses = Run(ready, T, B), ready.numbers
        leaves = ready.leaves
        given = arriving if len(arriving) == len(step.adjoints) else _spread(arriving, leaves, len(step.adjoints))
        for i in leaves:
            lam, name = given[i], step.adjoints[i]
            assert name is not None
            if lam is not None and name in ready.program.inputs:
                kind, rows = kinds[name], lam.shape[0]
                if rows < walks.rows * kind.rows:
                    raise RuntimeError(f"what arrives at {name} must have the {walks.rows} rows that are asked for: "
                                       f"got {list(lam.shape)}")  # fmt: skip
                size = (rows, *kind.shape)
                at = addresses[ready.program.inputs[name]]
                run.addresses[ready.count + at] = run.checked(name, lam, size, size)
        run.give(values)
        like = ready.like
        new = like.new_empty if walks.covers else like.new_zeros
        found: dict[str, Tensor] = {}
        for name, at, size in run.sized.own:
            found[name] = made = new(size)
            run.addresses[at] = made.data_ptr()
        totals: dict[int, Tensor] = {}
        for name, at in ready.summed:
            if at not in totals:
                totals[at] = like.new_zeros(kinds[name].shape)
                run.addresses[at] = totals[at].data_ptr()
            found[name] = totals[at].view(kinds[name].shape)
        left: list[Tensor | None] = [None] * len(step.back)
        for i, at in ready.backs if leaving else ():
            name = step.back[i]
            assert name is not None
            left[i] = gone = like.new_zeros(N * kinds[name].rows, *kinds[name].shape)
            run.addresses[2 * ready.count + at] = gone.data_ptr()
        walk = run.walk
        if edge_factors is not None:
            walk.edge_factors = run.checked("edge_factors", edge_factors.expand(T, B), (T, B), (T, B))
        walk.N = N
        walk.R = frames.R
        walk.overlaps = walks.overlaps
        walk.columns = walks.columns.data_ptr()
        if N and B:
            run(self._variant)
        for name in ready.exact:
            found[name] = found[name].to(kinds[name].dtype)
        return StepValues(kinds, T, B, found), left

    def for_rows(self, step: SplitStep, parts: Sequence[Part], wanted: Sequence[str]) -> RowPart | None:
        """Parts of a step for all rows at once as a program; None where they are none."""
        try:
            return RowPart(step, parts, wanted, self._variant)
        except Refused:
            return None

    def whole(self, request: StepRequest) -> WholeSteps | None:
        """The passes for calls of the same sizes, of which no tensor is another's part; None where there are none."""
        if request.step.dtype not in PROGRAM or any(request.step.values[n].dtype != request.step.dtype
                                                    for n in (*request.step.carry, *request.step.x)):  # fmt: skip
            return None
        core, kept = (self._ready(request.step, tuple(dict.fromkeys(names))) for names in request.core)
        try:
            return WholeSteps(request, (core, kept, self._ready(request.step, None)), self._variant)
        except NotWhole:
            return None

    def _ready(self, step: SplitStep, keep: tuple[str, ...] | None) -> Prepared:
        """A program in the form in which it runs."""
        known = self._prepared.setdefault(step, {})
        found = known.get(keep)
        if found is None:
            found = known[keep] = Prepared(self._program(step, keep), step, keep)
        return found


def _spread(arriving: Sequence[Tensor | None], leaves: Sequence[int], count: int) -> list[Tensor | None]:
    """What arrives, by leaf of the carry, from that by leaf with an adjoint."""
    found: list[Tensor | None] = [None] * count
    for i, lam in zip(leaves, arriving, strict=True):
        found[i] = lam
    return found


def _forward(step: SplitStep, keep: Sequence[str]) -> Program:
    ends = [*(("next", name) for name in step.next), *(("output", name) for name in keep)]
    kinds = dict.fromkeys(step.carry, "carry") | dict.fromkeys(step.lanes, "lane")
    program = _lowered(step, step.forward, kinds, ends)
    program.lay_out(FORWARD_BUFFERS)
    return program


def _lowered(step: SplitStep, core: Part, kinds: Mapping[str, str], ends: Sequence[tuple[str, str]]) -> Program:
    if not set(core.inputs).isdisjoint(step.constants.outputs):
        for computes in (ELEMENT_WISE, ()):
            try:
                return Lowering(with_constants(step, core, computes), step, kinds, ends, counts=True).program
            except Refused:  # perhaps for a view that an operand cannot be
                pass
    return Lowering(core, step, kinds, ends, counts=True).program


def _adjoint(step: SplitStep) -> Program:
    kinds = dict.fromkeys(step.owned, "owned") | dict.fromkeys(step.lanes, "lane")
    kinds |= {name: "adjoint" for name in step.adjoints if name is not None}
    backs = [name for name in step.back if name is not None]
    ends = [*(("output", name) for name in step.sent), *(("sum", name) for name in step.summed)]
    ends += [("back", name) for name in backs]
    program = _lowered(step, step.adjoint, kinds, ends)
    sent_back = iter(program.ends[len(step.sent) + len(step.summed) :])
    for adjoint, back in zip(step.adjoints, step.back, strict=True):
        slot = next(sent_back) if back is not None else None
        if adjoint in program.inputs:
            program.inputs[adjoint].partner = slot
    program.lay_out(SWEEP_BUFFERS)
    return program
