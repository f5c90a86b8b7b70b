"""Programs as compiled code takes them: what is the same in all calls, and what one call adds.

Legend: T steps, B lanes; k rows of a value for each lane (`Value.rows`).
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..steps import SplitStep
from . import _walks
from .program import Program
from .step_values import Layout, Place, StepValues, sizes

__all__ = ["BOUND", "PROGRAM", "Prepared", "Run", "Sized", "walk_of"]

PROGRAM = {torch.float32: _walks.ProgramFloat32, torch.float64: _walks.ProgramFloat64}

BOUND = {torch.float32: _walks.BoundFloat32, torch.float64: _walks.BoundFloat64}
"""Programs of which a call adds where its memories begin."""

MOST_SIZED = 64
"""The numbers of steps and lanes for which one program keeps the sizes of its values."""


class Prepared:
    """A program as compiled code takes it, the same in all calls.

    Slots are known by their numbers. carries: (name, number where it is read or -1, number of the one after the step)
    of each; inputs: (name, number, `Value.rows`, shape) of what else is given; kept, sent, summed: (name, number) of
    what is brought back; backs: (leaf, number); lanes: of the inputs, those
    that are the same at every step; exact: those brought back that are truths or whole numbers; whole: the kept values
    that may be given as such; counts: the inputs that are whole numbers.
    """

    def __init__(self, program: Program, step: SplitStep, keep: tuple[str, ...] | None) -> None:
        self.program, self.kinds = program, step.values
        self.dtype = step.dtype
        self.itemsize, self.like = self.dtype.itemsize, torch.empty(0, dtype=self.dtype, device="cpu")
        self.numbers, self.count = program.number, len(program.slots)
        self.inputs = [(name, self.numbers[slot], step.values[name].rows, step.values[name].shape)
                       for name, slot in program.inputs.items() if slot.kind not in ("carry", "adjoint")]  # fmt: skip
        ends = [self.numbers[slot] for slot in program.ends]
        self.leaves = [i for i, name in enumerate(step.adjoints) if name is not None]
        self.carries: list[tuple[str, int, int]] = []
        self.kept: list[tuple[str, int]] = []
        self.sent: list[tuple[str, int]] = []
        self.summed: list[tuple[str, int]] = []
        self.backs: list[tuple[int, int]] = []
        if keep is None:
            n = len(step.sent) + len(step.summed)
            self.sent = list(zip(step.sent, ends, strict=False))
            self.summed = list(zip(step.summed, ends[len(step.sent) :], strict=False))
            self.backs = list(zip([i for i, b in enumerate(step.back) if b is not None], ends[n:], strict=True))
        else:
            at = [self.numbers[program.inputs[c]] if c in program.inputs else -1 for c in step.carry]
            self.carries = list(zip(step.carry, at, ends, strict=False))
            self.kept = list(zip(keep, ends[len(at) :], strict=True))
        brought = (*self.kept, *self.sent, *self.summed)
        self.lanes = frozenset(name for name, slot in program.inputs.items() if slot.kind == "lane")
        self.exact = [n for n, _ in brought if not step.values[n].dtype.is_floating_point]
        self.whole, self.counts = (
            frozenset(step.kept),
            program.counts | {name for name in step.carry if not step.values[name].dtype.is_floating_point},
        )
        self.together = [n for n, _ in self.kept if n in step.kept and n not in step.y and n not in self.exact]
        self._sized: dict[tuple[int, int], Sized] = {}
        self.walk, self.constants, self.addresses = walk_of(program, self.dtype)
        self.walk.back = keep is None

    def sized(self, T: int, B: int) -> Sized:
        """The sizes of its values in calls of T steps and B lanes."""
        found = self._sized.get((T, B))
        if found is None:
            if len(self._sized) >= MOST_SIZED:
                self._sized.clear()
            found = self._sized[T, B] = Sized.of(self, T, B)
        return found


def walk_of(program: Program, dtype: torch.dtype) -> tuple[_walks.Program, Tensor, array[int]]:
    """A program as compiled code takes it, its constants, and the addresses of its slots, which know of these alone."""
    constants, count = program.constants_as(dtype), len(program.slots)
    addresses = array("q", bytes(3 * 8 * count))
    addresses[0] = constants.data_ptr()
    walk = PROGRAM[dtype]()
    walk.places = count
    walk.count = len(program.once) + len(program.walk)
    walk.once = len(program.once)
    walk.row_values = program.row_values
    walk.work = program.work
    walk.place = program.places.data_ptr()
    walk.code = program.code.data_ptr()
    return walk, constants, addresses


class Sized(NamedTuple):
    """What the numbers of steps and lanes tell of a program's values.

    layout: of those that are brought back in one memory: those that are for the caller's tape alone. together: (number,
    distance in bytes) of these; own: (name, number, size) of those brought back otherwise; carries: (name, number where
    it is read, number after the step, size of one, size of all); inputs: (name, number, size, `[T, B * k, ...]`).
    """

    layout: Layout
    together: list[tuple[int, int]]
    own: list[tuple[str, int, tuple[int, ...]]]
    carries: list[tuple[str, int, int, tuple[int, ...], tuple[int, ...]]]
    inputs: list[tuple[str, int, tuple[int, ...], tuple[int, ...]]]

    @classmethod
    def of(cls, ready: Prepared, T: int, B: int) -> Sized:
        kinds, layout = ready.kinds, Layout(ready.kinds, ready.together, T, B)
        places = layout.places
        carries = []
        for name, at, after in ready.carries:
            size = (B * kinds[name].rows, *kinds[name].shape)
            carries.append((name, at, after, size, (T + 1, *size)))
        return cls(
            layout,
            [(at, places[name].offset * ready.itemsize) for name, at in ready.kept if name in places],
            [(n, at, sizes(kinds[n], T, B)) for n, at in (*ready.kept, *ready.sent) if n not in places],
            carries,
            [(name, at, *_sizes(rows, shape, 1 if name in ready.lanes else T, B))
             for name, at, rows, shape in ready.inputs],
        )  # fmt: skip


def _sizes(rows: int, shape: tuple[int, ...], T: int, B: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return ((T * B * rows, *shape), (T, B * rows, *shape)) if rows else (shape, shape)


class Run:
    """One call of a program: the addresses of its slots, and the tensors made for it, alive until it is over.

    addresses: of every slot where it lies, what arrives there, what leaves from there. moves: (to, from, bytes) of what
    is copied before the walk, of which there are `before`, and after it.
    """

    __slots__ = ("B", "T", "addresses", "alive", "before", "moves", "ready", "sized", "walk")

    def __init__(self, ready: Prepared, T: int, B: int) -> None:
        self.ready, self.T, self.B = ready, T, B
        self.sized = ready.sized(T, B)
        self.walk: _walks.Program = ready.walk.copy()
        self.addresses = ready.addresses[:]
        self.alive: list[Tensor] = []
        self.moves: list[int] = []
        self.before = 0

    def checked(self, name: str, x: Tensor, size: tuple[int, ...], whole: tuple[int, ...]) -> int:
        """The address of a tensor that is dense and has one of two shapes: no pointer may lead beyond it."""
        if x.shape != size and x.shape != whole:
            raise RuntimeError(f"{name} must have the shape {list(whole)}: got {list(x.shape)}")
        if not x.is_cpu:
            raise RuntimeError(f"{name} must be on the CPU: got {x.device}")
        if x.dtype != self.ready.dtype:
            allowed = name in self.ready.whole or name in self.ready.counts
            if x.dtype != torch.bool and (x.is_floating_point() or not allowed):
                raise RuntimeError(f"{name} must be {self.ready.dtype}: got {x.dtype}")
            x = x.to(self.ready.dtype)
            self.alive.append(x)
        if not x.is_contiguous() or x.is_neg() or x._is_zerotensor():
            x = x.detach().contiguous().resolve_neg().clone()
            self.alive.append(x)
        return x.data_ptr()

    def give(self, values: Mapping[str, Tensor]) -> None:
        """The addresses of all inputs, apart from carries and adjoints."""
        addresses = self.addresses
        places: Mapping[str, Place]
        flat: Mapping[str, Tensor]
        lanes: Mapping[str, Tensor]
        places, flat, lanes, starts, kinds = {}, values, {}, [], []
        if isinstance(values, StepValues):
            places, flat, lanes = values.places, values.flat, values.lanes
            starts = [m.data_ptr() for m in values.memories]
            kinds = [m.dtype for m in values.memories]
        for name, at, size, whole in self.sized.inputs:
            x = lanes.get(name) if name in lanes else flat.get(name)
            if x is None:
                place = places.get(name)
                if place is None:
                    raise KeyError(f"values must hold {name}: got {', '.join(sorted(values))}")
                if kinds[place.memory] == self.ready.dtype:
                    addresses[at] = starts[place.memory] + place.offset * self.ready.itemsize
                else:  # whole numbers of the carry
                    addresses[at] = self.checked(name, values[name], size, whole)
            else:
                addresses[at] = self.checked(name, x, size, whole)

    def __call__(self, variant: int) -> None:
        walk, moves = self.walk, array("q", self.moves)
        walk.T = self.T
        walk.B = self.B
        at, width = self.addresses.buffer_info()[0], 8 * self.ready.count
        walk.outside = at
        walk.arriving = at + width
        walk.leaving = at + 2 * width
        if moves:
            walk.moves = moves.buffer_info()[0]
            walk.before = self.before
            walk.after = len(moves) // 3 - self.before
        walk.run(variant=variant, threads=torch.get_num_threads())
