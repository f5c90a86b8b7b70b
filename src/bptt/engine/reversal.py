"""The way back through a call with checkpoints: one segment after the other, from the last to the first.

Legend: as in `stack`; a, b: a segment's first step, and the one behind its last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ..kernels import Columns, Frames
from ..policies import EVERYTHING
from ..schedules import Action, Schedule
from .boundary import Tensors, given
from .stack import Stack
from .walk import Walk

__all__ = ["Back", "Crossing", "Source", "States", "Whole", "inputs_of", "part_of", "states_of"]

States = tuple[Tensor, ...]
"""h `[K, B, P]` and, for a state (h, c), c `[K, B, H]`, of every layer and direction."""


class Source(Protocol):
    """Where a call's x comes from, and where its y and dx go, segment by segment."""

    def x(self, a: int, b: int) -> Tensor:
        """The input of steps a to b-1 `[b-a, B, I]`."""
        ...

    def see(self, a: int, b: int, y: Tensor) -> None:
        """The output of these steps, on the way forward."""
        ...

    def error(self, a: int, b: int, y: Tensor) -> Tensor | None:
        """dL/dy of these steps, y run again."""
        ...

    def put(self, a: int, b: int, dx: Tensor | None) -> None:
        """dL/dx of these steps, None where it is not asked for."""
        ...


class Whole:
    """x, y, dy and dx as tensors of all steps."""

    def __init__(self, x: Tensor, dy: Tensor | None, wants_dx: bool) -> None:
        self.given, self.dy = x, dy
        self.y: Tensor | None = None
        self.dx = torch.empty_like(x) if wants_dx else None

    def x(self, a: int, b: int) -> Tensor:
        return self.given[a:b]

    def see(self, a: int, b: int, y: Tensor) -> None:
        if self.y is None:
            self.y = y.new_empty(len(self.given), *y.shape[1:])
        self.y[a:b] = y

    def error(self, a: int, b: int, y: Tensor) -> Tensor | None:
        return None if self.dy is None else self.dy[a:b]

    def put(self, a: int, b: int, dx: Tensor | None) -> None:
        if self.dx is not None:
            self.dx[a:b] = given(dx)


class Back:
    """One backward call: segments reversed from the last to the first, sums over them."""

    def __init__(
        self,
        stack: Stack,
        edges: Sequence[int],
        schedule: Schedule,
        tensors: Tensors,
        source: Source,
        d_finals: Tensors,
        needs: tuple[bool, ...],
        adjoints: bool,
    ) -> None:
        self.stack, self.edges, self.schedule = stack, edges, schedule
        self.tensors, self.needs = tensors, needs
        self.source, self.dfinal = source, d_finals
        self.initial = states_of(self.stack, tensors)
        self.T, B = edges[-1], self.initial[0].shape[1]
        self.states = self.stack.cell.states
        reach = self.stack.reach
        self.overlaps = reach.every is not None and not reach.fenced and B > 0
        self.frames = Frames.of(reach, self.stack.lengths, self.T, B) if self.overlaps else None
        self.crossing = Crossing(())
        self.carry: tuple[Tensor | None, ...] = (None,) * self.states
        self.weights: list[Tensor | None] = [None] * (len(tensors) - 1 - self.states)
        self.adjoints: list[list[Tensor]] | None = [] if adjoints else None

    def run(self, checkpoints: Sequence[States]) -> tuple[Tensors, list[Tensor]]:
        """All gradients, in the order of the inputs, that of x left out; the adjoints."""
        schedule, edges = self.schedule, self.edges
        stored = {0: self.initial, **dict(zip(schedule.stored_forward, checkpoints, strict=True))}
        at, state = len(edges), stored[0]  # the state at hand: none yet
        # The advance that led to the last segment was the forward pass's, which kept no state but the stored ones.
        last = len(edges) - 2
        lead = (Action("A", max(stored), last),) if max(stored) < last else ()
        for action in (*lead, *schedule.backward):
            if action.kind == "S":
                stored[action.first] = state
            elif action.kind == "D":
                del stored[action.first]
            elif action.kind == "A":
                state = state if at == action.first else stored[action.first]
                for i in range(action.first, action.last):
                    state = self._advance(i, state)
                at = action.last
            else:
                self._reverse(action.first, state if at == action.first else stored[action.first])
        initial = [g if need else None for g, need in zip(self.carry, self.needs[1:], strict=False)]
        pieces = [] if self.adjoints is None else self.adjoints[::-1]
        return (None, *initial, *self.weights), [torch.cat(parts) for parts in zip(*pieces, strict=True)]

    def _advance(self, i: int, state: States) -> States:
        """The state behind segment i."""
        a, b = self.edges[i : i + 2]
        inputs = inputs_of(self.tensors, self.source.x(a, b), state)
        return part_of(self.stack, a, b).forward(inputs, keep=False)[0][1:]

    def _reverse(self, i: int, state: States) -> None:
        """Run segment i again with its tape, and walk it back."""
        a, b = self.edges[i : i + 2]
        part = part_of(self.stack, a, b)
        inputs = inputs_of(self.tensors, self.source.x(a, b), state)
        outputs, tape = part.forward(inputs, keep=True)
        dy = self.source.error(a, b, outputs[0])
        needs = (self.needs[0], *(True,) * self.states, *self.needs[1 + self.states :])
        walk = Walk(part, inputs, outputs, tape, (dy, *self._final(a, b)))
        if self.frames is None:
            (dx, *rest), adjoints = walk.run(needs, self.adjoints is not None)
            self.carry = tuple(rest[: self.states])
            if i > 0 and self._cut_at(a):
                self.carry = (None,) * self.states
        else:
            frames = self.frames.within(a, b)
            self.crossing.goes = self.frames.start < a
            takes = torch.ones(1, len(frames.start), dtype=torch.bool, device=frames.start.device)
            columns = Columns((frames,), takes, frames.top - frames.start + 1)
            (dx, *rest), adjoints = walk.run_across(needs, self.adjoints is not None, columns, self.crossing)
            self.crossing, self.carry = self.crossing.next(), tuple(rest[: self.states])
        self.source.put(a, b, dx)
        for n, grad in enumerate(rest[self.states :]):
            before = self.weights[n]
            self.weights[n] = grad if before is None or grad is None else before.add_(grad)
        if self.adjoints is not None:
            self.adjoints.append(adjoints)

    def _final(self, a: int, b: int) -> tuple[Tensor | None, ...]:
        """The cotangents of the state behind a segment: its own where a sequence ends there, else what comes back."""
        lengths, device = self.stack.lengths, self.initial[0].device
        carry = (None,) * self.states if self.overlaps else self.carry
        if lengths is None:
            return tuple(self.dfinal) if b == self.T else carry
        ends = ((lengths > a) & (lengths <= b)).to(device)[:, None]
        goes_on = (lengths > b).to(device)[:, None]
        found: list[Tensor | None] = []
        for own, later in zip(self.dfinal, carry, strict=True):
            parts = [t.masked_fill(~m, 0) for t, m in ((own, ends), (later, goes_on)) if t is not None]
            found.append(None if not parts else parts[0] if len(parts) == 1 else parts[0] + parts[1])
        return tuple(found)

    def _cut_at(self, a: int) -> bool:
        """Whether the edge into step a is cut by the policy."""
        every = self.stack.reach.every
        return every is not None and a % every == 0


