"""A net with checkpoints: stage 1 keeps some of the states, stages 3 and 4 run one segment again at a time.

A segment is a call of the net on its own steps: its initial state is a checkpoint, and the adjoint that leaves it is
the cotangent of the final state of the segment before. Where blocks overlap, every block that crosses has its own.

Legend: as in `net`; a, b: a segment's first step, and the one after its last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor

from ..kernels import Blocks, Columns, Frames
from ..memory import Checkpoints, Tapes
from ..schedules import Action, Schedule, binomial
from .backward import BackwardPass
from .boundary import own_precision
from .crossing import BetweenLayers, SegmentColumns, block_sweep
from .net import Net, States
from .records import Asked, Grads, Saved, Tensors, given
from .rerun import reversals
from .source import Source, Whole
from .stack import NetProgram, Rerun, Stack

__all__ = ["Checkpointed", "SegmentedPass", "Segments", "cut"]

SEGMENT_BYTES = 2**20
"""Tape that a segment may have in any case, where no length is asked for: each costs about a millisecond of its own."""


@dataclass(eq=False)
class Segments(NetProgram):
    """A net whose steps are divided into segments.

    starts: `[N+1]` the first step of each segment, and T. memory: the policy that asked for them.
    """

    starts: tuple[int, ...]
    schedule: Schedule
    memory: Checkpoints

    def segment_starts(self, T: int) -> tuple[int, ...]:
        return self.starts

    @property
    def longest(self) -> int:
        """Steps of the longest segment."""
        return max(b - a for a, b in pairwise(self.starts))

    def rerun(self, inputs: Tensors, most: int | None = None) -> list[Rerun]:
        return [Rerun(d, a, b) for d in range(self.net.directions) for a, b in self._spans(self.schedule.backward)]

    def _spans(self, actions: Iterable[Action]) -> list[tuple[int, int]]:
        """The steps that actions run."""
        ends = [(a.first, a.last if a.kind == "A" else a.first + 1) for a in actions if a.kind in "AR"]
        return [(self.starts[first], self.starts[last]) for first, last in ends]

    def first_steps(self, n: int, net: Net) -> Self:
        starts = (*(a for a in self.starts if a < n), n)
        return replace(self, net=net, starts=starts, schedule=binomial(len(starts) - 1, len(starts) - 2))


@dataclass(eq=False)
class Checkpointed(Segments):
    """A one-directional net as a program whose tape consists of checkpoints.

    reads_y: whether the backward call is given y, which holds the top layer's h: then h is in no checkpoint.
    """

    reads_y: bool = True

    @classmethod
    def of(cls, net: Net, memory: Checkpoints, inputs: Tensors, *, reads_y: bool = True) -> Checkpointed:
        """The net with checkpoints for a tape. Raises ValueError for a budget in bytes that is too small."""
        return cls(*cut(net, memory, inputs, reads_y=reads_y), memory, reads_y)

    @property
    def reads(self) -> int:
        """How many outputs `backward` reads: y, or none."""
        return int(self.reads_y)

    @torch.no_grad()
    def forward(self, inputs: Tensors, keep: bool) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """See `Program.forward`. Taped: the states at the checkpoints, h then c, `[slots, K, B, .]`, K less the top."""
        source = Whole(given(inputs[0]), None, wants_dx=False)
        finals, tape = self.forward_segments(inputs, source, keep)
        return (given(source.y), *finals), tape

    def tape_values(self, inputs: Tensors) -> int:
        net, weights = self.net, self.net.weights(inputs)
        sizes, K, gates = net.cell.state_sizes(weights[0]), len(weights), net.cell.taped(weights[0])
        one, first = sum(sizes), len(self.schedule.stored_forward)
        later = self.schedule.held - first
        again = K * ((self.longest + 1) * one + self.longest * gates)
        return first * (one * K - sizes[0]) + later * one * K + again  # y holds the top layer's h

    def _stored(self, state: States) -> States:
        """What of a state goes into a checkpoint: all but what y has."""
        h, *c = state
        below = h[:-1] if self.reads_y else h
        return (*((below,) if len(below) else ()), *c)

    def checkpoints(self, tape: tuple[Tensor, ...], y: Tensor | None = None) -> dict[int, Callable[[], States]]:
        """What gives the state at each checkpoint, by segment, from the tape and, where it is read there, y."""
        return {i: partial(self._checkpoint, tape, y, n, i) for n, i in enumerate(self.schedule.stored_forward)}

    def _checkpoint(self, tape: tuple[Tensor, ...], y: Tensor | None, n: int, i: int) -> States:
        kept = [s[n] for s in tape]
        if self.reads_y:
            below = kept.pop(0) if self.net.layers > 1 else None
            top = given(y)[self.starts[i] - 1][None]
            kept.insert(0, top if below is None else torch.cat([below, top]))
        return tuple(kept)

    @torch.no_grad()
    def stream(
        self, inputs: Tensors, source: Source, d_finals: Tensors, needs: tuple[bool, ...]
    ) -> tuple[States, Tensors]:
        """(the final state, the gradient of every input but x) of a call whose x and y are never there as a whole.

        inputs: as for `forward`, x None.
        """
        alone = len(self.starts) == 2 and self.net.lengths is None  # no second run for the final state
        finals, tape = ((), ()) if alone else self.forward_segments(inputs, source, keep=True)
        back = SegmentedPass(self, inputs, source, Asked(d_finals, needs))
        grads = back.run(self.checkpoints(tape), self.schedule.backward)
        return finals or back.final, grads.inputs[1:]

    def forward_segments(self, inputs: Tensors, source: Source, keep: bool) -> tuple[States, States]:
        """Stage 1: the final state; the tape.

        Room for the tape is taken at once: one small tensor after another would break up the memory that segments use.
        """
        state = states_of(self.net, inputs)
        number = {i: n for n, i in enumerate(self.schedule.stored_forward)} if keep else {}
        tape = tuple(s.new_empty(len(number), *s.shape) for s in self._stored(state)) if number else ()
        finals = tuple(torch.zeros_like(s) for s in state)
        for i, (a, b) in enumerate(pairwise(self.starts)):
            for kept, s in zip(tape if i in number else (), self._stored(state), strict=False):
                kept[number[i]] = s
            y, state = self.advance(inputs, source, state, a, b)
            source.see(a, b, y)
            finals = self._ended(finals, state, a, b)
        return finals, tape

    def part(self, a: int, b: int, tape: Tapes) -> Stack:
        """The steps a to b-1 as a program of their own. A lane that ended before has one step, which nobody reads."""
        net = self.net
        lengths = net.lengths
        if lengths is not None:
            lengths = (lengths - a).clamp(min=1, max=b - a)
            lengths = None if bool((lengths == b - a).all()) else lengths
        masks, xi, resets = (tuple(t[a:b] for t in of_steps) for of_steps in (net.masks, net.xi, net.resets))
        return Stack(replace(net, lengths=lengths, masks=masks, xi=xi, resets=resets), tape)

    def part_inputs(self, inputs: Tensors, x: Tensor, state: States, a: int, b: int) -> Tensors:
        """The inputs of that program: x and the initial states as given."""
        restart = [r if r is None or r.dim() == 3 else r[a:b] for r in inputs[self.net.inputs :]]
        return (x, *state, *inputs[1 + len(state) : self.net.inputs], *restart)

    def advance(self, inputs: Tensors, source: Source, state: States, a: int, b: int) -> tuple[Tensor, States]:
        """(the output of the steps a to b-1, the state after them), from the state before them."""
        own = self.part_inputs(inputs, source.x(a, b), state, a, b)
        (y, *after), _ = self.part(a, b, "states").forward(own, keep=False)
        return y, tuple(after)

    def _ended(self, finals: States, state: States, a: int, b: int) -> States:
        """The final states so far: those of the lanes whose sequence has ended between a and b."""
        lengths = self.net.lengths
        if lengths is None:
            return state
        ends = ((lengths > a) & (lengths <= b)).to(state[0].device)[:, None]
        return tuple(torch.where(ends, now, before) for now, before in zip(state, finals, strict=True))

    def backward(self, saved: Saved, asked: Asked) -> Grads:
        """See `Program.backward`. A gradient that is to be differentiated again is that of the net without segments."""
        if saved.tape is None:
            return Stack(self.net, "states").backward(saved, asked)
        dy, *d_finals = asked.cotangents
        source = Whole(given(saved.inputs[0]), dy, wants_dx=asked.needs[0])
        back = SegmentedPass(self, saved.inputs, source, asked._replace(cotangents=tuple(d_finals)))
        found = back.run(self.checkpoints(saved.tape, *saved.outputs[: self.reads]), self.schedule.backward)
        return Grads((source.dx, *found.inputs[1:]), found.adjoints)


class SegmentedPass:
    """One backward call of a one-directional net: segments from the last to the first, gradients summed over them.

    asked: its cotangents are those of the final state. group: the columns to sweep, where they are some of the policy's
    alone; between: the errors that these exchange with the layers above and below.
    """

    def __init__(
        self,
        program: Checkpointed,
        inputs: Tensors,
        source: Source,
        asked: Asked,
        group: Frames | None = None,
        between: BetweenLayers | None = None,
    ) -> None:
        self.program, self.inputs, self.asked, self.source, self.between = program, inputs, asked, source, between
        self.net, self.starts = net, starts = program.net, program.starts
        self.initial = states_of(net, inputs)
        self.T, self.states = starts[-1], net.cell.states
        self.columns = Blocks(net.reach, net.lengths, self.T, self.initial[0].shape[1], group)
        self.sums: list[Tensor | None] = [None] * (len(inputs) - 1 - self.states)
        self.before: States = ()  # the state before the segment that is swept next
        self.final: States = ()  # the state after the segment that was run last
        self.adjoints: list[Tensor] = []

    def run(self, stored: Mapping[int, Callable[[], States]], actions: Iterable[Action]) -> Grads:
        """All gradients, that of x left out, which the source has; the adjoints `[T, B, P]`.

        stored: what gives a state of the tape, by segment. actions: of `schedules`, none on the way forward.
        """
        finals = self.asked.cotangents
        leaves = tuple([None if f is None else f[k] for k in range(len(self.initial[0])) for f in finals])
        with own_precision(self.initial[0].device):
            first = block_sweep(self.columns, self._segments(stored, actions), leaves, self._sweep)
        of_state = [[g for g in first[i :: self.states] if g is not None] for i in range(self.states)]
        initial = [torch.stack(grads) if grads else None for grads in of_state]
        return Grads((None, *initial, *self.sums), self.adjoints)

    def _segments(
        self, stored: Mapping[int, Callable[[], States]], actions: Iterable[Action]
    ) -> Iterator[tuple[int, int]]:
        # The state before the part is a field of its own, not `self`.
        for a, b, self.before in reversals(self.starts, actions, self.initial, stored, self._advance):  # noqa: B020
            yield a, b

    def _advance(self, a: int, b: int, state: States) -> States:
        """The state after the steps a to b-1."""
        return self.program.advance(self.inputs, self.source, state, a, b)[1]

    def _sweep(self, a: int, b: int, part: Frames, arriving: Tensors) -> Iterator[tuple[Frames, Tensors]]:
        """Run a segment again with its tape, then sweep columns through it: see `block_sweep`."""
        state, self.before = self.before, ()
        if part.number is not None and not len(part.start):
            return  # between the columns of two blocks
        S, net, program = self.states, self.net, self.program.part(a, b, "gates")
        inputs = self.program.part_inputs(self.inputs, self.source.x(a, b), state, a, b)
        outputs, tape = program.forward(inputs, keep=True)
        self.final = outputs[1:]
        columns: Frames | Columns = part
        if self.between is not None:
            columns = self.between.columns(part)
        elif net.by_block(net.reach):
            columns = Columns.alone(part)
        asked = self.asked._replace(cotangents=(self.source.error(a, b, outputs[0]),))
        by_layer = [arriving[k : k + S] for k in range(0, len(arriving), S)]
        segment = SegmentColumns(columns, by_layer, a > 0 or any(asked.needs[1 : 1 + S]), self.between)
        kept = program.kept(Saved(inputs, outputs, tape))
        back = BackwardPass(program.net, inputs, kept, asked, segment=segment)
        yield from back.groups_swept()
        found = back.grads()
        dx, *rest = found.inputs
        self.source.put(a, b, dx)
        self._add(a, b, rest[S:], found.adjoints)

    def _add(self, a: int, b: int, grads: Sequence[Tensor | None], adjoints: Sequence[Tensor]) -> None:
        """What a segment gives to the weights, and to the state that resets restart from; its adjoints."""
        for n, grad in enumerate(grads):
            before, of = self.sums[n], given(self.inputs[1 + self.states + n])
            if grad is not None and grad.dim() == 4:  # of the state that resets at each step restart from
                self.sums[n] = before = torch.zeros_like(of) if before is None else before
                before[a:b] = grad
            else:
                self.sums[n] = grad if before is None or grad is None else before.add_(grad)
        if self.asked.adjoints:
            self.adjoints = self.adjoints or [piece.new_zeros(self.T, *piece.shape[1:]) for piece in adjoints]
            for whole, piece in zip(self.adjoints, adjoints, strict=True):
                whole[a:b] = piece


def states_of(net: Net, inputs: Tensors) -> States:
    """The initial states among the inputs."""
    return tuple(given(s) for s in inputs[1 : 1 + net.cell.states])


def cut(
    net: Net, memory: Checkpoints, inputs: Tensors, *, reads_y: bool = True
) -> tuple[Net, tuple[int, ...], Schedule]:
    """(the net, its blocks said as simply as they can be; the first step of each segment, and T; the schedule).

    A bidirectional net runs a layer and direction at a time, and keeps the outputs between layers.
    """
    x = given(inputs[0])
    T, B, _ = x.shape
    net = replace(net, reach=net.blocks(T, B))
    row, weights = max(B, 1) * x.element_size(), net.weights(inputs)
    P, one = net.cell.state_sizes(weights[0])[0], sum(net.cell.state_sizes(weights[0]))
    first = one * len(weights)  # a checkpoint of the way forward; later: of the way back
    if net.directions == 2:
        later, tape, between = one, one + net.cell.taped(weights[0]), T * 2 * P * (net.layers - 1)
    else:
        later, tape, between = first, first + sum(map(net.cell.taped, weights)), 0
    if reads_y and memory.bytes is not None:  # y has the top layer's h; else segments are as long as if it had not
        first -= P
    first, later, tape, between = (values * row for values in (first, later, tape, between))
    steps = memory.cut(T, first, tape, between, later).steps
    if memory == Checkpoints():
        steps = max(steps, SEGMENT_BYTES // tape)
    starts = net.reach.segment_starts(T, steps)
    longest = max(b - a for a, b in pairwise(starts))
    slots = memory.slots(len(starts) - 1, longest, first, tape, between, later)
    return net, starts, binomial(len(starts) - 1, slots)
