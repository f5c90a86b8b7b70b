"""The way back through a call with checkpoints: one segment after the other, from the last to the first.

Legend: as in `stack`; a, b: a segment's first step, and the one behind its last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from ..cells import Weights
from ..kernels import Blocks, Columns, Frames, product
from ..policies import EVERYTHING
from ..schedules import Action
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
        tensors: Tensors,
        source: Source,
        d_finals: Tensors,
        needs: tuple[bool, ...],
        adjoints: bool,
        crossing: Crossing | None = None,
    ) -> None:
        self.stack, self.edges, self.tensors, self.needs = stack, edges, tensors, needs
        self.source, self.dfinal = source, d_finals
        self.initial = states_of(stack, tensors)
        self.T, self.B = edges[-1], self.initial[0].shape[1]
        self.states = stack.cell.states
        if crossing is None and stack.reach.every is not None and not stack.reach.fenced:
            crossing = Crossing(Blocks(stack.reach, stack.lengths, self.T, self.B))
        self.crossing = crossing
        self.carry: tuple[Tensor | None, ...] = (None,) * self.states
        self.sums: list[Tensor | None] = [None] * (len(tensors) - 1 - self.states)
        self.kept: dict[int, States] = {}  # states stored on the way back, by segment, and the initial one
        self.behind: States = ()  # the state behind the segment that was run last
        self.wants_adjoints = adjoints
        self.adjoints: list[Tensor] = []

    def run(
        self, stored: Mapping[int, Callable[[], States]], actions: Iterable[Action]
    ) -> tuple[Tensors, list[Tensor]]:
        """All gradients, in the order of the inputs, that of x left out; the adjoints `[T, B, P]`.

        stored: what gives a state of the tape, by segment. actions: of `schedules`, none on the way forward.
        """
        self.kept = {0: self.initial}

        def before(i: int) -> States:
            return state if at == i else self.kept[i] if i in self.kept else stored[i]()

        at, state = len(self.edges), self.initial  # the state at hand: none yet
        for action in actions:
            if action.kind == "S":
                self.kept[action.first] = state
            elif action.kind == "D":
                self.kept.pop(action.first, None)
            elif action.kind == "A":
                state = before(action.first)
                for i in range(action.first, action.last):
                    state = self._advance(i, state)
                at = action.last
            else:
                self._reverse(action.first, before(action.first))
        initial = [g if need else None for g, need in zip(self.carry, self.needs[1:], strict=False)]
        return (None, *initial, *self.sums), self.adjoints

    def _advance(self, i: int, state: States) -> States:
        """The state behind segment i."""
        a, b = self.edges[i : i + 2]
        inputs = inputs_of(self.stack, self.tensors, self.source.x(a, b), state, a, b)
        return part_of(self.stack, a, b).forward(inputs, keep=False)[0][1:]

    def _reverse(self, i: int, state: States) -> None:
        """Run segment i again with its tape, and walk it back."""
        a, b = self.edges[i : i + 2]
        columns = None if self.crossing is None else self.crossing.within(a, b)
        if columns is not None and not len(columns.span):
            return  # between the columns of two directions
        part = part_of(self.stack, a, b)
        inputs = inputs_of(self.stack, self.tensors, self.source.x(a, b), state, a, b)
        outputs, tape = part.forward(inputs, keep=True)
        self.behind = outputs[1:]
        dy = self.source.error(a, b, outputs[0])
        needs = (self.needs[0], *(True,) * self.states, *self.needs[1 + self.states :])
        walk = Walk(part, inputs, outputs, tape, (dy, *self._final(a, b)))
        if self.crossing is None or columns is None:
            (dx, *rest), adjoints = walk.run(needs, self.wants_adjoints)
        else:
            (dx, *rest), adjoints = walk.run_across(needs, self.wants_adjoints, columns, self.crossing)
        cut = i > 0 and (self.crossing is not None or self._cut_at(a))  # a column's adjoint crosses by itself
        self.carry = (None,) * self.states if cut else tuple(rest[: self.states])
        self.source.put(a, b, dx)
        for n, grad in enumerate(rest[self.states :]):
            before, of = self.sums[n], given(self.tensors[1 + self.states + n])
            if grad is not None and grad.dim() == 4:  # of the state that resets at each step restart from
                self.sums[n] = before = torch.zeros_like(of) if before is None else before
                before[a:b] = grad
            else:
                self.sums[n] = grad if before is None or grad is None else before.add_(grad)
        if self.wants_adjoints:
            self.adjoints = self.adjoints or [piece.new_zeros(self.T, *piece.shape[1:]) for piece in adjoints]
            for whole, piece in zip(self.adjoints, adjoints, strict=True):
                whole[a:b] = piece

    def _final(self, a: int, b: int) -> tuple[Tensor | None, ...]:
        """The cotangents of the state behind a segment: its own where a sequence ends there, else what comes back."""
        lengths, carry, device = self.stack.lengths, self.carry, self.initial[0].device
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


class Crossing:
    """The columns of overlapping blocks, and their adjoints on the way from a segment to the one before.

    columns: of the whole call, or of some blocks, one-directional. above: `[R, N, P]` errors that come from the layer
    above, by position in the columns. below: `[R, N, F]`, where what goes to the layer below is written, by position;
    None where both are sums over columns, as at the two ends of a stack.
    """

    def __init__(self, columns: Columns | Blocks, above: Tensor | None = None, below: Tensor | None = None) -> None:
        self.columns, self.above, self.below = columns, above, below
        # By layer: numbers of the columns, ascending `[n]`; lambda of h `[n, P]`, of c `[n, H]`.
        self.arriving: dict[int, tuple[Tensor, States]] = {}
        self.leaving: dict[int, list[tuple[Tensor, States]]] = {}  # the same, an entry per sweep

    @property
    def sums(self) -> bool:
        """Whether errors come and go as sums over columns, and every column has its losses."""
        all_take = isinstance(self.columns, Blocks) or bool(self.columns.takes.all())
        return self.above is None and self.below is None and all_take

    def within(self, a: int, b: int) -> Columns:
        """The columns of the segment of the steps a to b-1, the one before the last asked for."""
        self.arriving = {}
        for k, swept in self.leaving.items():
            numbers, states = zip(*swept, strict=True)
            ascending, order = torch.cat(numbers).sort()
            rows = order.to(states[0][0].device)
            self.arriving[k] = ascending, tuple(torch.cat(s)[rows] for s in zip(*states, strict=True))
        self.leaving = {}
        return self.columns.within(a, b)

    def enter(
        self, k: int, part: Frames, error: Tensor | None, finals: tuple[Tensor | None, ...]
    ) -> tuple[Frames, Tensor | None, tuple[Tensor | None, ...]]:
        """(frames, errors, what arrives) of a sweep, with what comes from above and, from behind, at columns' tops."""
        if self.above is not None:
            position, number = self._positions(part, self.above)
            inside = (part.steps() <= part.top)[..., None].to(self.above.device)
            above = self.above[position.clamp(max=len(self.above) - 1), number].masked_fill(~inside, 0)
            error = above if error is None else error + above
        comes, rows = self.comes(k, part)
        if not len(rows):
            return part, error, finals
        arriving = tuple(
            torch.cat([carried.new_zeros(part.B, carried.shape[1]) if final is None else final, carried])
            for final, carried in zip(finals, self.arriving[k][1], strict=True)
        )
        arrives = part.arrives.masked_scatter(comes, part.B + rows)
        return replace(part, arrives=arrives), error, arriving

    def comes(self, k: int, part: Frames) -> tuple[Tensor, Tensor]:
        """(bool `[N]`, which columns of the part come from behind; where each of these is among those that arrive)."""
        assert part.number is not None
        numbers = self.arriving[k][0] if k in self.arriving else part.number[:0]
        if not len(numbers):
            return torch.zeros_like(part.number, dtype=torch.bool), numbers
        place = torch.searchsorted(numbers, part.number).clamp(max=len(numbers) - 1)
        comes = numbers[place] == part.number
        return comes, place[comes]

    def leave(self, k: int, part: Frames, states: States) -> None:
        """Keep what leaves the segment at its first step and goes on. states: h `[N, P]`, c `[N, H]` by column."""
        assert part.number is not None
        assert part.offset is not None
        goes = (part.offset > 0).nonzero()[:, 0]
        rows = goes.to(states[0].device)
        self.leaving.setdefault(k, []).append((part.number[goes], tuple(s[rows] for s in states)))

    def descend(self, part: Frames, da: Tensor, w: Weights) -> None:
        """Write what goes to the layer below. da: `[R, N, G*H]`."""
        if self.below is None:
            return
        position, number = self._positions(part, self.below)
        r, n = (part.steps() <= part.top).nonzero(as_tuple=True)
        r, n = r.to(position.device), n.to(position.device)
        self.below[position[r, n], number[n]] = product(da[r, n], w.ih.t())

    @staticmethod
    def _positions(part: Frames, by_position: Tensor) -> tuple[Tensor, Tensor]:
        """(position `[R, N]`, number `[N]`) in the columns of the whole call of each position of the part."""
        assert part.offset is not None
        assert part.number is not None
        r = torch.arange(part.R, device=part.offset.device)[:, None]
        return (part.offset + r).to(by_position.device), part.number.to(by_position.device)


def states_of(stack: Stack, tensors: Tensors) -> States:
    """The initial states among the inputs."""
    return tuple(given(s) for s in tensors[1 : 1 + stack.cell.states])


def inputs_of(stack: Stack, tensors: Tensors, x: Tensor, state: States, a: int, b: int) -> Tensors:
    """The inputs of the steps a to b-1: x and the initial states as given."""
    restart = [r if r is None or r.dim() == 3 else r[a:b] for r in tensors[stack.inputs :]]
    return (x, *state, *tensors[1 + len(state) : stack.inputs], *restart)


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
