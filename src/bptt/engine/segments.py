"""A stack of layers with checkpoints: stage 1 keeps a state now and then, stages 3 and 4 run a segment at a time again.

A segment is a call of the stack on its own steps: its initial state is a checkpoint, and the adjoint that leaves it is
the cotangent of the final state of the segment before. Where blocks overlap, every block that crosses brings its own.

Legend: as in `stack`; a, b: a segment's first step, and the one behind its last.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from ..memory import Checkpoints
from ..policies import Reach
from ..schedules import Schedule, binomial
from .boundary import Tensors, given
from .reversal import Back, Source, States, Whole, inputs_of, part_of, states_of
from .stack import Stack

__all__ = ["Checkpointed", "cut"]


SEGMENT_BYTES = 2**20
"""Tape that a segment may have in any case, where no length is asked for: each costs about a millisecond of its own."""


@dataclass(frozen=True, eq=False)
class Checkpointed:
    """A one-directional stack as a program whose tape are checkpoints.

    edges: `[N+1]` the first step of each segment, and T. memory: what asked for it. reads_y: whether the backward call
    is given y, where the top layer's h stands: then it is in no checkpoint.
    """

    name: ClassVar[str] = "stack"

    stack: Stack
    edges: tuple[int, ...]
    schedule: Schedule
    memory: Checkpoints
    reads_y: bool = True

    repeats = True

    @classmethod
    def of(cls, stack: Stack, memory: Checkpoints, tensors: Tensors, *, reads_y: bool = True) -> Checkpointed:
        """The stack with checkpoints for a tape. Raises ValueError for a budget in bytes that is too small."""
        return cls(*cut(stack, memory, tensors, reads_y=reads_y), memory, reads_y)

    @property
    def outputs(self) -> int:
        """How many outputs `forward` has."""
        return self.stack.outputs

    @property
    def reads(self) -> int:
        """How many outputs `backward` reads: y, or none."""
        return int(self.reads_y)

    @property
    def held(self) -> Tensors:
        """What the stack holds."""
        return self.stack.held

    def holding(self, tensors: Tensors) -> Checkpointed:
        """The same with these in the place of `held`."""
        return replace(self, stack=self.stack.holding(tensors))

    @torch.no_grad()
    def forward(self, tensors: Tensors, keep: bool) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """See `Program.forward`. Taped: the states at the checkpoints, h then c, `[slots, K, B, .]`, K less the top."""
        source = Whole(given(tensors[0]), None, wants_dx=False)
        finals, tape = self.ahead(tensors, source, keep)
        return (given(source.y), *finals), tape

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
            below = kept.pop(0) if self.stack.layers > 1 else None
            top = given(y)[self.edges[i] - 1][None]
            kept.insert(0, top if below is None else torch.cat([below, top]))
        return tuple(kept)

    @torch.no_grad()
    def stream(
        self, tensors: Tensors, source: Source, d_finals: Tensors, needs: tuple[bool, ...]
    ) -> tuple[States, Tensors]:
        """(the final state, the gradient of every input but x) of a call whose x and y are never there as a whole.

        tensors: as for `forward`, x None.
        """
        alone = len(self.edges) == 2 and self.stack.lengths is None  # no second run for the final state
        finals, tape = ((), ()) if alone else self.ahead(tensors, source, keep=True)
        back = Back(self.stack, self.edges, tensors, source, d_finals, needs, adjoints=False)
        grads, _ = back.run(self.checkpoints(tape), self.schedule.backward)
        return finals or back.behind, grads[1:]

    def ahead(self, tensors: Tensors, source: Source, keep: bool) -> tuple[States, States]:
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
            inputs = inputs_of(self.stack, tensors, source.x(a, b), state, a, b)
            (y, *after), _ = part_of(self.stack, a, b).forward(inputs, keep=False)
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
        back = Back(self.stack, self.edges, tensors, source, cotangents[1:], needs, want_adjoints)
        grads, adjoints = back.run(self.checkpoints(tape, *outputs[: self.reads]), self.schedule.backward)
        return (source.dx, *grads[1:]), adjoints


def cut(
    stack: Stack, memory: Checkpoints, tensors: Tensors, *, reads_y: bool = True
) -> tuple[Stack, tuple[int, ...], Schedule]:
    """(the stack, its blocks said as simply as they can be; the first step of each segment, and T; the schedule).

    A bidirectional stack runs a layer and direction at a time, and keeps the outputs between layers.
    """
    x = given(tensors[0])
    T, B, _ = x.shape
    stack = replace(stack, reach=stack.blocks(T, B))
    row, weights = max(B, 1) * x.element_size(), stack.weights(tensors)
    P = weights[0].hh.shape[1]
    one = sum(given(s).shape[2] for s in tensors[1 : 1 + stack.cell.states])
    first = one * len(weights)  # a checkpoint of the way forward; later: of the way back
    if stack.directions == 2:
        later, tape, between = one, one + stack.cell.taped(weights[0]), T * 2 * P * (stack.layers - 1)
    else:
        later, tape, between = first, first + sum(map(stack.cell.taped, weights)), 0
    if reads_y and memory.bytes is not None:  # y has the top layer's h; else segments are as long as if it had not
        first -= P
    first, later, tape, between = (values * row for values in (first, later, tape, between))
    steps = memory.cut(T, first, tape, between, later).steps
    if memory == Checkpoints():
        steps = max(steps, SEGMENT_BYTES // tape)
    edges = _edges(T, steps, stack.reach)
    longest = max(b - a for a, b in pairwise(edges))
    slots = memory.slots(len(edges) - 1, longest, first, tape, between, later)
    return stack, edges, binomial(len(edges) - 1, slots)


def _edges(T: int, steps: int, reach: Reach) -> tuple[int, ...]:
    """Where segments of about so many steps begin, and T: whole chunks, or parts of one, where a policy cuts chunks."""
    chunk = reach.every if reach.fenced and reach.every is not None else T
    if chunk <= steps:
        steps, chunk = steps // chunk * chunk, T
    begins = [a for c in range(0, T, chunk) for a in range(c, min(c + chunk, T), steps)]
    return (*begins, T)
