"""A walk forward through time of the compiled kernel: its fields, and the tensors that it fills.

Legend: T steps, B lanes, F taped gate values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..cells import Cell
from . import _walks
from .addresses import at, check, computed_in, dense, restart, widened
from .heap import keep_heap
from .kernel import Way
from .packed_rows import PackedRows
from .product import input_product

__all__ = ["CODES", "FORWARD", "CompiledForward"]

FORWARD = {
    torch.float32: _walks.ForwardFloat32,
    torch.float64: _walks.ForwardFloat64,
    torch.bfloat16: _walks.ForwardBfloat16,
}

CODES = {"RNN_TANH": 0, "RNN_RELU": 1, "RNN_IDENTITY": 2, "RNN_SIGMOID": 3, "GRU": 4, "LSTM": 5}
"""The enum Cell of csrc/walks.hpp, by the mode of the cell: those that have a walk."""


class CompiledForward:
    """A walk of stage 1, to be run once while this lives.

    walk: None where there is no lane. result: what `Kernel.forward` gives, once the walk has run. small: whether the
    walk does the input product.
    """

    def __init__(
        self,
        cell: Cell,
        x: Tensor,
        way: Way,
        tape_gates: bool,
        lengths: Tensor | None,
        packed: PackedRows | None,
        small: bool,
    ) -> None:
        initial, resets, w, reset_state, _ = way
        self.walk: Any = None
        T, B, inputs = x.shape
        leading: tuple[int, ...] = (T + 1, B)
        if packed is not None:
            T, B = packed.T, packed.B
            leading = (B + packed.S,)
        check(cell, x, initial, w, reset_state, B)
        GH, P = w.hh.shape
        H = GH // cell.gates_per_unit
        keep_heap(len(x) * x.shape[1] * GH * x.element_size())
        h = x.new_empty(*leading, P)
        c = x.new_empty(*leading, H) if cell.states == 2 else None
        stride = cell.taped(w) if tape_gates else GH
        # The input product comes first, into what the walk makes gates of or, where the state is the tape, states.
        into = None if cell.tape_names else h[B:][None] if packed is not None else h[:-1] if way.reverse else h[1:]
        if into is None and (small or stride > GH or lengths is not None):
            into = x.new_empty(*x.shape[:2], stride)
        gates = into if small else input_product(x, w.ih, into, lengths)
        lane = active = None
        if lengths is not None:
            lane = lengths.argsort(descending=True)
            active = B - torch.searchsorted(lengths.sort()[0], torch.arange(T, device="cpu"), right=True)
        # What is computed from lives until the call is over, as `self.alive` does. A field that is not set is none.
        h_0, w_hh, b_ih, b_hh = map(widened, (initial[0], w.hh, w.b_ih, w.b_hh))
        alive: list[Any] = [h_0, w_hh, b_ih, b_hh, gates, lane, active]
        if B:
            walk = FORWARD[x.dtype]()
            walk.cell = CODES[cell.mode]
            walk.T = T
            walk.B = B
            walk.I = inputs
            walk.H = H
            walk.P = P
            walk.stride = stride
            walk.keeps = tape_gates
            walk.gates = at(gates)
            walk.h_0 = at(h_0)
            walk.w_hh = at(w_hh)
            walk.b_ih = at(b_ih)
            walk.b_hh = at(b_hh)
            walk.h = at(h)
            if c is not None:
                c_0 = widened(initial[1])
                alive.append(c_0)
                walk.c_0 = at(c_0)
                walk.c = at(c)
            if w.hr is not None:
                w_hr = widened(w.hr)
                alive.append(w_hr)
                walk.w_hr = at(w_hr)
            if small:
                dense_x, w_ih = dense(x), widened(w.ih)
                alive += dense_x, w_ih
                walk.x = at(dense_x)
                walk.w_ih = at(w_ih)
            if resets is not None:
                reset_state = tuple([r.to(computed_in(r.dtype)) for r in reset_state])
                resets, ((reset_h, reset_c), steps) = dense(resets), restart(reset_state)
                alive += resets, reset_h, reset_c
                walk.resets = at(resets)
                walk.reset_h = at(reset_h)
                walk.reset_c = at(reset_c)
                walk.reset_h_step, walk.reset_c_step = steps
            if lengths is not None:
                walk.lane = at(lane)
                walk.active = at(active)
            if packed is not None:
                walk.active = at(packed.sizes)
                walk.first = at(packed.first)
                walk.before = at(packed.before(int(way.reverse)))
            walk.reverse = way.reverse
            self.walk = walk
        if packed is not None and gates is not None:
            gates = gates[0]
        self.alive = alive
        self.result: tuple[tuple[Tensor, ...], Tensor | None]
        self.result = (h,) if c is None else (h, c), gates if tape_gates else None
