"""A policy as a graph that autograd records, which defines derivatives of every order of the gradient, (6.20).

Every time edge is the identity forward and multiplies by xi backward, a cut edge is a detach, and blocks that overlap
have a copy of their window each. The first derivative of this graph is the block sweep of `backward`; it is built where
that derivative is to be differentiated again, which a compiled sweep cannot be.

Legend: as in `net` and `kernels.frames`: R positions and N columns of a sweep, K = layer * D + direction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..kernels import Columns, Frames, scaled
from .boundary import own_precision
from .net import Net, States
from .records import Asked, Tensors, given
from .transforms import tangent_of_a_gradient, transformed, without_reverse

__all__ = ["EdgeFactor", "graph_gradients", "policy_graph"]

StatesOf = Callable[[Tensors], Iterable[States]]
"""From the inputs of a call, the states of every layer and direction: the initial one, then that after each step."""


def graph_gradients(net: Net, tensors: Tensors, asked: Asked, states: StatesOf) -> Tensors:
    """The gradient of every input that needs one, from the cotangents of the outputs, as a recorded computation.

    states: of every layer and direction, the initial state and that after each step, of a call with these inputs.
    """
    needed = [i for i, need in enumerate(asked.needs) if need]

    def reached(*some: Tensor) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """(the outputs that have a cotangent, those cotangents), from the inputs that need a gradient."""
        own = dict(zip(needed, some, strict=True))
        outputs = policy_graph(net, tuple(own.get(i, t) for i, t in enumerate(tensors)), states)
        pairs = [(o, c) for o, c in zip(outputs, asked.cotangents, strict=True) if c is not None]
        return tuple(o for o, _ in pairs), [c for _, c in pairs]

    # Views of their own: a weight that was computed from another input must not pass its gradient on to that one.
    inputs = [t.view_as(t) for t in (given(tensors[i]) for i in needed)]
    with own_precision(given(tensors[0]).device):
        if not all(t.requires_grad for t in inputs):
            # In a transform, of inputs that are constants where this runs, or whose own transform is over.
            _, pull, cotangents = torch.func.vjp(reached, *inputs, has_aux=True)  # type: ignore[misc]  # of torch
            found = iter(pull(tuple(cotangents)))
        else:
            outputs, cotangents = reached(*inputs)
            pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
            found = iter(
                torch.autograd.grad(
                    [o for o, _ in pairs],
                    inputs,
                    [c for _, c in pairs],
                    create_graph=True,
                    materialize_grads=True,
                )
                if pairs
                else map(torch.zeros_like, inputs)
            )
        return tuple(next(found) if need else None for need in asked.needs)


def policy_graph(net: Net, tensors: Tensors, states: StatesOf) -> tuple[Tensor, ...]:
    """The outputs of the net: values as by `Stack.forward`, derivatives of every order as the policy says."""
    x = given(tensors[0])
    T, B, _ = x.shape
    reach = net.blocks(T, B)
    graph = _Graph(net, tensors, states)
    if net.by_block(reach):
        return graph.block_by_block(Columns.of(reach, net.lengths, T, B, net.directions))
    return graph.layer_by_layer(Frames.of(reach, net.lengths, T, B))


class _Graph:
    def __init__(self, net: Net, tensors: Tensors, states: StatesOf) -> None:
        self.net, self.tensors, self.x = net, tensors, given(tensors[0])
        self.states_of = states
        self.weights, self.initial = net.weights(tensors), net.initial(tensors)
        self.entering: list[States] = []  # the states before each step [T+1, B, .], constants, by k
        self.finals: list[States] = []  # the final states [B, .], by k

    def layer_by_layer(self, frames: Frames) -> tuple[Tensor, ...]:
        """Blocks that do not overlap, or a single layer: each layer reads what the one below puts out at all steps."""
        net, y = self.net, self.x
        if not frames.whole:
            self.entering = self._entering()
        for layer in range(net.layers):
            below, halves = net.masked(y, layer), []
            for d in range(net.directions):
                k = layer * net.directions + d
                states = self._advance(k, frames, frames.spread(net.turn(below, d)))
                self.finals.append(_final(frames, states))
                halves.append(net.turn(_owned(frames, states[0], None), d))
            y = torch.cat(halves, -1)
        return self._outputs(y)

    def block_by_block(self, columns: Columns) -> tuple[Tensor, ...]:
        """Overlapping blocks in several layers: a block has a copy of its span in every layer, (7.3) and (7.4)."""
        net, D = self.net, self.net.directions
        self.entering = self._entering()
        below: Tensor | None = None  # [R, N, D*P], in forward positions
        own: list[Tensor] = []
        for layer in range(net.layers):
            if below is not None and net.masks:
                below = below * columns.frames[0].spread(net.masks[layer - 1])
            halves, own = [], []
            for d, frames in enumerate(columns.frames):
                k = layer * D + d
                x = frames.spread(net.turn(self.x, d)) if below is None else columns.turn(below, d)
                states = self._advance(k, frames, x)
                self.finals.append(_final(frames, states))
                halves.append(columns.turn(states[0], d))
                own.append(net.turn(_owned(frames, states[0], columns.owns_losses[d]), d))
            below = torch.cat(halves, -1)
        return self._outputs(torch.cat(own, -1))

    def _outputs(self, y: Tensor) -> tuple[Tensor, ...]:
        return (y, *map(torch.stack, zip(*self.finals, strict=True)))

    def _entering(self) -> list[States]:
        """The states before each step, constants, from a run that is no part of the graph."""
        # Detached at every level: inside nested transforms no_grad holds for the innermost one alone.
        constants = tuple(None if t is None else t.detach() for t in self.tensors)
        return [tuple(s.detach() for s in states) for states in self.states_of(constants)]

    def _advance(self, k: int, frames: Frames, x: Tensor) -> States:
        """The states after each position `[R, N, .]` of layer and direction k. x: its input there `[R, N, .]`.

        A column begins with the state before its first step, held constant, or with the initial state. After its last
        step its state stays what it is, and is read by nobody.
        """
        net, w, device = self.net, self.weights[k], x.device
        state = self._first(k, frames)
        resets, xi = net.resets_of(k % net.directions), net.xi[k] if net.xi else None
        resets = None if resets is None else frames.spread(resets)
        restart = [self._at_columns(frames, s) for s in net.reset_state(self.tensors, k)]
        xi = None if xi is None else frames.spread(xi)
        beyond = None if frames.whole else (frames.steps() > frames.top)[..., None].to(device)
        gx = net.cell.project(x, w)
        series = []
        for r in range(frames.R):
            before = state
            if xi is not None:
                state = tuple(EdgeFactor.apply(s, xi[r]) for s in state)
            if resets is not None:
                if restart:
                    fresh = [s if s.dim() == 2 else s[r] for s in restart]
                    state = tuple(torch.where(resets[r], new, s) for new, s in zip(fresh, state, strict=True))
                else:
                    state = tuple(s.masked_fill(resets[r], 0) for s in state)
            state = net.cell.advance(net.cell.gates(gx[r], state[0], w), state, w)
            if beyond is not None:
                state = tuple(torch.where(beyond[r], old, new) for old, new in zip(before, state, strict=True))
            series.append(state)
        return tuple(map(torch.stack, zip(*series, strict=True)))

    @staticmethod
    def _at_columns(frames: Frames, restart: Tensor) -> Tensor:
        """What a reset restarts from, `[B, F]` -> `[N, F]` for all steps or `[T, B, F]` -> `[R, N, F]`."""
        if restart.dim() == 3:
            return frames.spread(restart)
        return restart if frames.whole else restart.index_select(0, frames.lane.to(restart.device))

    def _first(self, k: int, frames: Frames) -> States:
        """The state that enters each column `[N, .]`."""
        if frames.whole:
            return self.initial[k]
        device = self.x.device
        start, lane = frames.start.to(device), frames.lane.to(device)
        inside = (start > 0)[:, None]
        return tuple(
            torch.where(inside, entering[start, lane], initial.index_select(0, lane))
            for entering, initial in zip(self.entering[k], self.initial[k], strict=True)
        )


class EdgeFactor(torch.autograd.Function):
    """A time edge: the identity, whose adjoint is multiplied by the factor; where that is 0 nothing passes. A tangent
    passes whatever the factor.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(state: Tensor, factor: Tensor) -> Tensor:
        return state.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, adjoint: Tensor) -> tuple[Tensor, None]:
        return (_Scaled.apply if transformed() else scaled)(adjoint, *ctx.saved_tensors), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: Any) -> Tensor:
        (moved,) = without_reverse(tangent)
        return moved


