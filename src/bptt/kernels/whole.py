"""Whole passes over one layer in one direction: the walks of `cpu`, prepared for calls of the same sizes.

Of a small call the arithmetic is the smaller part. What follows from its sizes is here from the last such call, a pass
is one crossing into compiled code, and all that it needs besides its results lies in the scratch memory there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _walks
from .addresses import at, widened
from .kernel import Edges, Tensors, WholeRequest

__all__ = ["WholeWalks"]


class WholeWalks:
    """The compiled walks for calls of the same sizes: see `WholePasses`. Holds no tensor of a call, and may be used by
    several threads.

    code: the cell's number in csrc. forward, infer, sweep: the classes of the walks. pulls: whether the products over
    all steps are done with the sweep.
    """

    own_tape = False

    def __init__(
        self, request: WholeRequest, code: int, variant: int, forward: Any, infer: Any, sweep: Any, pulls: bool
    ) -> None:
        cell, self.dtype, T, B, I, H, biased, self.frames, gates, reverse = request
        GH = cell.gates_per_unit * H
        self.variant, self.biased, self.pulls, self.states = variant, biased, pulls, cell.states
        self.y, self.h, self.last = (T, B, H), (T + 1, B, H), (1, B, H)
        self.x, self.ih, self.hh, self.b = (T, B, I), (GH, I), (GH, H), (GH,)
        self.leaving = self.last if self.frames.whole else (len(self.frames.start), H)
        self.keeps = gates and cell.taped_per_unit > 0
        self.gates = T, B, cell.taped_per_unit * H if self.keeps else GH
        state_is_tape = cell.taped_per_unit == 0
        first = 0 if reverse else B * H * self.dtype.itemsize
        self.first_gates = first if state_is_tape else None  # from h, where that holds them
        initial, biases = (self.last,) * cell.states, (self.b,) * (2 * biased)
        self.shapes = self.x, *initial, self.ih, self.hh, *biases
        tape = (self.h,) * cell.states + (self.gates,) * self.keeps
        self.shapes_back = self.x, self.ih, self.hh, *tape, self.y, *initial
        self.walks = forward(), infer(), sweep()
        for walk in self.walks:
            walk.cell, walk.T, walk.B, walk.I, walk.H, walk.P, walk.reverse = code, T, B, I, H, H, reverse
        forward_walk, _, back = self.walks
        forward_walk.stride, forward_walk.keeps = self.gates[2], self.keeps
        order = self.frames.walks
        back.N, back.R, back.error_stride = len(self.frames.start), self.frames.R, H
        back.columns, back.counts = order.columns.data_ptr(), order.counts.data_ptr()

    def places(self, tensors: tuple[Tensor, ...]) -> tuple[int, ...] | None:
        return _walks.places(tensors, self.shapes, self.dtype)

    def infer(
        self, tensors: tuple[Tensor, ...], places: tuple[int, ...], edges: Sequence[Edges] = ()
    ) -> tuple[Tensor, ...]:
        walk = self._copy(1, places, edges)
        outputs = self._outputs(walk, tensors[0])
        walk.run(variant=self.variant, threads=torch.get_num_threads())
        return outputs

    def taped(
        self, tensors: tuple[Tensor, ...], places: tuple[int, ...], edges: Sequence[Edges] = ()
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        walk, x = self._copy(0, places, edges), tensors[0]
        outputs = self._outputs(walk, x)
        h = x.new_empty(self.h)
        walk.h = at_h = h.data_ptr()
        tape: tuple[Tensor, ...] = (h,)
        if self.states == 2:
            c = x.new_empty(self.h)
            walk.c = c.data_ptr()
            tape = h, c
        if self.first_gates is not None:
            walk.gates = at_h + self.first_gates
        else:
            gates = x.new_empty(self.gates)
            walk.gates = gates.data_ptr()
            if self.keeps:
                tape = *tape, gates
        walk.run(variant=self.variant, threads=torch.get_num_threads())
        return outputs, tape

    def _copy(self, which: int, places: tuple[int, ...], edges: Sequence[Edges]) -> Any:
        """The walk, with the places of what it computes from."""
        walk = self.walks[which].copy()
        if edges and edges[0].resets is not None:
            walk.resets = edges[0].resets.data_ptr()
        if self.states == 2:
            walk.x, walk.h_0, walk.c_0, walk.w_ih, walk.w_hh, *biases = places
        else:
            walk.x, walk.h_0, walk.w_ih, walk.w_hh, *biases = places
        if self.biased:
            walk.b_ih, walk.b_hh = biases
        return walk

    def _outputs(self, walk: Any, x: Tensor) -> tuple[Tensor, ...]:
        """The outputs, before they are computed."""
        y, h_n = x.new_empty(self.y), x.new_empty(self.last)
        walk.y = y.data_ptr()
        walk.h_n = h_n.data_ptr()
        if self.states == 1:
            return y, h_n
        c_n = x.new_empty(self.last)
        walk.c_n = c_n.data_ptr()
        return y, h_n, c_n

    def pulled(
        self,
        tensors: tuple[Tensor, ...],
        tape: tuple[Tensor, ...],
        cotangents: Tensors,
        needs: tuple[bool, ...],
        edges: Sequence[Edges] = (),
    ) -> Tensors | None:
        states = self.states
        needs_initial, needs_weight = True in needs[1 : 1 + states], True in needs[1 + states :]
        if not self.pulls or not (needs[0] or needs_weight):
            return None
        x, dy = tensors[0], cotangents[0]
        if dy is not None and not dy.is_contiguous():
            dy = dy.contiguous()
        given = (x, *tensors[1 + states : 3 + states], *tape, dy, *cotangents[1:])
        places = _walks.places(given, self.shapes_back, self.dtype)
        if places is None:
            return None
        walk = self.walks[2].copy()
        walk.x, walk.w_ih, walk.w_hh, walk.h, *rest = places
        if states == 2:
            walk.c, walk.gates, walk.errors, walk.arriving_h, walk.arriving_c = rest
        elif self.keeps:
            walk.gates, walk.errors, walk.arriving_h = rest
        else:
            walk.errors, walk.arriving_h = rest
        if edges:
            resets, factors = edges[0].resets, widened(edges[0].factors)  # alive until the walk is over
            walk.resets, walk.edge_factors = at(resets), at(factors)
        grads: list[Tensor | None] = [None] * len(needs)
        if needs[0]:
            grads[0] = dx = x.new_empty(self.x)
            walk.dx = dx.data_ptr()
        if needs_initial:
            grads[1] = dh = x.new_empty(self.leaving)
            walk.leaving_h = dh.data_ptr()
            if states == 2:
                grads[2] = dc = x.new_empty(self.leaving)
                walk.leaving_c = dc.data_ptr()
        if needs_weight:
            dw_ih, dw_hh = x.new_empty(self.ih), x.new_empty(self.hh)
            walk.dw_ih = dw_ih.data_ptr()
            walk.dw_hh = dw_hh.data_ptr()
            grads[1 + states : 3 + states] = dw_ih, dw_hh
            if self.biased:
                db_ih, db_hh = x.new_empty(self.b), x.new_empty(self.b)
                walk.db_ih = db_ih.data_ptr()
                walk.db_hh = db_hh.data_ptr()
                grads[3 + states :] = db_ih, db_hh
        walk.run(variant=self.variant, threads=torch.get_num_threads())
        if needs_initial and not self.frames.whole:
            of_lanes = self.frames.collect_initial(grads[1 : 1 + states])
            grads[1 : 1 + states] = [None if s is None else s[None] for s in of_lanes]
        return tuple(grads) if False not in needs else _needed(grads, needs)


def _needed(grads: list[Tensor | None], needs: tuple[bool, ...]) -> Tensors:
    return tuple([grad if needed else None for grad, needed in zip(grads, needs, strict=True)])
