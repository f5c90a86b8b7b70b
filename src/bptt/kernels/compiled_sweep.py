"""A walk back through time of the compiled kernel: its fields, and the tensors that it fills.

Legend: T steps, B lanes; R positions and N columns of a sweep (see `frames`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _walks
from .addresses import at, computed_in, dense, restart, spaced_rows, widened
from .compiled_forward import CODES
from .kernel import Sweep, SweepResult
from .row_sums import inner_sums

__all__ = ["SWEEP", "CompiledSweep"]

SWEEP = {
    torch.float32: _walks.SweepFloat32,
    torch.float64: _walks.SweepFloat64,
    torch.bfloat16: _walks.SweepBfloat16,
}


class CompiledSweep:
    """A walk of stage 3, to be run once while this lives.

    small: whether the walk may do the products over all steps.
    """

    def __init__(self, request: Sweep, variant: int, small: bool) -> None:
        cell, w, tape, frames, by_position = request.cell, request.w, request.tape, request.frames, request.by_position
        GH, P = w.hh.shape
        N, H = frames.start.shape[0], GH // cell.gates_per_unit
        walks, packed, totals = frames.walks, request.packed, request.totals
        size = (frames.R, N) if by_position else (frames.T, frames.B) if packed is None else (1, packed.S)
        covers = walks.covers if packed is None else not walks.overlaps and int(walks.columns[2].sum()) == packed.S
        covers = covers and not by_position and totals is None
        new = tape.states[0].new_empty if covers else tape.states[0].new_zeros
        stored = tape.states[0].dtype
        computed = computed_in(stored)  # as what sums over columns come, and what is not of every step
        width = GH if cell.inner is None else GH + H
        sums: Tensor | None = None
        if totals is None:
            summed = walks.overlaps and not by_position
            da = new(*size, width, dtype=computed if summed else stored)
            sums = da if summed else None
            adjoints = tuple([new(*size, s.shape[-1], dtype=computed) for s in tape.states[: request.adjoints]])
        else:
            sums, adjoints = totals.recurrent[-1] if totals.recurrent else totals.da, totals.adjoints
            da = tape.states[0].new_empty(*size if by_position else (0, 0), width)
            if by_position and len(walks.short):
                da[:, walks.short] = 0
        leaving: tuple[Tensor, ...] = ()
        if request.leaving:
            leaving = tuple([s.new_empty(N, s.shape[-1], dtype=computed) for s in tape.states])
        x, dx, dw_ih, dw_hh, bias = request.x, None, None, None, None
        wanted = covers and N > 0 and (request.weights or request.dx)
        w_ih = None
        if x is not None and wanted and small:
            w_ih = widened(w.ih)
            dx = x.new_empty(x.shape) if request.dx else None
            if stored != computed:
                x = None
            elif request.weights:
                dw_ih, dw_hh = w.ih.new_empty(w.ih.shape), w.hh.new_empty(w.hh.shape)
                bias = da.new_empty(2, GH) if request.bias else None
        else:
            x = None
        for a in request.arriving:
            if a is not None and a.shape[0] < walks.rows:
                shapes = ", ".join(str(list(a.shape)) for a in request.arriving if a is not None)
                raise RuntimeError(
                    f"what arrives must have the {walks.rows} rows that are asked for: got shapes {shapes}"
                )
        # A field that is not set is none.
        h, gates, w_hh = dense(tape.states[0]), dense(tape.gates), widened(w.hh)
        kept: list[Tensor | None] = []
        errors, stride = (None, 0) if request.errors is None else spaced_rows(request.errors)
        walk = SWEEP[stored]()
        walk.cell = CODES[cell.mode]
        walk.T = frames.T
        walk.B = frames.B
        walk.I = w.ih.shape[1]
        walk.H = H
        walk.P = P
        walk.N = N
        walk.R = frames.R
        walk.by_position = by_position
        walk.errors_by_position = by_position if totals is None else request.errors_by_position
        walk.columns = walks.columns.data_ptr()
        walk.counts = walks.counts.data_ptr()
        walk.h = at(h)
        walk.gates = at(gates)
        walk.errors = at(errors)
        walk.error_stride = stride
        walk.w_hh = at(w_hh)
        if sums is not da:
            walk.da = da.data_ptr()
        if sums is not None:
            walk.sums = sums.data_ptr()
        if bias is not None:
            walk.db_ih = bias.data_ptr()
            walk.db_hh = bias.data_ptr() + bias.element_size() * GH
        arriving = tuple(map(widened, request.arriving))
        if arriving:
            walk.arriving_h = at(arriving[0])
        if adjoints:
            walk.adjoint_h = adjoints[0].data_ptr()
        if leaving:
            walk.leaving_h = leaving[0].data_ptr()
        if cell.states == 2:
            kept.append(c := dense(tape.states[1]))
            walk.c = at(c)
            walk.arriving_c = at(arriving[1]) if arriving else 0
            walk.adjoint_c = at(adjoints[1]) if len(adjoints) == 2 else 0
            walk.leaving_c = at(leaving[1]) if leaving else 0
        if w.hr is not None:
            kept.append(w_hr := widened(w.hr))
            walk.w_hr = at(w_hr)
        if tape.resets is not None:
            resets, ((reset_h, reset_c), steps) = dense(tape.resets), restart(tape.reset_state)
            kept += resets, reset_h, reset_c
            walk.resets = at(resets)
            walk.reset_h = at(reset_h)
            walk.reset_c = at(reset_c)
            walk.reset_h_step, walk.reset_c_step = steps
        if packed is not None:
            tops, before = packed.tops(frames, request.direction), packed.before(request.direction)
            kept += tops, before
            walk.tops = at(tops)
            walk.before = at(before)
            walk.S = packed.S
        walk.reverse, walk.positions_turned = tape.reverse, request.turned
        if request.edge_factors is not None:
            kept.append(factors := widened(request.edge_factors))
            walk.edge_factors = at(factors)
        if w_ih is not None:
            x = dense(x)
            kept += x, w_ih
            walk.x = at(x)
            walk.w_ih = at(w_ih)
            walk.dx = at(dx)
            walk.dw_ih = at(dw_ih)
            walk.dw_hh = at(dw_hh)
        # What is computed from lives until the call is over.
        self.alive = h, gates, w_hh, errors, arriving, kept
        self.walk, self.request, self.variant, self.da, self.adjoints, self.leaving = (
            walk, request, variant, da, adjoints, leaving
        )  # fmt: skip
        self.dx, self.weights, self.bias, self.wanted = dx, (dw_ih, dw_hh), bias, wanted

    def result(self) -> SweepResult:
        """What `Kernel.sweep` gives, once the walk has run."""
        request, da, (dw_ih, dw_hh), bias = self.request, self.da, self.weights, self.bias
        cell, w, width = request.cell, request.w, da.shape[-1]
        GH = len(w.hh)
        H = GH // cell.gates_per_unit
        leaving, adjoints, stored = self.leaving, self.adjoints, request.tape.states[0].dtype
        if stored != computed_in(stored):
            leaving = tuple([a.to(stored) for a in leaving])
            if request.totals is None:
                da, adjoints = da.to(stored), tuple([a.to(stored) for a in adjoints])
        if cell.inner is not None and request.x is not None and self.wanted and request.weights and dw_ih is None:
            dw_ih, dw_hh, bias = inner_sums(self.variant, da, request, H)
        weights: tuple[Tensor | None, ...] = () if dw_ih is None else (dw_ih, dw_hh)
        if bias is not None:
            weights = (dw_ih, dw_hh, *bias.unbind(0))
        recurrent: tuple[Tensor, ...] = ()
        if request.totals is not None:
            return SweepResult(da[..., width - GH :] if request.by_position else None, (), leaving)
        if cell.inner is not None:  # its error as the recurrent product sees it comes first in a row
            inner_first, da = da, da[..., H:]
            if dw_hh is None or (bias is None and w.b_hh is not None):  # else nobody asks: a view takes a microsecond
                recurrent = da[..., :-H], inner_first[..., :H]
        return SweepResult(da, adjoints, leaving, recurrent, weights, self.dx)