class _Scaled(EdgeFactor):
    """An adjoint after a time edge, which refuses a tangent."""

    @staticmethod
    def forward(adjoint: Tensor, factor: Tensor) -> Tensor:
        return scaled(adjoint, factor)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: Any) -> Tensor:
        raise tangent_of_a_gradient()


def _owned(frames: Frames, h: Tensor, owns_losses: Tensor | None) -> Tensor:
    """`[R, N, P]` -> `[T, B, P]`: at each step what the column gives that owns the loss there; zero in padding."""
    if frames.whole:
        return h
    steps = frames.steps()
    own = (steps >= frames.first) & (steps <= frames.last)
    own = own if owns_losses is None else own & owns_losses
    r, n = own.nonzero(as_tuple=True)
    row = torch.full((frames.T * frames.B,), -1, device=r.device)
    row[steps[r, n] * frames.B + frames.lane[n]] = r * len(frames.start) + n
    row = row.to(h.device)
    rows = h.flatten(0, 1).index_select(0, row.clamp(min=0)).masked_fill((row < 0)[:, None], 0)
    return rows.view(frames.T, frames.B, h.shape[2])


def _final(frames: Frames, states: States) -> States:
    """The states after the last step of each sequence `[B, .]`, where the columns that end there begin their walk."""
    column = (frames.arrives >= 0).nonzero()[:, 0]
    column = column[frames.arrives[column].argsort()]
    position, device = (frames.top - frames.start)[column], states[0].device
    position, column = position.to(device), column.to(device)
    return tuple(s[position, column] for s in states)