@dataclass(eq=False)
class Crossing:
    """Adjoints of blocks on their way from a segment to the one before, by layer and by column.

    arriving: for each layer (numbers of the columns, ascending `[n]`; lambda of h `[n, P]`, of c `[n, H]`); empty for
    the last segment. goes: bool, of every column by number, whether its walk goes on before the segment.
    """

    arriving: Sequence[tuple[Tensor, States]]
    goes: Tensor | None = None

    def __post_init__(self) -> None:
        self.leaving: dict[int, list[tuple[Tensor, States]]] = {}  # by layer, one entry per sweep

    def enter(self, k: int, frames: Frames, errors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """The errors of a sweep and, where its columns start, what arrives of them."""
        if not self.arriving:
            return errors
        numbers, carried = self.arriving[k]
        assert frames.number is not None
        place = torch.searchsorted(numbers, frames.number).clamp(max=max(len(numbers) - 1, 0))
        comes = (numbers[place] == frames.number).nonzero()[:, 0] if len(numbers) else place[:0]
        if not len(comes):
            return errors
        device = carried[0].device
        position, rows, columns = ((frames.top - frames.start)[comes], place[comes], comes)
        joined = []
        for error, states in zip(errors, carried, strict=True):
            base = states.new_zeros(frames.R, len(frames.start), states.shape[1]) if error is None else error
            at = (position.to(device), columns.to(device))
            joined.append(base.index_put(at, states[rows.to(device)], accumulate=True))
        return tuple(joined)

    def leave(self, k: int, frames: Frames, initial: States) -> None:
        """Keep what leaves the segment at its first step and goes on."""
        assert frames.number is not None
        assert self.goes is not None
        goes = self.goes[frames.number].nonzero()[:, 0]
        rows = goes.to(initial[0].device)
        self.leaving.setdefault(k, []).append((frames.number[goes], tuple(s[rows] for s in initial)))

    def next(self) -> Crossing:
        """For the segment before."""
        joined = []
        for k in sorted(self.leaving):
            numbers, states = zip(*self.leaving[k], strict=True)
            joined.append((torch.cat(numbers), tuple(torch.cat(s) for s in zip(*states, strict=True))))
        return Crossing(joined)


def states_of(stack: Stack, tensors: Tensors) -> States:
    """The initial states among the inputs."""
    return tuple(given(s) for s in tensors[1 : 1 + stack.cell.states])


def inputs_of(tensors: Tensors, x: Tensor, state: States) -> Tensors:
    """The inputs with another x and other initial states."""
    return (x, *state, *tensors[1 + len(state) :])


def part_of(stack: Stack, a: int, b: int) -> Stack:
    """The stack on the steps a to b-1. A lane that ended before is closed by its resets, and as long as the others."""
    reach, lengths = stack.reach, stack.lengths
    if reach.every is not None and reach.fenced and b - a <= reach.every:
        reach = EVERYTHING
    if lengths is not None:
        lengths = torch.where(lengths <= a, b - a, (lengths - a).clamp(max=b - a))
        lengths = None if bool((lengths == b - a).all()) else lengths
    return replace(
        stack,
        reach=reach,
        memory="gates",
        lengths=lengths,
        masks=tuple(m[a:b] for m in stack.masks),
        xi=tuple(xi[a:b] for xi in stack.xi),
        resets=tuple(r[a:b] for r in stack.resets),
    )
