"""A bidirectional net with checkpoints: every layer and direction is a program of its own, on its own time.

Legend: as in `net`; a, b: a segment's first step, and the one after its last.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil

import torch
from torch import Tensor

from ..kernels import Columns, Frames, columns_at_once
from ..memory import Checkpoints
from ..schedules import Action
from .crossing import BetweenLayers
from .net import Net
from .records import Asked, Grads, Saved, Tensors, given
from .segments import Checkpointed, SegmentedPass, Segments, cut
from .source import OneDirection
from .stack import Rerun, Stack
from .sweep import LayerGradients, LayerSweep

__all__ = ["CheckpointedBidirectional"]


@dataclass(eq=False)
class CheckpointedBidirectional(Segments):
    """A bidirectional net as a program whose tape consists of checkpoints and the outputs of the layers below the top.

    starts, schedule, memory: see `Segments`; those of every layer and direction.
    """

    @classmethod
    def of(cls, net: Net, memory: Checkpoints, inputs: Tensors) -> CheckpointedBidirectional:
        """The net with checkpoints for a tape. Raises ValueError for a budget in bytes that is too small."""
        return cls(*cut(net, memory, inputs, reads_y=False), memory)

    @property
    def reads(self) -> int:
        """How many outputs `backward` reads."""
        return 0

    @torch.no_grad()
    def forward(self, inputs: Tensors, keep: bool) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """See `Program.forward`. Taped: what the layers below the top put out; the states at the checkpoints."""
        net, y = self.net, given(inputs[0])
        between: list[Tensor] = []
        tape: list[Tensor] = []
        finals: list[tuple[Tensor, ...]] = []
        for layer in range(net.layers):
            if layer > 0 and keep:
                between.append(y)
            below, y = y, y.new_zeros(*y.shape[:2], 2 * given(inputs[1]).shape[2])
            for d in (0, 1):
                source = OneDirection(net, layer, d, below, y=y)
                program, own = self.one_direction(layer, d), self.inputs_of(inputs, layer, d)
                final, kept = program.forward_segments(own, source, keep)
                finals.append(final)
                tape += kept
        return (y, *map(torch.cat, zip(*finals, strict=True))), (*between, *tape)

    def backward(self, saved: Saved, asked: Asked) -> Grads:
        """See `Program.backward`. A gradient that is to be differentiated again is that of the net without segments."""
        if saved.tape is None:
            return Stack(self.net, "states").backward(saved, asked)
        return _BidirectionalPass(self, saved.inputs, saved.tape, asked).run()

    def one_direction(self, layer: int, d: int) -> Checkpointed:
        """One direction of a layer as a program of its own."""
        net, k = self.net, 2 * layer + d
        xi, resets, reverse = net.xi[k : k + 1], net.resets[d : d + 1], d == 1 and net.lengths is None
        alone = replace(net, layers=1, directions=1, masks=(), xi=xi, resets=resets, reverse=reverse)
        return Checkpointed(alone, self.starts, self.schedule, self.memory, reads_y=False)

    def inputs_of(self, inputs: Tensors, layer: int, d: int) -> Tensors:
        """The inputs of that program, x left out."""
        net, k, states = self.net, 2 * layer + d, self.net.cell.states
        first = 1 + states + k * net.per_layer
        initial = [given(s)[k : k + 1] for s in inputs[1 : 1 + states]]
        restart = [s[None] if s.dim() == 2 else s[:, None] for s in net.reset_state(inputs, k)]
        return (None, *initial, *inputs[first : first + net.per_layer], *restart)

    # What a call costs ------------------------------------------------------------------------------------------------

    def tape_values(self, inputs: Tensors) -> int:
        net, T, weights = self.net, given(inputs[0]).shape[0], self.net.weights(inputs)
        sizes, gates = net.cell.state_sizes(weights[0]), net.cell.taped(weights[0])
        one, first = sum(sizes), len(self.schedule.stored_forward)
        later = self.schedule.held - first
        # One layer and direction at a time, and what lies between layers.
        between = T * 2 * sizes[0] * (net.layers - 1)
        return between + (first * len(weights) + later) * one + (self.longest + 1) * one + self.longest * gates

    def rerun(self, inputs: Tensors, most: int | None = None) -> list[Rerun]:
        net, (T, B, _) = self.net, given(inputs[0]).shape
        if not net.by_block(net.reach):
            return super().rerun(inputs)
        # Every group of columns runs again what it crosses, in each layer and direction.
        columns = Columns.of(net.reach, net.lengths, T, B, 2)
        at_once = columns_at_once(columns.frames[0], net.weights(inputs)[0], sequence_fits=False)
        groups = [slice(i, i + at_once) for i in range(0, len(columns.span), at_once)]
        counted = groups if most is None else groups[:: ceil(len(groups) / most)]
        times = len(groups) / len(counted)
        return [
            Rerun(d, a, b, times)
            for d, frames in enumerate(columns.frames)
            for group in counted
            for a, b in self._spans(self._crossed(frames.pick(group)))
        ]

    def _crossed(self, columns: Frames) -> Iterator[Action]:
        """What is done for the segments that some columns cross, and for those that lead there."""
        first, last = segments_crossed(columns, self.starts)
        for action in self.schedule.only(first, last):
            a, b = self.starts[action.first : action.first + 2] if action.kind == "R" else (0, 0)
            if action.kind != "R" or ((columns.start < b) & (columns.top >= a)).any():
                yield action


class _BidirectionalPass(LayerSweep["Columns | None"]):
    """One backward call of a bidirectional net: from the top layer to the bottom, both directions of each."""

    def __init__(
        self, program: CheckpointedBidirectional, inputs: Tensors, tape: tuple[Tensor, ...], asked: Asked
    ) -> None:
        super().__init__(program.net, inputs, asked)
        self.program = program
        L, K = self.net.layers, 2 * self.net.layers
        self.below, rest = [self.x, *tape[: L - 1]], tape[L - 1 :]
        count = len(rest) // K
        self.kept = [program.one_direction(0, 0).checkpoints(rest[k * count : (k + 1) * count]) for k in range(K)]
        self.dx = torch.zeros_like(self.x) if asked.needs[0] else None

    def run(self) -> Grads:
        """The gradient of every input; the adjoints."""
        net, (T, B, _) = self.net, self.x.shape
        if net.by_block(net.reach):
            columns = Columns.of(net.reach, net.lengths, T, B, 2)
            at_once = columns_at_once(columns.frames[0], net.weights(self.inputs)[0], sequence_fits=False)
            groups: Iterable[Columns | None] = columns.groups(at_once)
        else:
            groups = [None]
        for _ in self.down(groups):
            pass
        return self.grads()

    def back(
        self, layer: int, d: int, group: Columns | None, errors: Tensor | None, below: Tensor | None
    ) -> Tensor | None:
        net, x, is_top = self.net, self.below[layer], layer == self.net.layers - 1
        if group is None:
            if layer > 0 and below is None:
                below = torch.zeros_like(x)
            dx = below if layer > 0 else self.dx
            self._walk(layer, d, OneDirection(net, layer, d, x, dy=self.dy if is_top else errors, dx=dx))
            return below
        frames = group.frames[d]
        above = None if errors is None else group.turn(net.half(errors, d), d)
        lower = x.new_zeros(frames.R, len(frames.start), x.shape[2]) if layer > 0 else None
        source = OneDirection(net, layer, d, x, dy=self.dy if is_top else None, dx=None if layer > 0 else self.dx)
        self._walk(layer, d, source, frames, BetweenLayers(above, lower, group.owns_losses[d : d + 1]))
        if lower is None:
            return None
        turned = group.turn(lower, d)
        return turned if below is None else below + turned

    def dropped(self, below: Tensor, layer: int, group: Columns | None) -> Tensor:
        if group is None or not self.net.masks:  # a source has its own mask
            return below
        return below * group.frames[0].spread(self.net.masks[layer - 1])

    def _walk(
        self,
        layer: int,
        d: int,
        source: OneDirection,
        frames: Frames | None = None,
        between: BetweenLayers | None = None,
    ) -> None:
        """One direction of a layer: all its segments, or those that the columns of overlapping blocks cross."""
        net, needs, states, k = self.net, self.asked.needs, self.net.cell.states, 2 * layer + d
        needs = (source.dx is not None, *needs[1 : 1 + states], *self.needs_of(k), *needs[net.inputs :])
        d_finals = tuple(None if d_final is None else d_final[k : k + 1] for d_final in self.d_finals)
        one, inputs = self.program.one_direction(layer, d), self.program.inputs_of(self.inputs, layer, d)
        asked = self.asked._replace(cotangents=d_finals, needs=needs)
        back = SegmentedPass(one, inputs, source, asked, frames, between)
        actions = one.schedule.backward if frames is None else one.schedule.only(*segments_crossed(frames, one.starts))
        found = back.run(self.kept[k], actions)
        end = 1 + states + net.per_layer
        initial = tuple([g if g is None else g[0] for g in found.inputs[1 : 1 + states]])
        restart = tuple([g if g is None else g[0] if g.dim() == 3 else g[:, 0] for g in found.inputs[end:]])
        if any(g is None for g in restart):
            restart = ()
        adjoint = found.adjoints[0] if found.adjoints else None
        own = LayerGradients(initial, found.inputs[1 + states : end], restart, adjoint)
        self.gradients[k] = own if k not in self.gradients else self.gradients[k].plus(own)


def segments_crossed(frames: Frames, starts: Sequence[int]) -> tuple[int, int]:
    """The first and the last segment that a column walks through."""
    return bisect_right(starts, int(frames.start.min())) - 1, bisect_right(starts, int(frames.top.max())) - 1
