"""Whole passes of a traced step: the walks of the interpreter, prepared for calls of the same sizes.

Of a small call the arithmetic is the smaller part. What follows from its sizes is here from an earlier such call: every
value lies in a memory, known by its number, at a known distance, and a walk is one crossing into compiled code. What is
computed before and after the walks is a function of these memories.

Legend: T steps, B lanes. A source is (number of a memory, distance in it in bytes).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..steps import Part, SplitStep
from . import _walks
from .frames import Frames
from .prepared import Prepared
from .row_parts import RowPart
from .step_memories import AtOnce, BoundWalk, Memories, NotWhole, Reader, StepRequest, inputs_known
from .step_values import LINE, sizes

__all__ = ["WholeSteps"]


class _Forward:
    """Stage 1. Memories: the inputs, the tape, the final carries, the ys, what is hoisted, what else is computed before
    the walk.

    tape: the numbers of all carries, of what is kept, and of what else the walk brings back.
    """

    def __init__(self, request: StepRequest, ready: Prepared, keep: bool, variant: int) -> None:
        step, T, B = request.step, request.T, request.B
        memories = Memories(request, ready.dtype)
        self.inputs = inputs_known(request, memories)
        tape, n = len(self.inputs), len(step.carry)
        self.last = tuple(self.inputs[:n])
        self.ys = tuple(memories.by_step(name) for name in step.y)
        parts, scratch = [request.constants[0], step.hoisted], tape + 1 + n + len(step.y)
        self.early: list[_walks.Bound] = []
        end, end_of_scratch = 0, 0
        if request.early is not None:
            if request.early.after is not None or request.early.same:
                raise NotWhole("what is hoisted is no program alone")
            _check_rows(request.early, step)
            parts = parts[:1]
            for name in request.early.outputs:
                if keep and name in step.kept:
                    memories.lies_in(name, tape, end)
                    end += _aligned(prod(memories.size(name)))
                else:
                    memories.lies_in(name, scratch, end_of_scratch)
                    end_of_scratch += _aligned(prod(memories.size(name)))
            self.early = request.early.bound(T * B, memories.sources)
        self.scratch = (end_of_scratch,)
        wanted = [name for name, _, _, _ in ready.inputs] + list(step.y)
        walk = self.walk = BoundWalk(ready, memories, AtOnce(parts, wanted, memories), scratch + 1, variant)
        for i, (name, at, after) in enumerate(ready.carries):
            one = prod(self.last[i])
            bytes_of_one = one * ready.itemsize
            memories.lies_in(name, tape, end)
            source = memories.sources[name]
            walk.at(after, source)
            if at >= 0:
                walk.at(at, source)
            walk.moves += (*source, i, 0, bytes_of_one)
            if step.next[i] not in memories.sources:
                memories.lies_in(step.next[i], tape, end + one)
            end += _aligned((T + 1) * one)
        walk.before = n
        for i in range(n):
            tape_at, distance = memories.sources[step.carry[i]]
            size = prod(self.last[i]) * ready.itemsize
            walk.moves += (tape + 1 + i, 0, tape_at, distance + T * size, size)
        for name, at in ready.kept:
            memories.lies_in(name, tape, end)
            walk.at(at, memories.sources[name])
            end += _aligned(prod(memories.size(name)))
        memories.check((*step.carry, *step.next, *step.y))
        for j, name in enumerate(step.y):
            walk.moves += (tape + 1 + n + j, 0, *memories.sources[name], prod(self.ys[j]) * ready.itemsize)
        if keep and any(memories.sources.get(name, (-1, 0))[0] != tape for name in step.kept):
            raise NotWhole("what is kept is known before the walk")
        self.tape = (end,)
        self.places = {name: source for name, source in memories.sources.items() if source[0] == tape}
        walk.finish(request, back=False)

    def __call__(self, tensors: tuple[Tensor, ...], begins: tuple[int, ...]) -> tuple[Tensor, ...] | None:
        """(the tape, the final carries, the ys). begins: where the tensors do."""
        new = tensors[0].new_empty
        made = (new(self.tape), *[new(size) for size in self.last], *[new(size) for size in self.ys])
        scratch = new(self.scratch)
        addresses = [*begins, *[t.data_ptr() for t in made], scratch.data_ptr()]
        for program in self.early:
            program.run(addresses, self.walk.variant, torch.get_num_threads())
        return None if self.walk(tensors, addresses) is None else made


class _Back:
    """Stages 3 and 4. Memories: the inputs, the tape, the cotangents of the outputs, what the walk sends, its sums over
    all rows, what reaches the first carry, what is computed before the walk, what `late` gives.

    leaves: of the carry that have a gradient. sums, made: the dimensions of tensors made for sums and for `late`.
    gradients: (number of the memory that is one or -1, how else to get it) of each input but the first carry.
    """

    def __init__(self, request: StepRequest, ready: Prepared, forward: _Forward, variant: int) -> None:
        step, self.dtype = request.step, ready.dtype
        if not (step.sent or step.summed):
            raise NotWhole("no walk back is needed")
        memories = Memories(request, ready.dtype)
        inputs = inputs_known(request, memories)
        tape, n = len(inputs), len(step.carry)
        for name, (_, distance) in forward.places.items():
            memories.lies_in(name, tape, distance // ready.itemsize)
        ys = tape + 1 + n
        self.shapes = (*inputs, forward.tape, *forward.last, *forward.ys)
        self.count, self.n, self.outputs = len(inputs), n, len(self.shapes) - len(inputs) - 1
        for j, dy in enumerate(step.dys):
            if dy is not None:
                memories.own(dy, ys + j, flatten=True)
        self.zeros = [torch.zeros(size, dtype=ready.dtype, device="cpu") for size in forward.ys]
        work = ys + len(step.y)
        factors = [name for pairs in step.by_lane.values() for pair in pairs for name in pair]
        deferred = [n for n in (*step.dx, *step.dcaptured) if n is not None and n not in step.by_lane] + factors
        left = step.deferred.inputs if request.late is None else request.late.needs
        wanted = [*(name for name, _, _, _ in ready.inputs), *left, *deferred]
        given = AtOnce((request.constants[1], step.errors), wanted, memories)
        sums = list(dict.fromkeys(at for _, at in ready.summed))
        first = work + 1 + len(sums)
        walk = self.walk = BoundWalk(ready, memories, given, first + n, variant)
        for i in ready.leaves:
            slot = ready.program.inputs.get(step.adjoints[i] or "")
            if slot is not None:
                walk.at(ready.count + ready.numbers[slot], (tape + 1 + i, 0))
        for leaf, at in ready.backs:
            walk.at(2 * ready.count + at, (first + leaf, 0))
        sizes_of = {name: memories.by_step(name) for name in step.dx if name is not None}
        self.sizes: dict[int, tuple[int, ...]] = {}
        seen_as = self._seen_as(request, sizes_of)
        end = 0
        for name, at in ready.sent:
            memories.lies_in(name, work, end)
            walk.at(at, memories.sources[name])
            end += _aligned(prod(memories.size(name)))
        for name, at in ready.summed:
            memory = work + 1 + sums.index(at)
            self._own(memories, name, memory, seen_as.get(name, memories.size(name)))
            walk.at(at, memories.sources[name])
        self.sums = [self.sizes[work + 1 + k] for k in range(len(sums))]
        self.work, self.covers, self.frames = (end,), request.frames.walks.covers, request.frames
        self.leaves = {leaf for leaf, _ in ready.backs}
        self.first = [
            (len(request.frames.start) * memories.kinds[c].rows, *memories.kinds[c].shape) for c in step.carry
        ]
        self.late: list[_walks.Bound] = []
        after: tuple[Part, ...] = (step.deferred,)
        self.made: list[tuple[int, ...]] = []
        if request.late is not None:
            late, at = request.late, first + n + len(given.outputs)
            _check_rows(late, step)
            for name in late.outputs:
                self._own(memories, name, at, seen_as.get(name, sizes_of.get(name, memories.size(name))))
                self.made.append(self.sizes[at])
                at += 1
            for name, of in late.same.items():
                memory, distance = memories.sources[of]
                if memory < tape:
                    raise NotWhole(f"{name} is an input")
                if memory in self.sizes:
                    memories.own(name, memory, flatten=True)
                else:
                    memories.lies_in(name, memory, distance // ready.itemsize)
            self.late = late.bound(request.T * request.B, memories.sources)
            after = () if late.after is None else (late.after,)
        self.last = AtOnce(after, deferred, memories)
        self.gradients: list[tuple[int, _Gradient | _GradientOfLanes | None]] = []
        given_out: set[str | int] = set()  # what is given out twice is copied: autograd may add to it in place
        of_lanes = {name for name, of in zip(step.dcaptured, step.captured, strict=True) if of in step.lanes}
        for i, wanted_name in enumerate((*step.dx, *step.dcaptured)):
            if wanted_name is None:
                self.gradients.append((-1, None))
                continue
            if i >= len(step.dx) and wanted_name in of_lanes:
                self.gradients.append((-1, self._of_lanes(wanted_name, memories)))
                continue
            size = sizes_of.get(wanted_name) if i < len(step.dx) else None
            memory, distance = memories.sources.get(wanted_name, (-1, 0))
            whole = memory in self.sizes and distance == 0
            if whole and memory not in given_out and self.sizes[memory] == (size or memories.size(wanted_name)):
                self.gradients.append((memory, None))
            else:
                found = self._gradient(wanted_name, memories, size)
                copied = memory in given_out if whole else found.copied or wanted_name in given_out
                self.gradients.append((-1, found._replace(copied=copied)))
            given_out |= {wanted_name} if memory < 0 else {wanted_name, memory}
        walk.finish(request, back=True)

    @staticmethod
    def _seen_as(request: StepRequest, sizes_of: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """The dimensions in which values that are known in others are given out."""
        step, kinds = request.step, request.step.values
        wanted = {*step.dx, *step.dcaptured}
        same = {} if request.late is None else request.late.same
        return {of: sizes_of.get(name, sizes(kinds[name], request.T, request.B))
                for name, of in same.items() if name in wanted and of not in wanted}  # fmt: skip

    def _own(self, memories: Memories, name: str, memory: int, size: tuple[int, ...]) -> None:
        """A value that is a tensor of these dimensions, made for it."""
        self.sizes.setdefault(memory, size)
        memories.own(name, memory, flatten=self.sizes[memory] != memories.size(name))

    def _of_lanes(self, name: str, memories: Memories) -> _GradientOfLanes:
        names = [n for pair in memories.request.step.by_lane.get(name, ((name,),)) for n in pair]
        read = {n: self._gradient(n, memories, None)._replace(copied=False, size=memories.by_step(n)) for n in names}
        return _GradientOfLanes(name, memories.request.step, read)

    def _gradient(self, name: str, memories: Memories, size: tuple[int, ...] | None) -> _Gradient:
        outputs = self.last.outputs
        read = None if name in outputs else memories.readers[name]
        position = outputs.index(name) if read is None else -1
        return _Gradient(position, read, name not in memories.request.step.own, size)

    def __call__(
        self, saved: tuple[Tensor, ...], cotangents: Sequence[Tensor | None], needs: Sequence[bool]
    ) -> tuple[Tensor | None, ...] | None:
        """The gradients of the inputs; None where a tensor is not as it should be."""
        n, given = self.n, [t if t is None or t.is_contiguous() else t.contiguous() for t in cotangents]
        for j, zeros in enumerate(self.zeros, n):
            if given[j] is None:
                given[j] = zeros
        held: list[Any] = [*saved, *given]
        found = _walks.places(tuple(held), self.shapes, self.dtype)
        if found is None:
            return None
        empty, first = saved[0].new_empty, list[Tensor | None]([None] * n)
        own = [empty(self.work) if self.covers else saved[0].new_zeros(self.work), *[empty(size) for size in self.sums]]
        begins = [*found, *[t.data_ptr() for t in own]]
        if True in needs[:n]:
            first = [saved[0].new_zeros(size) if i in self.leaves else None for i, size in enumerate(self.first)]
            begins += [0 if t is None else t.data_ptr() for t in first]
        else:
            begins += [0] * n
        held += own
        held += first
        computed = self.walk(held, begins)
        if computed is None:
            return None
        held += computed
        if self.late:
            made = [empty(size) for size in self.made]
            begins += [t.data_ptr() for t in made]
            for program in self.late:
                program.run(begins, self.walk.variant, torch.get_num_threads())
            held += made
        results = self.last(held) if self.last.outputs else ()
        grads: list[Tensor | None] = [None if t is None else _initial(self.frames, t) for t in first]
        for memory, gradient in self.gradients:
            if memory >= 0:
                grads.append(held[memory])
            else:
                grads.append(None if gradient is None else gradient(results, held))
        return (
            tuple(grads)
            if False not in needs
            else tuple([g if need else None for g, need in zip(grads, needs, strict=True)])
        )


class _Gradient(NamedTuple):
    """Where the gradient of an input is: among the results of a function, or else how it is read. copied: whether it
    is a part of something else; size: its dimensions, if not what it has there.
    """

    position: int
    read: Reader | None
    copied: bool
    size: tuple[int, ...] | None

    def __call__(self, results: Sequence[Tensor], held: Sequence[Tensor]) -> Tensor:
        found = results[self.position] if self.read is None else self.read(held)
        if self.size is not None:
            found = found.view(self.size)
        return found.clone() if self.copied else found


class _GradientOfLanes(NamedTuple):
    """The gradient of a captured tensor with a row for each lane: a sum over all steps. parts: what it is made of."""

    name: str
    step: SplitStep
    parts: dict[str, _Gradient]

    def __call__(self, results: Sequence[Tensor], held: Sequence[Tensor]) -> Tensor:
        return self.step.over_time(self.name, {name: part(results, held) for name, part in self.parts.items()})


def _check_rows(part: RowPart, step: SplitStep) -> None:
    """A program for all rows takes no tensor that is the same at every step."""
    if not step.lanes.isdisjoint(part.inputs):
        raise NotWhole("a captured tensor with lanes is needed for all rows")


def _initial(frames: Frames, leaving: Tensor) -> Tensor:
    """`[N, ...]` -> `[B, ...]`: what reaches the first carry of each lane."""
    if frames.whole:
        return leaving
    columns = (frames.start == 0).nonzero()[:, 0]
    return leaving.new_zeros(frames.B, *leaving.shape[1:]).index_add(0, frames.lane[columns], leaving[columns])


def _aligned(n: int) -> int:
    return -(-n // LINE) * LINE


class WholeSteps:
    """The passes of a traced step for calls of the same sizes, with the bits of the interpreter's `advance` and `sweep`
    and of the step's other parts by torch operations. Holds no tensor of a call, and may be used by several threads.

    ready: the programs of the walks forward, for the outputs alone and for the way back too, and of the walk back.
    Raises NotWhole where a value is not of a kind that it knows.
    """

    def __init__(self, request: StepRequest, ready: tuple[Prepared, Prepared, Prepared], variant: int) -> None:
        if request.step.outputs.outputs:
            raise NotWhole("some ys are computed after the walk")
        self.dtype = ready[0].dtype
        self._infer, self._taped = (
            _Forward(request, ready[0], False, variant),
            _Forward(request, ready[1], True, variant),
        )
        self._back = _Back(request, ready[2], self._taped, variant)
        self.shapes = tuple(self._taped.inputs)

    def places(self, tensors: tuple[Tensor, ...]) -> tuple[int, ...] | None:
        """Where the first carry, xs and captured tensors lie; None where one is not as it should be."""
        return _walks.places(tensors, self.shapes, self.dtype)

    def infer(self, tensors: tuple[Tensor, ...], places: tuple[int, ...]) -> tuple[Tensor, ...] | None:
        """The final carry and the ys."""
        made = self._infer(tensors, places)
        return None if made is None else made[1:]

    def taped(self, tensors: tuple[Tensor, ...], places: tuple[int, ...]) -> tuple[Tensor, ...] | None:
        """The tape, and then the same."""
        return self._taped(tensors, places)

    def pulled(
        self, saved: tuple[Tensor, ...], cotangents: Sequence[Tensor | None], needs: Sequence[bool]
    ) -> tuple[Tensor | None, ...] | None:
        """The gradients of the inputs that need one, from the inputs with the tape; None where it cannot tell."""
        return self._back(saved, cotangents, needs)
