"""The memories of a call of a traced step by number, walks over them, and functions of them.

Legend: T steps, B lanes. A source is (number of a memory, distance in it in bytes).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..steps import Part, SplitStep
from . import _walks
from .frames import Frames
from .joined import in_one
from .prepared import BOUND, Prepared
from .row_parts import RowPart
from .step_values import Place, sizes

__all__ = ["AtOnce", "BoundWalk", "Memories", "NotWhole", "Reader", "StepRequest", "inputs_known"]

Source = tuple[int, int]

Reader = Callable[[Sequence[Tensor]], Tensor]
"""A function that gives one value of a call from its memories."""


class StepRequest(NamedTuple):
    """A request for the passes of a step of which the values of all steps are kept.

    core: what stage 1 brings back besides the carries, for the outputs alone and for the way back too. constants: what
    is computed of captured tensors alone, forward and back.
    """

    step: SplitStep
    T: int
    B: int
    frames: Frames
    core: tuple[tuple[str, ...], tuple[str, ...]]
    constants: tuple[Part, Part]
    early: RowPart | None  # what is hoisted, as a program
    late: RowPart | None  # what is deferred


class NotWhole(Exception):  # noqa: N818  it is an answer
    """The reason why a step has no whole passes."""


class Memories:
    """Where the values of a call lie, as they become known: tensors of their own, or places in those that hold many.

    sources: by name. readers: of those that a function may take.
    """

    def __init__(self, request: StepRequest, dtype: torch.dtype) -> None:
        self.request, self.kinds, self.dtype, self.itemsize = request, request.step.values, dtype, dtype.itemsize
        self.sources: dict[str, Source] = {}
        self.readers: dict[str, Reader] = {}

    def size(self, name: str) -> tuple[int, ...]:
        return sizes(self.kinds[name], self.request.T, self.request.B)

    def by_step(self, name: str) -> tuple[int, ...]:
        """`[T, B, ...]`."""
        kind = self.kinds[name]
        if kind.rows < 1:
            raise NotWhole(f"{name} has no rows")
        return (self.request.T, self.request.B * kind.rows, *kind.shape)

    def own(self, name: str, memory: int, flatten: bool = False) -> None:
        """A value that is a tensor, of other dimensions perhaps."""
        self.sources[name] = memory, 0
        size = self.size(name)
        self.readers[name] = (lambda held: held[memory].view(size)) if flatten else lambda held: held[memory]

    def by_lane(self, name: str, memory: int) -> None:
        """A tensor with a row for each lane: programs of walks read it so, and functions as one repeated."""
        self.sources[name] = memory, 0
        T = self.request.T
        self.readers[name] = lambda held: held[memory].expand(T, *held[memory].shape).flatten(0, 1)

    def lies_in(self, name: str, memory: int, offset: int) -> None:
        """A value in a memory of many. offset: in numbers."""
        self.sources[name] = memory, offset * self.itemsize
        _, _, size, stride = Place.of(self.kinds[name], self.request.T, self.request.B, memory, offset)
        dtype = self.kinds[name].dtype  # in memories everything is a number of the program's kind
        if dtype == self.dtype:
            self.readers[name] = lambda held: held[memory].as_strided(size, stride, offset)
        else:
            self.readers[name] = lambda held: held[memory].as_strided(size, stride, offset).to(dtype)

    def check(self, names: Sequence[str]) -> None:
        """Raise NotWhole unless these are of the program's kind."""
        for name in names:
            if self.kinds[name].dtype != self.dtype:
                raise NotWhole(f"{name} is {self.kinds[name].dtype}, not {self.dtype}")


class AtOnce:
    """Parts of a step by torch operations, on the memories of a call. None of them: it gives nothing."""

    def __init__(self, parts: Sequence[Part], wanted: Sequence[str], memories: Memories) -> None:
        request = memories.request
        made = {name for part in parts for name in part.outputs}
        self.outputs = tuple(dict.fromkeys(name for name in wanted if name in made and name not in memories.sources))
        part = in_one(parts, self.outputs)
        self.function, self.R = part.function, request.T * request.B
        self.readers = tuple(memories.readers[name] for name in part.inputs)

    def __call__(self, held: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return self.function(self.R, *[read(held) for read in self.readers])


class BoundWalk:
    """A program with all that is the same in calls of the same sizes. given: what is computed before, if anything is,
    the last of its memories.
    """

    def __init__(self, ready: Prepared, memories: Memories, given: AtOnce, at: int, variant: int) -> None:
        self.ready, self.variant = ready, variant
        self.given = given if given.outputs else None
        self.casts = tuple(i for i, n in enumerate(given.outputs) if memories.kinds[n].dtype != ready.dtype)
        self.shapes = tuple(memories.size(name) for name in given.outputs)
        for i, name in enumerate(given.outputs):
            memories.own(name, at + i)
        self.parts: list[int] = []
        self.moves: list[int] = []
        self.before = 0
        for name, number, _, _ in ready.inputs:
            if name not in memories.sources:
                raise NotWhole(f"{name} is not known before the walk")
            self.at(number, memories.sources[name])

    def at(self, number: int, source: Source) -> None:
        """An address that lies in a memory."""
        self.parts += (number, *source)

    def finish(self, request: StepRequest, back: bool) -> None:
        """Make it of all that it has been told."""
        walk = self.ready.walk.copy()
        walk.T, walk.B = request.T, request.B
        if back:
            walks = request.frames.walks
            walk.N, walk.R, walk.overlaps = len(request.frames.start), request.frames.R, walks.overlaps
            walk.columns = walks.columns.data_ptr()
        numbers = self.ready.addresses.tolist()
        self.bound = BOUND[self.ready.dtype](walk, numbers, self.parts, self.moves, self.before)

    def __call__(self, held: Sequence[Tensor], begins: list[int]) -> tuple[Tensor, ...] | None:
        """What was computed before the walk; None where that is not as it should be. begins: of the other memories."""
        computed: tuple[Tensor, ...] = ()
        if self.given is not None:
            computed = whole = self.given(held)
            for i in self.casts:
                whole = (*whole[:i], whole[i].to(self.ready.dtype), *whole[i + 1 :])
            found = _walks.places(whole, self.shapes, self.ready.dtype)
            if found is None:  # most often for being a view
                whole = tuple([t.contiguous() for t in whole])
                found = _walks.places(whole, self.shapes, self.ready.dtype)
                if found is None:
                    return None
            begins += found
        self.bound.run(begins, self.variant, torch.get_num_threads())
        return computed


def inputs_known(request: StepRequest, memories: Memories) -> list[tuple[int, ...]]:
    """The dimensions of the first carry, of xs and of captured tensors, which become known."""
    step, found = request.step, list[tuple[int, ...]]()
    memories.check((*step.carry, *step.x, *step.captured))
    for name in step.carry:
        found.append(memories.by_step(name)[1:])
    for name in step.x:
        memories.own(name, len(found), flatten=True)
        found.append(memories.by_step(name))
    for name in step.captured:
        if name in step.lanes:
            memories.by_lane(name, len(found))
            found.append(memories.by_step(name)[1:])
            continue
        memories.own(name, len(found))
        found.append(memories.size(name))
        if memories.kinds[name].rows:
            raise NotWhole(f"{name} has rows")
    return found
