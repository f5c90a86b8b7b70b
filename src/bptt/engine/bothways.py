"""A bidirectional stack with checkpoints: every layer and direction is a program of its own, on its own time.

Legend: as in `stack`; a, b: a segment's first step, and the one behind its last.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..kernels import Columns, Frames, columns_at_once
from ..memory import Checkpoints
from ..schedules import Schedule
from .boundary import Tensors, given
from .reversal import Back, Crossing
from .segments import Checkpointed, cut
from .stack import Stack

__all__ = ["BothWays", "segments", "taped"]


def taped(stack: Stack, memory: Checkpoints, tensors: Tensors) -> Stack | Checkpointed | BothWays:
    """The stack with checkpoints for a tape; as it is where the whole tape is within the budget."""
    if memory.bytes is not None and stack.tape_bytes(tensors) <= memory.bytes:
        return stack  # which keeps gates
    kind = BothWays if stack.directions == 2 else Checkpointed
    return kind.of(stack, memory, tensors)


@dataclass(frozen=True, eq=False)
class BothWays:
    """A bidirectional stack as a program whose tape are checkpoints, and the outputs of the layers below the top.

    edges, schedule, memory: see `Checkpointed`; those of every layer and direction.
    """

    name: ClassVar[str] = "stack"

    stack: Stack
    edges: tuple[int, ...]
    schedule: Schedule
    memory: Checkpoints

    repeats = True

    @classmethod
    def of(cls, stack: Stack, memory: Checkpoints, tensors: Tensors) -> BothWays:
        """The stack with checkpoints for a tape. Raises ValueError for a budget in bytes that is too small."""
        return cls(*cut(stack, memory, tensors, reads_y=False), memory)

    @property
    def outputs(self) -> int:
        """How many outputs `forward` has."""
        return self.stack.outputs

    @property
    def reads(self) -> int:
        """How many outputs `backward` reads."""
        return 0

    @property
    def held(self) -> Tensors:
        """What the stack holds."""
        return self.stack.held

    def holding(self, tensors: Tensors) -> BothWays:
        """The same with these in the place of `held`."""
        return replace(self, stack=self.stack.holding(tensors))

    @torch.no_grad()
    def forward(self, tensors: Tensors, keep: bool) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """See `Program.forward`. Taped: what the layers below the top put out; the states at the checkpoints."""
        stack, y = self.stack, given(tensors[0])
        between: list[Tensor] = []
        tape: list[Tensor] = []
        finals: list[tuple[Tensor, ...]] = []
        for layer in range(stack.layers):
            if layer > 0 and keep:
                between.append(y)
            below, y = y, y.new_zeros(*y.shape[:2], 2 * stack.weights(tensors)[0].hh.shape[1])
            for d in (0, 1):
                source = OneWay(stack, layer, d, below, y=y)
                final, kept = self.one_way(d, layer).ahead(self.inputs(tensors, d, layer), source, keep)
                finals.append(final)
                tape += kept
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
        if tape is None:
            return self.stack.gradients(tensors, outputs, tape, cotangents, needs, want_adjoints)
        return _Back(self, tensors, tape, cotangents, needs, want_adjoints).run()

    def one_way(self, d: int, layer: int) -> Checkpointed:
        """One direction of a layer as a program of its own."""
        stack, k = self.stack, 2 * layer + d
        alone = replace(stack, layers=1, directions=1, masks=(), xi=stack.xi[k : k + 1], resets=stack.resets[d : d + 1])
        return Checkpointed(alone, self.edges, self.schedule, self.memory, reads_y=False)

    def inputs(self, tensors: Tensors, d: int, layer: int) -> Tensors:
        """The inputs of that program, x left out."""
        stack, k, states = self.stack, 2 * layer + d, self.stack.cell.states
        first = 1 + states + k * stack.per_layer
        initial = [given(s)[k : k + 1] for s in tensors[1 : 1 + states]]
        restart = [s[None] if s.dim() == 2 else s[:, None] for s in stack.reset_state(tensors, k)]
        return (None, *initial, *tensors[first : first + stack.per_layer], *restart)


class OneWay:
    """A `Source`: one direction of a layer, in its own time, of tensors of all steps in forward time.

    below: the layer's input before dropout. y: `[T, B, 2P]`, added to. dy: `[T, B, 2P]`. dx: like below, added to.
    """

    def __init__(
        self,
        stack: Stack,
        layer: int,
        d: int,
        below: Tensor,
        *,
        y: Tensor | None = None,
        dy: Tensor | None = None,
        dx: Tensor | None = None,
    ) -> None:
        self.stack, self.d, self.below = stack, d, below
        self.mask = stack.masks[layer - 1] if stack.masks and layer > 0 else None
        self.y = None if y is None else stack.half(y, d)
        self.dy = None if dy is None else stack.half(dy, d)
        self.dx = dx

    def _part(self, x: Tensor, a: int, b: int) -> Tensor:
        return self.stack.turned(x, a, b) if self.d else x[a:b]

    def _add(self, x: Tensor, a: int, b: int, value: Tensor) -> None:
        if self.d:
            self.stack.add_turned(x, a, b, value)
        else:
            x[a:b] += value

    def x(self, a: int, b: int) -> Tensor:
        x = self._part(self.below, a, b)
        return x if self.mask is None else x * self._part(self.mask, a, b)

    def see(self, a: int, b: int, y: Tensor) -> None:
        self._add(given(self.y), a, b, y)

    def error(self, a: int, b: int, y: Tensor) -> Tensor | None:
        return None if self.dy is None else self._part(self.dy, a, b)

    def put(self, a: int, b: int, dx: Tensor | None) -> None:
        if self.dx is not None:
            dx = given(dx)
            self._add(self.dx, a, b, dx if self.mask is None else dx * self._part(self.mask, a, b))


class _Back:
    """One backward call: from the top layer to the bottom, both directions of each."""

    def __init__(
        self,
        program: BothWays,
        tensors: Tensors,
        tape: tuple[Tensor, ...],
        cotangents: Tensors,
        needs: tuple[bool, ...],
        adjoints: bool,
    ) -> None:
        self.program, self.stack, self.tensors, self.needs = program, program.stack, tensors, needs
        self.dy, *self.d_finals = cotangents
        L, K = self.stack.layers, 2 * self.stack.layers
        self.below, rest = [given(tensors[0]), *tape[: L - 1]], tape[L - 1 :]
        count = len(rest) // K
        self.kept = [program.one_way(0, 0).checkpoints(rest[k * count : (k + 1) * count]) for k in range(K)]
        self.dx = torch.zeros_like(self.below[0]) if needs[0] else None
        self.wants_adjoints = adjoints
        self.found: list[list[Tensor | None]] = [[]] * K  # what inputs of its own get, by layer and direction
        self.adjoints: list[list[Tensor]] = [[]] * K

    def run(self) -> tuple[Tensors, list[Tensor]]:
        """The gradient of every input; the adjoints."""
        reach = self.stack.reach
        if self.stack.layers > 1 and reach.every is not None and not reach.fenced:
            self._block_by_block()
        else:
            self._layer_by_layer()
        states = self.stack.cell.states
        d_initial = [
            torch.cat([given(grad) for grad in grads]) if need else None
            for grads, need in zip(
                zip(*(own[:states] for own in self.found), strict=True), self.needs[1:], strict=False
            )
        ]
        end = states + self.stack.per_layer
        weights = [grad for own in self.found for grad in own[states:end]]
        restart = [self._restart(grads) for grads in zip(*(own[end:] for own in self.found), strict=True)]
        return (self.dx, *d_initial, *weights, *restart), [a for own in self.adjoints for a in own]

    def _restart(self, grads: Sequence[Tensor | None]) -> Tensor | None:
        """The gradient of the state that resets restart from, of each layer and direction, in forward time."""
        own = [grad for grad in grads if grad is not None]
        if not own or own[0].dim() == 3:
            return torch.cat(own) if own else None
        return torch.stack([self.stack.from_resets(g[:, 0], k % 2) for k, g in enumerate(own)], 1)

    def _layer_by_layer(self) -> None:
        error = self.dy
        for layer in reversed(range(self.stack.layers)):
            dx = self.dx if layer == 0 else torch.zeros_like(self.below[layer])
            for d in (0, 1):
                self._walk(layer, d, OneWay(self.stack, layer, d, self.below[layer], dy=error, dx=dx))
            error = dx

    def _block_by_block(self) -> None:
        """Overlapping blocks in several layers: a group of columns through all of them, as in `Walk.sweeps`."""
        stack = self.stack
        T, B, _ = self.below[0].shape
        blocks = Columns.of(stack.reach, stack.lengths, T, B, 2)
        w = stack.weights(self.tensors)[0]
        for group in blocks.groups(columns_at_once(blocks.frames[0], w, sequence_fits=False)):
            error: Tensor | None = None  # [R, N, 2P], in forward positions
            for layer in reversed(range(stack.layers)):
                through: Tensor | None = None
                for d, frames in enumerate(group.frames):
                    own = None if error is None else group.turn(stack.half(error, d), d)
                    size = (frames.R, len(frames.start), self.below[layer].shape[2])
                    lower = self.below[layer].new_zeros(size) if layer > 0 else None
                    columns = Columns((frames,), group.takes[d : d + 1], group.span)
                    top, dx = layer == stack.layers - 1, self.dx if layer == 0 else None
                    source = OneWay(stack, layer, d, self.below[layer], dy=self.dy if top else None, dx=dx)
                    self._walk(layer, d, source, frames, Crossing(columns, own, lower))
                    if lower is not None:
                        turned = group.turn(lower, d)
                        through = turned if through is None else through + turned
                error = through
                if error is not None and stack.masks:
                    error = error * group.frames[0].spread(stack.masks[layer - 1])

    def _walk(
        self, layer: int, d: int, source: OneWay, frames: Frames | None = None, crossing: Crossing | None = None
    ) -> None:
        """One direction of a layer: all its segments, or those that the columns of overlapping blocks cross."""
        program, stack, states, k = self.program, self.stack, self.stack.cell.states, 2 * layer + d
        first = 1 + states + k * stack.per_layer
        own = self.needs[first : first + stack.per_layer]
        needs = (source.dx is not None, *self.needs[1 : 1 + states], *own, *self.needs[stack.inputs :])
        d_finals = tuple(None if d_final is None else d_final[k : k + 1] for d_final in self.d_finals)
        one, inputs = program.one_way(d, layer), program.inputs(self.tensors, d, layer)
        back = Back(one.stack, one.edges, inputs, source, d_finals, needs, self.wants_adjoints, crossing)
        actions = one.schedule.backward if frames is None else one.schedule.only(*segments(frames, one.edges))
        (_, *grads), adjoints = back.run(self.kept[k], actions)
        if not self.found[k]:
            self.found[k], self.adjoints[k] = grads, adjoints
            return
        self.found[k] = [
            a if b is None else b if a is None else a + b for a, b in zip(self.found[k], grads, strict=True)
        ]
        self.adjoints[k] = [a + b for a, b in zip(self.adjoints[k], adjoints, strict=True)]


def segments(frames: Frames, edges: Sequence[int]) -> tuple[int, int]:
    """The first and the last segment that a column walks through."""
    return bisect_right(edges, int(frames.start.min())) - 1, bisect_right(edges, int(frames.top.max())) - 1
