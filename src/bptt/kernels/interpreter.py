"""The interpreter: a kernel for traced steps whose cores are programs, run by compiled code (csrc/interpreter.hpp).

Legend: T steps, B lanes, N columns of a sweep (see `frames`); k rows of a value for each lane (`Value.rows`).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..steps import SplitStep, Value
from . import _walks
from .cpu import variants
from .frames import Frames
from .lowering import Lowering
from .program import Program, Refused
from .views import Slot

__all__ = ["Interpreter"]

PROGRAM = {torch.float32: _walks.ProgramFloat32, torch.float64: _walks.ProgramFloat64}

FORWARD_BUFFERS = frozenset({"carry"})
SWEEP_BUFFERS = frozenset({"input", "owned", "output", "adjoint", "back"})
"""The kinds of slots that have a buffer beside where they lie: what is reset, gathered or scattered."""


class Interpreter:
    """The kernel that runs cores as programs: on the CPU, in float32 and float64.

    variant: an instruction set by name; None is the widest that this machine runs.
    """

    name = "interpreter"

    def __init__(self, variant: str | None = None) -> None:
        names = [name for name, _ in _walks.variants()]
        wanted = variants()[0] if variant is None else variant
        if wanted not in variants():
            raise ValueError(f"variant must be one of {', '.join(map(repr, variants()))}: got {variant!r}")
        self.variant: str | None = wanted
        self._variant = names.index(wanted)
        self._programs: WeakKeyDictionary[SplitStep, dict[tuple[str, ...] | None, Program | Refused]]
        self._programs = WeakKeyDictionary()

    def refuses(self, step: SplitStep, device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cpu":
            return f"it runs on the CPU, not on {device}"
        if dtype not in PROGRAM:
            return f"it computes float32 and float64, not {dtype}"
        for name in step.carry:
            if step.values[name].dtype != dtype:
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

    def advance(
        self,
        step: SplitStep,
        values: Mapping[str, Tensor],
        carry: Sequence[Tensor],
        resets: Tensor | None,
        T: int,
        keep: Sequence[str],
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        keep = tuple(dict.fromkeys(keep))
        program = self.forward_program(step, keep)
        dtype, B = carry[0].dtype, _rows(carry[0], step.values[step.carry[0]])
        run = _Run(program, step, T, B, dtype)
        carries = []
        for name, after, first in zip(step.carry, program.ends, carry, strict=False):
            kind = step.values[name]
            states = first.new_empty(T + 1, B * kind.rows, *kind.shape)
            states[0].copy_(run.checked(name, first, (B * kind.rows, *kind.shape)))
            carries.append(states)
            if name in program.inputs:
                run.put(program.inputs[name], states)
            run.put(after, states)
        run.give(values, step.carry)
        kept = {}
        for name, slot in zip(keep, program.ends[len(carries) :], strict=True):
            kept[name] = run.take(slot, step.values[name], carry[0].new_empty)
        if resets is not None:
            resets = resets.to(torch.bool).expand(T, B).contiguous()
            run.walk.resets = resets.data_ptr()
        if T and B:
            run(self._variant)
        return carries, {name: _as(t, step.values[name].dtype) for name, t in kept.items()}

    def sweep(
        self,
        step: SplitStep,
        values: Mapping[str, Tensor],
        frames: Frames,
        arriving: Sequence[Tensor | None],
        edge_factors: Tensor | None,
        leaving: bool,
    ) -> tuple[dict[str, Tensor], list[Tensor | None]]:
        program, walks = self.adjoint_program(step), frames.walks
        T, B, N = frames.T, frames.B, len(frames.start)
        dtype = step.values[step.carry[0]].dtype
        run = _Run(program, step, T, B, dtype)
        leaves = [i for i, name in enumerate(step.adjoints) if name is not None]
        given = dict(zip(leaves if len(arriving) == len(leaves) else range(len(arriving)), arriving, strict=True))
        for i in leaves:
            name, lam = step.adjoints[i], given.get(i)
            if name in program.inputs and lam is not None:
                kind = step.values[name]
                if len(lam) < walks.rows * kind.rows:
                    raise RuntimeError(f"what arrives at {name} must have the {walks.rows} rows that are asked for: "
                                       f"got {list(lam.shape)}")  # fmt: skip
                run.arrives(program.inputs[name], run.checked(name, lam, (len(lam), *kind.shape)))
        run.give(values, [name for name in step.adjoints if name is not None])
        like = torch.empty(0, dtype=dtype, device="cpu")
        new = like.new_empty if walks.covers else like.new_zeros
        ends = iter(program.ends)
        found = {name: run.take(next(ends), step.values[name], new) for name in step.sent}
        for name in step.summed:
            slot, shape = next(ends), step.values[name].shape
            if slot not in run.taken:
                run.put(slot, like.new_zeros(shape))
            found[name] = run.taken[slot].view(shape)
        left: list[Tensor | None] = [None] * len(step.back)
        for i, name in enumerate(step.back):
            if name is None:
                continue
            slot = next(ends)
            if leaving:
                kind = step.values[name]
                left[i] = gone = like.new_zeros(N * kind.rows, *kind.shape)
                run.leaves(slot, gone)
        if edge_factors is not None:
            edge_factors = run.checked("edge_factors", edge_factors.expand(T, B), (T, B))
            run.walk.edge_factors = edge_factors.data_ptr()
        walk = run.walk
        walk.back = True
        walk.N = N
        walk.R = frames.R
        walk.overlaps = walks.overlaps
        walk.columns = walks.columns.data_ptr()
        if N and B:
            run(self._variant)
        return {name: _as(t, step.values[name].dtype) for name, t in found.items()}, left


class _Run:
    """One call of a program: its slots' tensors, alive until it is over."""

    def __init__(self, program: Program, step: SplitStep, T: int, B: int, dtype: torch.dtype) -> None:
        self.program, self.step, self.T, self.B, self.dtype = program, step, T, B, dtype
        self.walk = PROGRAM[dtype]()
        self.alive: list[Tensor] = []
        self.taken: dict[Slot, Tensor] = {}
        self.count = len(program.slots)
        # Of every slot: where it lies; what arrives there; what leaves from there.
        self.addresses = array("q", bytes(3 * 8 * self.count))
        self.addresses[0] = program.constants_as(dtype).data_ptr()

    def checked(self, name: str, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """A tensor that is dense and has this shape: no pointer may lead beyond it."""
        if x.shape != shape:
            raise RuntimeError(f"{name} must have the shape {list(shape)}: got {list(x.shape)}")
        if not x.is_cpu:
            raise RuntimeError(f"{name} must be on the CPU: got {x.device}")
        if x.dtype != self.dtype:
            if x.dtype != torch.bool:
                raise RuntimeError(f"{name} must be {self.dtype}: got {x.dtype}")
            x = x.to(self.dtype)
        if not x.is_contiguous() or x.is_neg() or x._is_zerotensor():
            x = x.detach().contiguous().resolve_neg().clone()
        self.alive.append(x)
        return x

    def put(self, slot: Slot, x: Tensor) -> None:
        """The tensor of a slot."""
        self.addresses[self.program.number[slot]] = x.data_ptr()
        self.taken[slot] = x

    def arrives(self, slot: Slot, x: Tensor) -> None:
        self.addresses[self.count + self.program.number[slot]] = x.data_ptr()

    def leaves(self, slot: Slot, x: Tensor) -> None:
        self.addresses[2 * self.count + self.program.number[slot]] = x.data_ptr()

    def give(self, values: Mapping[str, Tensor], but: Sequence[str]) -> None:
        """The tensors of all inputs, those of `but` apart."""
        T, B, kinds, number = self.T, self.B, self.step.values, self.program.number
        for name, slot in self.program.inputs.items():
            if name in but and slot.kind in ("carry", "adjoint"):
                continue
            x = values.get(name)
            if x is None:
                raise KeyError(f"values must hold {name}: got {', '.join(sorted(values))}")
            rows, inner, _ = kinds[name]
            x = self.checked(name, x, (T, B * rows, *inner) if rows else inner)
            self.addresses[number[slot]] = x.data_ptr()

    def take(self, slot: Slot, kind: Value, new: Callable[..., Tensor]) -> Tensor:
        """A new tensor that an output is written to."""
        made = new((self.T, self.B * kind.rows, *kind.shape) if kind.rows else kind.shape)
        self.put(slot, made)
        return made

    def __call__(self, variant: int) -> None:
        program, walk = self.program, self.walk
        walk.T = self.T
        walk.B = self.B
        walk.places = self.count
        walk.count = len(program.once) + len(program.walk)
        walk.once = len(program.once)
        walk.row_values = program.row_values
        walk.work = program.work
        walk.place = program.places.data_ptr()
        walk.code = program.code.data_ptr()
        at, width = self.addresses.buffer_info()[0], 8 * self.count
        walk.outside = at
        walk.arriving = at + width
        walk.leaving = at + 2 * width
        walk.run(variant=variant, threads=torch.get_num_threads())


def _forward(step: SplitStep, keep: Sequence[str]) -> Program:
    ends = [*(("next", name) for name in step.next), *(("output", name) for name in keep)]
    program = Lowering(step.forward, step, dict.fromkeys(step.carry, "carry"), ends).program
    program.lay_out(FORWARD_BUFFERS)
    return program


def _adjoint(step: SplitStep) -> Program:
    kinds = dict.fromkeys(step.owned, "owned") | {name: "adjoint" for name in step.adjoints if name is not None}
    backs = [name for name in step.back if name is not None]
    ends = [*(("output", name) for name in step.sent), *(("sum", name) for name in step.summed)]
    ends += [("back", name) for name in backs]
    program = Lowering(step.adjoint, step, kinds, ends).program
    sent_back = iter(program.ends[len(step.sent) + len(step.summed) :])
    for adjoint, back in zip(step.adjoints, step.back, strict=True):
        slot = next(sent_back) if back is not None else None
        if adjoint in program.inputs:
            program.inputs[adjoint].partner = slot
    program.lay_out(SWEEP_BUFFERS)
    return program


def _rows(x: Tensor, kind: Value) -> int:
    return len(x) // kind.rows


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if dtype == torch.bool else x
