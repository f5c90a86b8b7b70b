"""Stages 3 and 4 of a backward call: the block sweep through a stack of layers, then one product per weight."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..cells import Weights
from ..kernels import Columns, Frames, Sums, Sweep, SweepResult, Tape, columns_at_once, product
from ..policies import Reach
from .boundary import Tensors, given, own_precision
from .parameters import parameter_gradients, steps_of
from .restart import restart_gradients

if TYPE_CHECKING:
    from .reversal import Crossing
    from .stack import Stack

__all__ = ["Walk"]

REBUILD_VALUES = 2**20
"""Values of the gates that are rebuilt at a time: enough for one product to be large."""


class Walk:
    """Stages 3 and 4 of one backward call: the block sweep through a stack, then one product per weight.

    k = layer * D + d numbers the layers and directions. Everything indexed by k is in that direction's own time.
    """

    def __init__(
        self, stack: Stack, tensors: Tensors, outputs: Tensors, tape: tuple[Tensor, ...], cotangents: Tensors
    ) -> None:
        self.stack, self.x = stack, given(tensors[0])
        self.weights = stack.weights(tensors)
        self.dy, *self.d_finals = cotangents
        self.kept = stack.kept(tape, outputs, tensors)
        self.present = stack.present(self.x)
        K = stack.layers * stack.directions
        self.dx: Tensor | None = None
        self.d_initial: list[tuple[Tensor, ...]] = [()] * K
        self.d_weights: list[list[Tensor | None]] = [[]] * K
        self.restart = [stack.reset_state(tensors, k) for k in range(K)]
        self.d_restart: list[tuple[Tensor, ...]] = [()] * K
        self.adjoints: list[Tensor] = [self.x] * K

    def run(self, needs: tuple[bool, ...], want_adjoints: bool) -> tuple[Tensors, list[Tensor]]:
        """(the gradient of every input that needs one, in the order of the program's inputs; the adjoints of h)."""
        stack = self.stack
        T, B, _ = self.x.shape
        self._want(needs, want_adjoints)
        reach = stack.blocks(T, B)
        with own_precision(self.x.device):
            if stack.layers > 1 and reach.every is not None and not reach.fenced:
                self._block_by_block(Columns.of(reach, stack.lengths, T, B, stack.directions))
            else:
                self._layer_by_layer(reach)
        return self._grads(), self.adjoints

    def run_across(
        self, needs: tuple[bool, ...], want_adjoints: bool, columns: Columns, crossing: Crossing
    ) -> tuple[Tensors, list[Tensor]]:
        """The same for a part of a longer call: its blocks come from the part behind and go on into the one before."""
        self._want(needs, want_adjoints)
        with own_precision(self.x.device):
            if len(self.weights) == 1 and crossing.sums:
                self._own_and_from_behind(columns, crossing)
            else:
                self._block_by_block(columns, crossing)
        return self._grads(), self.adjoints

    def _want(self, needs: tuple[bool, ...], want_adjoints: bool) -> None:
        states, inputs = self.stack.cell.states, self.stack.inputs
        self.needs_x, self.needs_weights, self.needs_restart = needs[0], needs[1 + states : inputs], any(needs[inputs:])
        self.needs_initial = any(needs[1 : 1 + states])
        self.adjoints_of = states if self.needs_restart else int(want_adjoints or self.weights[0].hr is not None)

    def _grads(self) -> Tensors:
        """The gradient of every input that needs one, in the order of the program's inputs."""
        states = self.stack.cell.states
        d_initial = map(torch.stack, zip(*self.d_initial, strict=True)) if self.needs_initial else (None,) * states
        d_restart: Iterable[Tensor | None] = (None,) * len(self.restart[0])
        if self.needs_restart:
            d_restart = [torch.stack(grads, grads[0].dim() - 2) for grads in zip(*self.d_restart, strict=True)]
        return (self.dx, *d_initial, *(grad for grads in self.d_weights for grad in grads), *d_restart)

    # Stage 3 ---------------------------------------------------------------------------------------------------------

    def _layer_by_layer(self, reach: Reach) -> None:
        """Blocks that do not overlap, or a single layer: a layer is summed over blocks before the next one starts."""
        stack = self.stack
        T, B, _ = self.x.shape
        frames = Frames.of(reach, stack.lengths, T, B)
        error = self.dy
        for layer in reversed(range(stack.layers)):
            below = self._below(layer)
            dx: Tensor | None = None
            for d in range(stack.directions):
                k = layer * stack.directions + d
                own = stack.turn(below, d)
                tape = self._tape(k, own)
                half = None if error is None else stack.turn(stack.half(error, d), d)
                request = self._request(k, tape, frames, half, x=own)
                walked = stack.kernel.sweep(request._replace(dx=bool(layer or self.needs_x)))
                dx = self._finish(k, tape, own, walked, self._initial(frames, walked), dx)
            error = dx if dx is None or not stack.masks or layer == 0 else dx * stack.masks[layer - 1]
        self.dx = error

    def _block_by_block(self, columns: Columns, crossing: Crossing | None = None) -> None:
        """Overlapping blocks in a stack, summed over blocks at the end."""
        stack, D = self.stack, self.stack.directions
        sums = [Sums(self._request(k, tape, columns.frames[k % D], None)) for k, tape in enumerate(self.tapes)]
        initial: list[tuple[Tensor, ...]] = [()] * len(sums)
        for k, frames, swept in self.sweeps(columns, self.adjoints_of, self.needs_initial, crossing):
            sums[k].add(frames, swept)
            initial[k] = _added(initial[k], self._initial(frames, swept))
            if crossing is not None:
                crossing.leave(k, frames, swept.leaving)
                crossing.descend(frames, swept.da, self.weights[k])
        for k, tape in enumerate(self.tapes):
            below = stack.turn(self._below(k // D), k % D)
            self.dx = self._finish(k, tape, below, sums[k].result(), initial[k], self.dx, needs_dx=k < D)

    def _own_and_from_behind(self, columns: Columns, crossing: Crossing) -> None:
        """A part of a longer call of one layer: only columns that come from behind bring what a plain walk has not."""
        stack, (tape,) = self.stack, self.tapes
        behind = crossing.comes(0, columns.frames[0])[0]
        own, walked = columns.frames[0].pick(~behind), None
        initial: tuple[Tensor, ...] = ()
        if len(own.start):
            walked = stack.kernel.sweep(self._request(0, tape, own, self.dy, x=self.x)._replace(dx=True))
            initial = self._initial(own, walked)
            crossing.leave(0, own, walked.leaving)
        if behind.any():
            sums = Sums(self._request(0, tape, columns.frames[0], None))
            for k, frames, swept in self.sweeps(columns.pick(behind), self.adjoints_of, self.needs_initial, crossing):
                sums.add(frames, swept)
                initial = _added(initial, self._initial(frames, swept))
                crossing.leave(k, frames, swept.leaving)
            more = sums.result()
            if walked is not None:
                more = SweepResult(walked.da + more.da, _added(walked.adjoints, more.adjoints))
            walked = more
        assert walked is not None
        self.dx = self._finish(0, tape, self.x, walked, initial, None)

    def sweeps(
        self, columns: Columns, adjoints: int, leaving: bool = False, crossing: Crossing | None = None
    ) -> Iterator[tuple[int, Frames, SweepResult]]:
        """Every sweep as (k, its frames, what it brings back): a group of columns, through all layers from the top.

        A block's adjoints go down through all layers before blocks are summed. Only so does a window count steps of the
        whole network: (7.3) and (7.4).
        """
        stack, D = self.stack, self.stack.directions
        halves = [None if self.dy is None else stack.turn(stack.half(self.dy, d), d) for d in range(D)]
        for group in columns.groups(columns_at_once(columns.frames[0], self.weights[0])):
            error: Tensor | None = None  # [R, N, D*P], in forward positions
            for layer in reversed(range(stack.layers)):
                dx: Tensor | None = None
                for d, frames in enumerate(group.frames):
                    k, half = layer * D + d, halves[d]
                    if error is not None:
                        own: Tensor | None = group.turn(stack.half(error, d), d)
                    else:
                        own = None if half is None else group.errors(half, d)
                    arriving = self._finals(k)
                    if crossing is not None:
                        frames, own, arriving = crossing.enter(k, frames, own, arriving)
                    edges = stack.edges(k, self.x.dtype)
                    swept = stack.kernel.sweep(
                        Sweep(
                            stack.cell,
                            self.weights[k],
                            self.tapes[k],
                            frames,
                            own,
                            arriving,
                            edges,
                            True,
                            adjoints,
                            leaving,
                        )
                    )
                    yield k, frames, swept
                    if layer > 0:
                        below = product(swept.da.flatten(0, 1), self.weights[k].ih.t())
                        through = group.turn(below.unflatten(0, swept.da.shape[:2]), d)
                        dx = through if dx is None else dx + through
                error = dx
                if error is not None and stack.masks:
                    error = error * group.frames[0].spread(stack.masks[layer - 1])

    def _request(self, k: int, tape: Tape, frames: Frames, errors: Tensor | None, x: Tensor | None = None) -> Sweep:
        """What is asked of layer and direction k, dx left out."""
        weights = any(self.needs_weights)
        return Sweep(
            self.stack.cell,
            self.weights[k],
            tape,
            frames,
            errors,
            self._finals(k),
            self.stack.edges(k, self.x.dtype),
            adjoints=self.adjoints_of,
            leaving=self.needs_initial,
            x=x,
            weights=weights,
            bias=self.stack.biased and weights,
        )

    def _initial(self, frames: Frames, walked: SweepResult) -> tuple[Tensor, ...]:
        """The gradient of the initial state, where it is asked for."""
        return frames.collect_initial(walked.leaving) if self.needs_initial else ()

    def _finals(self, k: int) -> tuple[Tensor | None, ...]:
        """The cotangents of the final state of layer and direction k."""
        return tuple(None if d_final is None else d_final[k] for d_final in self.d_finals)

    # Stage 4 ---------------------------------------------------------------------------------------------------------

    def _finish(
        self,
        k: int,
        tape: Tape,
        x: Tensor,
        walked: SweepResult,
        initial: tuple[Tensor, ...],
        dx: Tensor | None,
        needs_dx: bool = True,
    ) -> Tensor | None:
        """(6.4): one product per weight over all steps and lanes; returns `dx` plus this direction's part of it."""
        stack, w = self.stack, self.weights[k]
        needs = self.needs_weights[k * stack.per_layer : (k + 1) * stack.per_layer]
        needs_dx = needs_dx and (k >= stack.directions or self.needs_x)
        self.d_initial[k] = initial
        self.d_weights[k] = parameter_gradients(stack.cell, w, tape, x, walked, needs, self.present)
        if self.needs_restart:
            grads = restart_gradients(stack.cell, w, tape, walked, self.present)
            d = k % stack.directions
            self.d_restart[k] = tuple(stack.from_resets(g, d) if g.dim() == 3 else g for g in grads)
        if walked.adjoints:
            self.adjoints[k] = walked.adjoints[0]
        if not needs_dx:
            return dx
        part = walked.dx
        if part is None:
            T, B, _ = x.shape
            rows = product(steps_of(walked.da, self.present), w.ih.t())
            if self.present is not None:
                rows = rows.new_zeros(T * B, rows.shape[1]).index_copy(0, self.present, rows)
            part = rows.view(x.shape)
        part = stack.turn(part, k % stack.directions)
        return part if dx is None else dx + part

    @cached_property
    def tapes(self) -> list[Tape]:
        """The tapes of all layers and directions, gates that were not kept rebuilt."""
        D = self.stack.directions
        below = [self._below(layer) for layer in range(self.stack.layers)]
        return [self._tape(k, self.stack.turn(below[k // D], k % D)) for k in range(len(self.weights))]

    # What the tape holds ---------------------------------------------------------------------------------------------

    def _below(self, layer: int) -> Tensor:
        """The input of a layer `[T, B, I or D*P]`, in forward time."""
        if layer == 0:
            return self.x
        stack, D = self.stack, self.stack.directions
        hs = [stack.turn(self.kept[(layer - 1) * D + d][0][0][1:], d) for d in range(D)]
        return stack.masked(hs[0] if D == 1 else torch.cat(hs, -1), layer)

    def _tape(self, k: int, x: Tensor) -> Tape:
        """The tape of layer and direction k; gates that were not kept are rebuilt by one product over all steps."""
        states, gates = self.kept[k]
        tape = Tape(states, self.stack.resets_of(k % self.stack.directions), gates, self.restart[k])
        if gates is None and self.stack.cell.taped_per_unit:
            tape.gates = self._rebuilt(x, tape.prev[0], self.weights[k])
        return tape

    def _rebuilt(self, x: Tensor, h: Tensor, w: Weights) -> Tensor:
        """The gates of all steps by one product, a few steps at a time to bound what it needs besides."""
        cell = self.stack.cell
        T, B, _ = x.shape
        present = self.present  # past the end the gates are zero
        gates = (x.new_empty if present is None else x.new_zeros)(T * B, cell.taped(w))
        at_once = max(1, REBUILD_VALUES // w.hh.shape[0])
        for i in range(0, T * B if present is None else len(present), at_once):
            rows = slice(i, i + at_once) if present is None else present[i : i + at_once]
            gates[rows] = cell.gates(cell.project(x.flatten(0, 1)[rows], w), h.flatten(0, 1)[rows], w)
        return gates.view(T, B, cell.taped(w))


def _added(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Sums; of () as of zeros."""
    return tuple(a + b for a, b in zip(one, other, strict=True)) if one and other else one or other
