"""Stages 3 and 4 of a backward call: the block sweep through a stack of layers, then one product per weight."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..cells import Weights
from ..kernels import Columns, Frames, Swept, Tape
from ..policies import Reach
from .boundary import Tensors

if TYPE_CHECKING:
    from .stack import Stack

__all__ = ["Walk", "given"]

SWEEP_VALUES = 2**24
"""Values a sweep may hold per group of columns, where blocks overlap so much that they are walked in groups."""

SWEEP_SEQUENCES = 4
"""Columns that together are at most so many times the sequence are walked in one group, whatever their size."""

REBUILD_VALUES = 2**20
"""Values of the gates that are rebuilt at a time: enough for one product to be large."""


class Walk:
    """Stages 3 and 4 of one backward call: the block sweep through a stack, then one product per weight.

    k = layer * D + d numbers the layers and directions. Everything indexed by k is in that direction's own time.
    """

    def __init__(
        self, stack: Stack, tensors: Tensors, outputs: Tensors, tape: tuple[Tensor, ...], cotangents: Tensors
    ) -> None:
        self.stack, self.x, self.y = stack, given(tensors[0]), given(outputs[0])
        self.initial, self.weights = stack.inputs(tensors)
        self.dy, *self.d_finals = cotangents
        self.kept = self._unpack(tape)
        K = stack.layers * stack.directions
        self.dx: Tensor | None = None
        self.d_initial: list[tuple[Tensor, ...]] = [()] * K
        self.d_weights: list[tuple[Tensor | None, ...]] = [()] * K
        self.adjoints: list[Tensor] = [self.x] * K

    def run(self, needs: tuple[bool, ...], want_adjoints: bool) -> Tensors:
        """The gradient of every input that needs one, in the order of the program's inputs."""
        stack, reach = self.stack, self.stack.reach
        self.needs_x, self.needs_weights = needs[0], needs[1 + stack.cell.states :]
        self.collects_h = want_adjoints or self.weights[0].hr is not None
        if self.x.shape[1] == 0:
            reach = Reach(None, None, fenced=False)  # no lane, no block
        elif reach.every is not None and reach.window == reach.every and not (stack.lengths % reach.every).any():
            reach = replace(reach, fenced=True)  # equal blocks of their own length do not overlap
        if stack.layers > 1 and reach.every is not None and not reach.fenced:
            self._block_by_block(reach)
        else:
            self._layer_by_layer(reach)
        d_initial = (torch.stack(s) for s in zip(*self.d_initial, strict=True))
        return (self.dx, *d_initial, *(grad for grads in self.d_weights for grad in grads))

    # Stage 3 ---------------------------------------------------------------------------------------------------------

    def _layer_by_layer(self, reach: Reach) -> None:
        """Blocks that do not overlap, or a single layer: a layer is summed over blocks before the next one starts."""
        stack = self.stack
        frames = Frames.of(reach, stack.lengths, self.x.shape[0])
        error = self.dy
        for layer in reversed(range(stack.layers)):
            below = self._below(layer)
            dx: Tensor | None = None
            for d in range(stack.directions):
                k = layer * stack.directions + d
                tape = self._tape(k, stack.turn(below, d))
                half = None if error is None else stack.turn(stack.half(error, d), d)
                sums = _Sums()
                for group in frames.groups(self._columns(frames)):
                    own = None if half is None else group.errors(half)
                    sums.add(group, self._sweep(k, tape, group, own, *group.finals()), self.collects_h)
                dx = self._finish(k, tape, stack.turn(below, d), sums, dx)
            error = dx if dx is None or not stack.masks or layer == 0 else dx * stack.masks[layer - 1]
        self.dx = error

    def _block_by_block(self, reach: Reach) -> None:
        """Overlapping blocks in a stack: a block's adjoints go down through all layers before blocks are summed.

        Only so does a window count steps of the whole network: (7.3) and (7.4).
        """
        stack, D = self.stack, self.stack.directions
        columns = Columns.of(reach, stack.lengths, self.x.shape[0], D)
        below = [self._below(layer) for layer in range(stack.layers)]
        tapes = [self._tape(k, stack.turn(below[k // D], k % D)) for k in range(stack.layers * D)]
        sums = [_Sums() for _ in tapes]
        halves = [None if self.dy is None else stack.turn(stack.half(self.dy, d), d) for d in range(D)]
        for group in columns.groups(self._columns(columns.frames[0])):
            error: Tensor | None = None  # [R, N, D*P], in forward positions
            for layer in reversed(range(stack.layers)):
                dx: Tensor | None = None
                for d, frames in enumerate(group.frames):
                    k, half = layer * D + d, halves[d]
                    if error is not None:
                        own: Tensor | None = group.turn(stack.half(error, d), d)
                    else:
                        own = None if half is None else group.errors(half, d)
                    swept = self._sweep(k, tapes[k], frames, own, *group.finals(d))
                    sums[k].add(frames, swept, self.collects_h)
                    if layer > 0:
                        through = group.turn(swept.da @ self.weights[k].ih, d)
                        dx = through if dx is None else dx + through
                error = dx
                if error is not None and stack.masks:
                    error = error * group.frames[0].spread(stack.masks[layer - 1])
        for k, tape in enumerate(tapes):
            self.dx = self._finish(k, tape, stack.turn(below[k // D], k % D), sums[k], self.dx, needs_dx=k < D)

    def _sweep(
        self, k: int, tape: Tape, frames: Frames, error: Tensor | None, position: Tensor, column: Tensor
    ) -> Swept:
        """One layer and direction: its local errors, completed by the cotangents of its final state, swept back."""
        errors: list[Tensor | None] = [error, *[None] * (self.stack.cell.states - 1)]
        for i, d_final in enumerate(self.d_finals):
            if d_final is not None:
                size = d_final.shape[-1]
                base = errors[i]
                if base is None:
                    base = d_final.new_zeros(frames.R, len(frames.start), size)
                device = d_final.device
                value = d_final[k].index_select(0, frames.lane[column].to(device))
                errors[i] = base.index_put((position.to(device), column.to(device)), value, accumulate=True)
        return self.stack.kernel.sweep(
            self.stack.cell, self.weights[k], tape, frames, tuple(errors), self.stack.edges(k, self.x.dtype)
        )

    # Stage 4 ---------------------------------------------------------------------------------------------------------

    def _finish(
        self, k: int, tape: Tape, x: Tensor, sums: _Sums, dx: Tensor | None, needs_dx: bool = True
    ) -> Tensor | None:
        """(6.4): one product per weight over all steps and lanes; returns `dx` plus this direction's part of it."""
        stack, w = self.stack, self.weights[k]
        needs = self.needs_weights[k * stack.per_layer : (k + 1) * stack.per_layer]
        needs_dx = needs_dx and (k >= stack.directions or self.needs_x)
        self.d_initial[k] = sums.initial
        da = given(sums.da)
        da_hh = stack.cell.recurrent(da, tape.gates)
        grads: list[Tensor | None] = [_outer(da, x), _outer(da_hh, tape.prev[0])] if any(needs[:2]) else [None, None]
        if stack.biased:
            grads += [da.sum((0, 1)), da_hh.sum((0, 1))] if any(needs[2:4]) else [None, None]
        if w.hr is not None:
            grads.append(_outer(given(sums.h), stack.cell.projected(tape.gates, tape.state)) if needs[-1] else None)
        self.d_weights[k] = tuple(g if need else None for g, need in zip(grads, needs, strict=True))
        if self.collects_h:
            self.adjoints[k] = given(sums.h)
        if not needs_dx:
            return dx
        part = stack.turn(da @ w.ih, k % stack.directions)
        return part if dx is None else dx + part

    # What the tape holds ---------------------------------------------------------------------------------------------

    def _unpack(self, tape: tuple[Tensor, ...]) -> list[tuple[tuple[Tensor, ...], Tensor | None]]:
        """(states after each step, gates if kept) of every layer and direction. The top h is the output itself."""
        stack, rest = self.stack, iter(tape)
        K, top = stack.layers * stack.directions, (stack.layers - 1) * stack.directions
        with_gates = len(tape) == K * stack.cell.states - stack.directions + K
        kept = []
        for k in range(K):
            h = next(rest) if k < top else stack.turn(stack.half(self.y, k - top), k - top)
            states = (h, *(next(rest) for _ in range(stack.cell.states - 1)))
            kept.append((states, next(rest) if with_gates else None))
        return kept

    def _below(self, layer: int) -> Tensor:
        """The input of a layer `[T, B, I or D*P]`, in forward time."""
        if layer == 0:
            return self.x
        stack, D = self.stack, self.stack.directions
        hs = [stack.turn(self.kept[(layer - 1) * D + d][0][0], d) for d in range(D)]
        return stack.masked(hs[0] if D == 1 else torch.cat(hs, -1), layer)

    def _tape(self, k: int, x: Tensor) -> Tape:
        """The tape of layer and direction k; gates that were not kept are rebuilt by one product over all steps."""
        cell, w = self.stack.cell, self.weights[k]
        states, gates = self.kept[k]
        prev = tuple(torch.cat([s0[None], s[:-1]]) for s0, s in zip(self.initial[k], states, strict=True))
        resets = self.stack.resets_of(k % self.stack.directions)
        if resets is not None:
            prev = tuple(s.masked_fill(resets, 0) for s in prev)
        if cell.taped_per_unit == 0:
            gates = x.new_empty(*x.shape[:2], 0)
        elif gates is None:
            gates = self._rebuilt(x, prev[0], w)
        return Tape(states, prev, gates)

    def _rebuilt(self, x: Tensor, h: Tensor, w: Weights) -> Tensor:
        """The gates of all steps by one product, in a few slices of time to bound what it needs besides."""
        cell = self.stack.cell
        if torch.is_grad_enabled():  # autograd would keep what a slice needs, and pay for writing in place
            return cell.gates(cell.project(x, w), h, w)
        T, B, _ = x.shape
        gates = x.new_empty(T, B, cell.taped(w))
        steps = max(1, REBUILD_VALUES // max(1, B * w.hh.shape[0]))
        for t in range(0, T, steps):
            part = slice(t, t + steps)
            gates[part] = cell.gates(cell.project(x[part], w), h[part], w)
        return gates

    def _columns(self, frames: Frames) -> int:
        """How many columns a group may have: all, where together they are hardly more than the sequence itself."""
        if frames.R * len(frames.start) <= SWEEP_SEQUENCES * frames.T * frames.B:
            return len(frames.start)
        return max(1, SWEEP_VALUES // (frames.R * 4 * self.weights[0].hh.shape[0]))


@dataclass
class _Sums:
    """What the sweeps of one layer and direction have brought back so far, summed over blocks."""

    da: Tensor | None = None  # [T, B, G*H]
    h: Tensor | None = None  # [T, B, P], the adjoints of h, where collected
    initial: tuple[Tensor, ...] = ()  # h [B, P], c [B, H]

    def add(self, frames: Frames, swept: Swept, collects_h: bool) -> None:
        initial = swept.initial
        if not frames.whole:
            columns, device = frames.initials(), swept.da.device
            lane, columns = frames.lane[columns].to(device), columns.to(device)
            initial = tuple(s.new_zeros(frames.B, s.shape[1]).index_add(0, lane, s[columns]) for s in initial)
        if self.initial:
            initial = tuple(a + b for a, b in zip(self.initial, initial, strict=True))
        self.initial = initial
        self.da = frames.collect(swept.da, self.da)
        if collects_h:
            self.h = frames.collect(swept.adjoints[0], self.h)


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """Sum over steps and lanes of left_t right_t': `[T, B, M]`, `[T, B, N]` -> `[M, N]`, one product."""
    return left.flatten(0, 1).t() @ right.flatten(0, 1)


def given(tensor: Tensor | None) -> Tensor:
    """A tensor that is never None by the program's contract."""
    assert tensor is not None
    return tensor
