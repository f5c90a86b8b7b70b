"""A stack of layers with checkpoints: stage 1 keeps a state now and then, stages 3 and 4 run a segment at a time again.

A segment is a call of the stack on its own steps: its initial state is a checkpoint, and the adjoint that leaves it is
the cotangent of the final state of the segment before. Where blocks overlap, every block that crosses brings its own.

Legend: as in `stack`; a, b: a segment's first step, and the one behind its last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..kernels import Columns, Frames
from ..memory import Checkpoints
from ..policies import EVERYTHING, Reach
from ..schedules import Action, Schedule, binomial
from .boundary import Tensors, given
from .stack import Stack
from .walk import Walk

__all__ = ["Checkpointed", "checkpointed"]

States = tuple[Tensor, ...]
"""h `[K, B, P]` and, for a state (h, c), c `[K, B, H]`, of every layer and direction."""


def checkpointed(stack: Stack, memory: Checkpoints, tensors: Tensors) -> Checkpointed | BothWays:
    """The same computation with checkpoints for a tape.

    Raises ValueError for a budget in bytes that is too small, and for several bidirectional layers under blocks that
    overlap: there a block walks both ways at once.
    """
    if stack.directions == 2:
        reach = stack.reach
        if stack.layers > 1 and reach.every is not None and not reach.fenced:
            raise ValueError(
                "memory must be 'auto', 'gates' or 'states' for several bidirectional layers under blocks that "
                f"overlap: got {memory}"
            )
        return BothWays(stack, memory)
    return Checkpointed(stack, *_cut(stack, memory, tensors))


@dataclass(frozen=True, eq=False)
class Checkpointed:
    """A one-directional stack as a program whose tape are checkpoints.

    edges: `[N+1]` the first step of each segment, and T.
    """

    stack: Stack
    edges: tuple[int, ...]
    schedule: Schedule

    @property
    def outputs(self) -> int:
        """How many outputs `forward` has."""
        return self.stack.outputs

    @torch.no_grad()
    def forward(self, tensors: Tensors, keep: bool) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """See `Program.forward`. Taped: the states at the checkpoints, h then c, `[slots, K, B, .]`."""
        x = given(tensors[0])
        stored, wanted = [], set(self.schedule.stored_forward) if keep else set()
        state = _states(self.stack, tensors)
        finals = tuple(torch.zeros_like(s) for s in state)
        y = None
        for i, (a, b) in enumerate(zip(self.edges, self.edges[1:], strict=False)):
            if i in wanted:
                stored.append(state)
            part = _part(self.stack, a, b)
            (ys, *after), _ = part.forward(_inputs(tensors, x[a:b], state), keep=False)
            y = ys.new_empty(len(x), *ys.shape[1:]) if y is None else y
            y[a:b] = ys
            state = tuple(after)
            finals = self._ended(finals, state, a, b)
        assert y is not None
        return (y, *finals), tuple(map(torch.stack, zip(*stored, strict=True))) if stored else ()

    def _ended(self, finals: States, state: States, a: int, b: int) -> States:
        """The final states so far: those of the lanes whose sequence has ended between a and b."""
        lengths = self.stack.lengths
        if lengths is None:
            return state
        ends = ((lengths > a) & (lengths <= b)).to(state[0].device)[:, None]
        return tuple(torch.where(ends, now, before) for now, before in zip(state, finals, strict=True))

    def backward(
        self,
        tensors: Tensors,
        outputs: tuple[Tensor, ...],
        tape: tuple[Tensor, ...] | None,
        cotangents: Tensors,
        needs: tuple[bool, ...],
    ) -> Tensors:
        """See `Program.backward`. A gradient that is to be differentiated again is that of the stack without them."""
        return self.gradients(tensors, outputs, tape, cotangents, needs, want_adjoints=False)[0]

    def gradients(
        self,
        tensors: Tensors,
        outputs: tuple[Tensor, ...],
        tape: tuple[Tensor, ...] | None,
        cotangents: Tensors,
        needs: tuple[bool, ...],
        want_adjoints: bool,
    ) -> tuple[Tensors, list[Tensor]]:
        """`backward`, and lambda_t of h for every layer `[T, B, P]`."""
        if tape is None:
            return self.stack.gradients(tensors, outputs, tape, cotangents, needs, want_adjoints)
        back = _Back(self, tensors, cotangents, needs, want_adjoints)
        stored = {0: _states(self.stack, tensors)}
        stored |= {i: tuple(s[n] for s in tape) for n, i in enumerate(self.schedule.stored_forward)}
        at, state = len(self.edges), stored[0]  # the state at hand: none yet
        # The advance that led to the last segment was the forward pass's, which kept no state but the stored ones.
        last = len(self.edges) - 2
        lead = Action("A", max(stored), last) if max(stored) < last else None
        for action in (*((lead,) if lead else ()), *self.schedule.backward):
            if action.kind == "S":
                stored[action.first] = state
            elif action.kind == "D":
                del stored[action.first]
            elif action.kind == "A":
                state = state if at == action.first else stored[action.first]
                for i in range(action.first, action.last):
                    state = back.advance(i, state)
                at = action.last
            else:
                back.reverse(action.first, state if at == action.first else stored[action.first])
        return back.grads()


class _Back:
    """One backward call: segments reversed from the last to the first, sums over them."""

    def __init__(
        self, program: Checkpointed, tensors: Tensors, cotangents: Tensors, needs: tuple[bool, ...], adjoints: bool
    ) -> None:
        self.program, self.stack, self.tensors, self.needs = program, program.stack, tensors, needs
        self.dy, *self.dfinal = cotangents
        self.x = given(tensors[0])
        T, B, _ = self.x.shape
        self.states = self.stack.cell.states
        reach = self.stack.reach
        self.overlaps = reach.every is not None and not reach.fenced and B > 0
        self.frames = Frames.of(reach, self.stack.lengths, T, B) if self.overlaps else None
        self.crossing = Crossing(())
        self.carry: tuple[Tensor | None, ...] = (None,) * self.states
        self.dx = torch.empty_like(self.x) if needs[0] else None
        self.weights: list[Tensor | None] = [None] * (len(tensors) - 1 - self.states)
        self.adjoints: list[list[Tensor]] | None = [] if adjoints else None

    def advance(self, i: int, state: States) -> States:
        """The state behind segment i."""
        a, b = self.program.edges[i : i + 2]
        return _part(self.stack, a, b).forward(_inputs(self.tensors, self.x[a:b], state), keep=False)[0][1:]

    def reverse(self, i: int, state: States) -> None:
        """Run segment i again with its tape, and walk it back."""
        a, b = self.program.edges[i : i + 2]
        part = _part(self.stack, a, b)
        inputs = _inputs(self.tensors, self.x[a:b], state)
        outputs, tape = part.forward(inputs, keep=True)
        dy = None if self.dy is None else self.dy[a:b]
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
        if self.dx is not None:
            self.dx[a:b] = given(dx)
        for n, grad in enumerate(rest[self.states :]):
            before = self.weights[n]
            self.weights[n] = grad if before is None or grad is None else before.add_(grad)
        if self.adjoints is not None:
            self.adjoints.append(adjoints)

    def _final(self, a: int, b: int) -> tuple[Tensor | None, ...]:
        """The cotangents of the state behind a segment: its own where a sequence ends there, else what comes back."""
        lengths, T = self.stack.lengths, len(self.x)
        carry = (None,) * self.states if self.overlaps else self.carry
        if lengths is None:
            return tuple(self.dfinal) if b == T else carry
        ends = ((lengths > a) & (lengths <= b)).to(self.x.device)[:, None]
        goes_on = (lengths > b).to(self.x.device)[:, None]
        found: list[Tensor | None] = []
        for own, later in zip(self.dfinal, carry, strict=True):
            parts = [t.masked_fill(~m, 0) for t, m in ((own, ends), (later, goes_on)) if t is not None]
            found.append(None if not parts else parts[0] if len(parts) == 1 else parts[0] + parts[1])
        return tuple(found)

    def _cut_at(self, a: int) -> bool:
        """Whether the edge into step a is cut by the policy."""
        every = self.stack.reach.every
        return every is not None and a % every == 0

    def grads(self) -> tuple[Tensors, list[Tensor]]:
        """All gradients, in the order of the inputs; the adjoints."""
        initial = [g if need else None for g, need in zip(self.carry, self.needs[1:], strict=False)]
        pieces = [] if self.adjoints is None else self.adjoints[::-1]
        return (self.dx, *initial, *self.weights), [torch.cat(parts) for parts in zip(*pieces, strict=True)]


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


@dataclass(frozen=True, eq=False)
class BothWays:
    """A bidirectional stack: every layer and direction a program of its own, since their segments lie in other places.

    Taped besides the checkpoints: the outputs of the layers below the top.
    """

    stack: Stack
    memory: Checkpoints

    @property
    def outputs(self) -> int:
        """How many outputs `forward` has."""
        return self.stack.outputs

    @torch.no_grad()
    def forward(self, tensors: Tensors, keep: bool) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """See `Program.forward`."""
        stack, y = self.stack, given(tensors[0])
        between: list[Tensor] = []
        tape: list[Tensor] = []
        finals: list[list[Tensor]] = []
        for layer in range(stack.layers):
            halves = []
            for d in (0, 1):
                program, inputs = self._one_way(layer, d, stack.masked(y, layer), tensors)
                (ys, *final), kept = program.forward(inputs, keep)
                halves.append(stack.turn(ys, d))
                finals.append(final)
                tape += kept
            y = torch.cat(halves, -1)
            if keep and layer < stack.layers - 1:
                between.append(y)
        return (y, *map(torch.cat, zip(*finals, strict=True))), (*between, *tape)

    def backward(
        self,
        tensors: Tensors,
        outputs: tuple[Tensor, ...],
        tape: tuple[Tensor, ...] | None,
        cotangents: Tensors,
        needs: tuple[bool, ...],
    ) -> Tensors:
        """See `Program.backward`."""
        return self.gradients(tensors, outputs, tape, cotangents, needs, want_adjoints=False)[0]

    def gradients(
        self,
        tensors: Tensors,
        outputs: tuple[Tensor, ...],
        tape: tuple[Tensor, ...] | None,
        cotangents: Tensors,
        needs: tuple[bool, ...],
        want_adjoints: bool,
    ) -> tuple[Tensors, list[Tensor]]:
        """`backward`, and lambda_t of h for every layer and direction, in its own time."""
        stack, states, L = self.stack, self.stack.cell.states, self.stack.layers
        if tape is None:
            return stack.gradients(tensors, outputs, tape, cotangents, needs, want_adjoints)
        between, rest = tape[: L - 1], list(tape[L - 1 :])
        error, *d_finals = cotangents
        initial: list[Tensors] = [()] * (2 * L)
        weights: list[Tensors] = [()] * (2 * L)
        adjoints: list[list[Tensor]] = [[]] * (2 * L)
        for layer in reversed(range(L)):
            below = stack.masked(between[layer - 1], layer) if layer else given(tensors[0])
            dx: Tensor | None = None
            for d in (1, 0):
                k = 2 * layer + d
                program, inputs = self._one_way(layer, d, below, tensors)
                count = states if program.schedule.stored_forward else 0
                kept = tuple(rest[len(rest) - count :])
                del rest[len(rest) - count :]
                half = None if error is None else stack.turn(stack.half(error, d), d)
                own = (half, *(None if d_final is None else d_final[k : k + 1] for d_final in d_finals))
                first = 1 + states + k * stack.per_layer
                wanted = (layer > 0 or needs[0], *needs[1 : 1 + states], *needs[first : first + stack.per_layer])
                (part, *grads), adjoints[k] = program.gradients(inputs, (), kept, own, wanted, want_adjoints)
                initial[k], weights[k] = tuple(grads[:states]), tuple(grads[states:])
                if part is not None:
                    turned = stack.turn(part, d)
                    dx = turned if dx is None else dx + turned
            error = dx if dx is None or not stack.masks or layer == 0 else dx * stack.masks[layer - 1]
        d_initial = [
            torch.cat([given(grad) for grad in grads]) if need else None
            for grads, need in zip(zip(*initial, strict=True), needs[1:], strict=False)
        ]
        return (error, *d_initial, *(g for grads in weights for g in grads)), [a for own in adjoints for a in own]

    def _one_way(self, layer: int, d: int, below: Tensor, tensors: Tensors) -> tuple[Checkpointed, Tensors]:
        """Layer and direction as a program of its own, and its inputs, in its own time."""
        stack, k, states = self.stack, 2 * layer + d, self.stack.cell.states
        first = 1 + states + k * stack.per_layer
        alone = replace(
            stack,
            layers=1,
            directions=1,
            masks=(),
            xi=stack.xi[k : k + 1],
            resets=stack.resets[d : d + 1],
        )
        initial = [given(s)[k : k + 1] for s in tensors[1 : 1 + states]]
        inputs = (stack.turn(below, d), *initial, *tensors[first : first + stack.per_layer])
        return Checkpointed(alone, *_cut(alone, self.memory, inputs)), inputs


def _cut(stack: Stack, memory: Checkpoints, tensors: Tensors) -> tuple[tuple[int, ...], Schedule]:
    """The first step of each segment, T, and the schedule over them."""
    x, reach = given(tensors[0]), stack.reach
    T, B, _ = x.shape
    state = tape = 0
    for w in stack.weights(tensors):
        GH, P = w.hh.shape
        one = P + (GH // stack.cell.gates_per_unit if stack.cell.states == 2 else 0)
        state, tape = state + one, tape + one + stack.cell.taped(w)
    row = max(B, 1) * x.element_size()
    cut = memory.cut(T, state * row, tape * row)
    edges = _edges(T, cut.steps, reach)
    return edges, binomial(len(edges) - 1, min(cut.slots, len(edges) - 2))


def _edges(T: int, steps: int, reach: Reach) -> tuple[int, ...]:
    """Where segments of about so many steps begin, and T: whole chunks, or parts of one, where a policy cuts chunks."""
    chunk = reach.every if reach.fenced and reach.every is not None else T
    if chunk <= steps < T:
        steps, chunk = steps // chunk * chunk, T
    begins = [a for c in range(0, T, chunk) for a in range(c, min(c + chunk, T), steps)]
    return (*begins, T)


def _states(stack: Stack, tensors: Tensors) -> States:
    return tuple(given(s) for s in tensors[1 : 1 + stack.cell.states])


def _inputs(tensors: Tensors, x: Tensor, state: States) -> Tensors:
    return (x, *state, *tensors[1 + len(state) :])


def _part(stack: Stack, a: int, b: int) -> Stack:
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
