"""The tangents of a net, which its steps carry forward with the states: dh_t = J_t dh_{t-1} + b_t dw + (df/dx) dx_t.

They are those of the full computation whatever the policy, which changes adjoints alone: equations/README.md, 6.8. All
is by operations of torch that autograd can record, so that a tangent has derivatives of every order.

Legend: as in `net`. A tangent has the shape of what it belongs to, and d in front of its name.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..cells import Weights
from ..kernels import KERNELS
from .bidirectional import CheckpointedBidirectional
from .boundary import own_precision
from .net import Net, States
from .records import Tensors, given
from .rules import RULES, reaches_all
from .segments import Checkpointed
from .stack import Stack

__all__ = ["push"]


def push(net: Net, inputs: Tensors, tangents: Tensors) -> tuple[Tensor, ...]:
    """The tangents of y, h_n and, for an LSTM, c_n from those of the inputs, None for zero."""
    with own_precision(given(inputs[0]).device):
        return _Tangents(net, inputs, tangents).outputs()


class _Tangents:
    def __init__(self, net: Net, inputs: Tensors, tangents: Tensors) -> None:
        self.net, self.inputs, first, last = net, inputs, 1 + net.cell.states, net.inputs
        # Zeros for everything but weights, whose products are left out where they do not move.
        self.tangents = tuple(
            torch.zeros_like(given(t)) if d is None and not first <= i < last else d
            for i, (t, d) in enumerate(zip(inputs, tangents, strict=True))
        )
        self.finals: list[States] = []  # the tangents of the states of every layer and direction

    def outputs(self) -> tuple[Tensor, ...]:
        net, D = self.net, self.net.directions
        y, dy = given(self.inputs[0]), given(self.tangents[0])
        weights, initial = net.weights(self.inputs), net.initial(self.inputs)
        d_weights, d_initial = net.weights(self.tangents), net.initial(self.tangents)
        for layer in range(net.layers):
            x, dx = net.masked(y, layer), net.masked(dy, layer)
            halves: list[Tensor] = []
            d_halves: list[Tensor] = []
            for d in range(D):
                k = layer * D + d
                own, d_own = self._walk(
                    k, (net.turn(x, d), net.turn(dx, d)), (initial[k], d_initial[k]), (weights[k], d_weights[k])
                )
                self.finals.append(d_own)
                halves.append(net.turn(own[0][1:], d))
                d_halves.append(net.turn(d_own[0][1:], d))
            y, dy = (h[0] if D == 1 else torch.cat(h, -1) for h in (halves, d_halves))
        return (dy, *[net.last(states) for states in zip(*self.finals, strict=True)])

    def _walk(
        self,
        k: int,
        x_dx: tuple[Tensor, Tensor],
        initial: tuple[States, States],
        weights: tuple[Weights, Weights],
    ) -> tuple[States, States]:
        """(states, their tangents) of layer and direction k `[T+1, B, .]`, in its own time, as in `Tape`."""
        net, cell = self.net, self.net.cell
        (x, dx), (state, d_state), (w, dw) = x_dx, initial, weights
        resets = net.resets_of(k % net.directions)
        restart, d_restart = net.reset_state(self.inputs, k), net.reset_state(self.tangents, k)
        gx, dgx = cell.project(x, w), _moved(dx, x, cell.input_weight(w), dw.ih, dw.b_ih)
        series, d_series = [state], [d_state]
        for t in range(x.shape[0]):
            if resets is not None:
                state = _restarted(resets[t], state, restart, t)
                d_state = _restarted(resets[t], d_state, d_restart, t)
            gates = cell.gates(gx[t], state[0], w)
            after = cell.advance(gates, state, w)
            through = _moved(d_state[0], state[0], w.hh, dw.hh, dw.b_hh)
            d_state = cell.push(dgx[t], through, d_state, gates, state, after, w)
            if dw.hr is not None:
                d_state = (d_state[0] + functional.linear(cell.projected(gates, after), dw.hr), *d_state[1:])
            state = after
            series.append(state)
            d_series.append(d_state)
        own, d_own = (tuple(map(torch.stack, zip(*steps, strict=True))) for steps in (series, d_series))
        return own, d_own


def _restarted(resets: Tensor, state: States, restart: States, t: int) -> States:
    """The state before step t, replaced where it is reset, or its tangent."""
    if not restart:
        return tuple(s.masked_fill(resets, 0) for s in state)
    return tuple(torch.where(resets, r if r.dim() == 2 else r[t], s) for r, s in zip(restart, state, strict=True))


def _moved(dx: Tensor, x: Tensor, w: Tensor, dw: Tensor | None, db: Tensor | None) -> Tensor:
    """The tangent of x w' + b."""
    moved = functional.linear(dx, w, db)
    return moved if dw is None else moved + functional.linear(x, dw)


class _NetRules:
    """The rules of every program of a net: see `rules.Rules`."""

    def weights(self, program: Any) -> range:
        net = program.net
        return range(1 + net.cell.states, net.inputs)

    def of_lanes(self, program: Any, times: int) -> Any:
        return program  # which finds its lanes in its tensors

    def tapes(self, program: Any) -> bool:
        return not program.net.kernel.own_gradients

    def visible(self, program: Any) -> Stack:
        return Stack(replace(program.net, kernel=KERNELS["eager"]), "states")

    def sums_by_group(self, program: Any) -> bool:
        return not program.net.kernel.own_gradients

    def is_uncut(self, program: Any, x: Tensor) -> bool:
        return not program.net.xi and reaches_all(program.net.reach, x.shape[0])

    def by_tangents(self, program: Any, x: Tensor) -> bool:
        return False

    def push(self, program: Any, inputs: Tensors, tangents: Tensors) -> tuple[Tensor, ...]:
        return push(program.net, inputs, tangents)


for kind in (Stack, Checkpointed, CheckpointedBidirectional):
    RULES[kind] = _NetRules()
