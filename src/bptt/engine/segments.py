"""A stack of layers with checkpoints: stage 1 keeps a state now and then, stages 3 and 4 run a segment at a time again.

A segment is a call of the stack on its own steps: its initial state is a checkpoint, and the adjoint that leaves it is
the cotangent of the final state of the segment before. Where blocks overlap, every block that crosses brings its own.

Legend: as in `stack`; a, b: a segment's first step, and the one behind its last.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from ..memory import Checkpoints
from ..policies import Reach
from ..schedules import Schedule, binomial
from .boundary import Tensors, given
from .reversal import Back, Source, States, Whole, inputs_of, part_of, states_of
from .stack import Stack

__all__ = ["BothWays", "Checkpointed", "checkpointed"]


def checkpointed(
    stack: Stack, memory: Checkpoints, tensors: Tensors, *, reads_y: bool = True
) -> Checkpointed | BothWays:
    """The same computation with checkpoints for a tape. reads_y: as in `Checkpointed`.

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
    return Checkpointed(stack, *_cut(stack, memory, tensors, reads_y), reads_y)


@dataclass(frozen=True, eq=False)
class Checkpointed:
    """A one-directional stack as a program whose tape are checkpoints.

    edges: `[N+1]` the first step of each segment, and T. reads_y: whether the backward call is given y, where the top
    layer's h stands: then it is in no checkpoint.
    """

    stack: Stack
    edges: tuple[int, ...]
    schedule: Schedule
    reads_y: bool = True

    @property
    def outputs(self) -> int:
        """How many outputs `forward` has."""
        return self.stack.outputs

    @torch.no_grad()
    def forward(self, tensors: Tensors, keep: bool) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """See `Program.forward`. Taped: the states at the checkpoints, h then c, `[slots, K, B, .]`, K less the top."""
        source = Whole(given(tensors[0]), None, wants_dx=False)
        finals, tape = self._walk(tensors, source, keep)
        return (given(source.y), *finals), tape

    def _stored(self, state: States) -> States:
        """What of a state goes into a checkpoint: all but what y has."""
        h, *c = state
        below = h[:-1] if self.reads_y else h
        return (*((below,) if len(below) else ()), *c)

    def _checkpoints(self, outputs: tuple[Tensor, ...], tape: tuple[Tensor, ...]) -> list[States]:
        """The states at the checkpoints, from the tape and y."""
        found = []
        for n, i in enumerate(self.schedule.stored_forward):
            kept = [s[n] for s in tape]
            if self.reads_y:
                below = kept.pop(0) if self.stack.layers > 1 else None
                top = outputs[0][self.edges[i] - 1][None]
                kept.insert(0, top if below is None else torch.cat([below, top]))
            found.append(tuple(kept))
        return found

    @torch.no_grad()
    def stream(
        self, tensors: Tensors, source: Source, d_finals: Tensors, needs: tuple[bool, ...]
    ) -> tuple[States, Tensors]:
        """(the final state, the gradient of every input but x) of a call whose x and y are never there as a whole.

        tensors: as for `forward`, x None.
        """
        finals, tape = self._walk(tensors, source, keep=True)
        back = Back(self.stack, self.edges, self.schedule, tensors, source, d_finals, needs, adjoints=False)
        return finals, back.run(self._checkpoints((), tape))[0][1:]

    def _walk(self, tensors: Tensors, source: Source, keep: bool) -> tuple[States, States]:
        """Stage 1: the final state; the tape.

        Room for the tape is taken at once: one small tensor after another would break up the memory that segments use.
        """
        state = states_of(self.stack, tensors)
        number = {i: n for n, i in enumerate(self.schedule.stored_forward)} if keep else {}
        tape = tuple(s.new_empty(len(number), *s.shape) for s in self._stored(state)) if number else ()
        finals = tuple(torch.zeros_like(s) for s in state)
        for i, (a, b) in enumerate(pairwise(self.edges)):
            for kept, s in zip(tape if i in number else (), self._stored(state), strict=False):
                kept[number[i]] = s
            (y, *after), _ = part_of(self.stack, a, b).forward(inputs_of(tensors, source.x(a, b), state), keep=False)
            source.see(a, b, y)
            state = tuple(after)
            finals = self._ended(finals, state, a, b)
        return finals, tape

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
        source = Whole(given(tensors[0]), cotangents[0], wants_dx=needs[0])
        back = Back(self.stack, self.edges, self.schedule, tensors, source, cotangents[1:], needs, want_adjoints)
        grads, adjoints = back.run(self._checkpoints(outputs, tape))
        return (source.dx, *grads[1:]), adjoints


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
                program, inputs = self.one_way(layer, d, stack.masked(y, layer), tensors)
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
                program, inputs = self.one_way(layer, d, below, tensors)
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

    def one_way(self, layer: int, d: int, below: Tensor, tensors: Tensors) -> tuple[Checkpointed, Tensors]:
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
        return Checkpointed(alone, *_cut(alone, self.memory, inputs, reads_y=False), reads_y=False), inputs


def _cut(stack: Stack, memory: Checkpoints, tensors: Tensors, reads_y: bool) -> tuple[tuple[int, ...], Schedule]:
    """The first step of each segment, T, and the schedule over them."""
    x, reach = given(tensors[0]), stack.reach
    T, B, _ = x.shape
    state = tape = 0
    for w in stack.weights(tensors):
        GH, P = w.hh.shape
        one = P + (GH // stack.cell.gates_per_unit if stack.cell.states == 2 else 0)
        state, tape = state + one, tape + one + stack.cell.taped(w)
    if reads_y and state > P:
        state -= P
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
