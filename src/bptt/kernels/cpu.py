"""The CPU kernel: compiled walks (csrc/) with the recurrent product and the gates fused. Large products are torch's.

Legend: T steps, B lanes, F taped gate values, R positions and N columns of a sweep (see `frames`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..cells import Cell, Weights
from ..policies import Reach
from . import _walks
from .addresses import at, check, computed_in, dense, restart, spaced_rows, widened
from .heap import keep_heap
from .kernel import Request, Sweep, SweepResult, WholePasses, WholeRequest
from .packed_rows import PackedRows
from .product import BY_MKL, input_product
from .row_sums import inner_sums, row_sums
from .variants import chosen_variant, variants
from .whole import WholeWalks

__all__ = ["Cpu", "variants"]

FORWARD = {
    torch.float32: _walks.ForwardFloat32,
    torch.float64: _walks.ForwardFloat64,
    torch.bfloat16: _walks.ForwardBfloat16,
}
INFER = {torch.float32: _walks.InferFloat32, torch.float64: _walks.InferFloat64}
SWEEP = {
    torch.float32: _walks.SweepFloat32,
    torch.float64: _walks.SweepFloat64,
    torch.bfloat16: _walks.SweepBfloat16,
}

CODES = {"RNN_TANH": 0, "RNN_RELU": 1, "RNN_IDENTITY": 2, "RNN_SIGMOID": 3, "GRU": 4, "LSTM": 5}
"""The enum Cell of csrc/walks.hpp, by the mode of the cell: those that have a walk."""

SMALL = 15_000_000
"""Multiplications in the products over all steps, one way, up to which they are done with the walk: measured at B = 1,
H = 128, where they took four fifths of the time of a BLAS's calls."""

NEAR = 2**18, 40_000_000 if BY_MKL else 70_000_000
"""Weights up to which they stay in a cache of a core, and with which that holds up to so many multiplications."""

FEW_ROWS, FEW_ROWS_BACK = 32, 16
"""Rows of all steps together up to which that holds whatever their size: forward the walk multiplies by the weights as
they lie (few_rows of csrc/product.hpp); backward so few rows make a product with hardly a sum in it."""


COPIED = 2**16
"""Bytes of y up to which a whole pass copies it out of its tape, so that a caller may write to it: a view of the tape,
and a witness that tells whether the caller did, take as long as 2**17 bytes."""


class Cpu:
    """The CPU kernel: stage 1 and stage 3 in C++, float32 and float64; and bfloat16, as which a tape is stored and
    results come, while states, sums and all arithmetic are float32.

    variant: an instruction set by name; None is the widest that this machine runs.
    """

    name = "cpu"
    own_gradients = False
    follows_autocast = False

    def __init__(self, variant: str | None = None) -> None:
        self.variant: str | None
        self.variant, self._variant = chosen_variant(variant)

    def refuses(self, request: Request) -> str | None:
        if request.device.type != "cpu":
            return f"it runs on the CPU, not on {request.device}"
        if request.dtype not in FORWARD:
            return f"it computes float32, float64 and bfloat16, not {request.dtype}"
        if request.cell.mode not in CODES:
            return f"it has no walk for {request.cell.name}"
        return None

    def hesitates(self, request: Request) -> str | None:
        return request.gains

    def taped_per_unit(self, cell: Cell, reach: Reach) -> int:
        return cell.taped_per_unit

    def forward(
        self,
        cell: Cell,
        x: Tensor,
        initial: tuple[Tensor, ...],
        resets: Tensor | None,
        w: Weights,
        tape_gates: bool,
        lengths: Tensor | None,
        reset_state: tuple[Tensor, ...] = (),
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
        way = Way(initial, resets, w, reset_state, False)
        small = lengths is None and _is_small(x, w, FEW_ROWS)
        made = CompiledForward(cell, x, way, tape_gates, lengths, None, small)
        if made.walk is not None:
            made.walk.run(variant=self._variant, threads=torch.get_num_threads())
        return made.result

    def packed(
        self,
        cell: Cell,
        x: Tensor,
        initial: tuple[Tensor, ...],
        w: Weights,
        tape_gates: bool,
        rows: PackedRows,
        d: int,
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
        way = Way(initial, None, w, (), d == 1)
        x = x[None]
        made = CompiledForward(cell, x, way, tape_gates, None, rows, _is_small(x, w, FEW_ROWS))
        if made.walk is not None:
            made.walk.run(variant=self._variant, threads=torch.get_num_threads())
        return made.result

    def _forward(
        self,
        cell: Cell,
        x: Tensor,
        initial: tuple[Tensor, ...],
        resets: Tensor | None,
        w: Weights,
        tape_gates: bool,
        lengths: Tensor | None,
        reset_state: tuple[Tensor, ...],
        packed: PackedRows | None,
        d: int,
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
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
        into = None if cell.tape_names else h[1:] if packed is None else h[B:][None]
        small = lengths is None and (_is_small(x, w, FEW_ROWS) or _by_conversion(x, w))
        if into is None and (small or stride > GH or lengths is not None):
            into = x.new_empty(*x.shape[:2], stride)
        gates = into if small else input_product(x, w.ih, into, lengths)
        lane = active = None
        if lengths is not None:
            lane = lengths.argsort(descending=True)
            active = B - torch.searchsorted(lengths.sort()[0], torch.arange(T, device="cpu"), right=True)
        # What is computed from lives until the call is over, as these names do. A field that is not set is none.
        h_0, w_hh, b_ih, b_hh = map(widened, (initial[0], w.hh, w.b_ih, w.b_hh))
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
                walk.c_0 = at(c_0)
                walk.c = at(c)
            if w.hr is not None:
                w_hr = widened(w.hr)
                walk.w_hr = at(w_hr)
            if small:
                dense_x, w_ih = dense(x), widened(w.ih)
                walk.x = at(dense_x)
                walk.w_ih = at(w_ih)
            if resets is not None:
                reset_state = tuple([r.to(computed_in(r.dtype)) for r in reset_state])
                resets, ((reset_h, reset_c), steps) = dense(resets), restart(reset_state)
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
                walk.before = at(packed.before(d))
                walk.reverse = d == 1
            walk.run(variant=self._variant, threads=torch.get_num_threads())
        if packed is not None and gates is not None:
            gates = gates[0]
        return (h,) if c is None else (h, c), gates if tape_gates else None

    def infer(self, cell: Cell, x: Tensor, hx: tuple[Tensor, ...], w: Weights) -> tuple[Tensor, ...] | None:
        check(cell, x, hx, w, layers=(1,))
        T, B, inputs = x.shape
        GH, P = w.hh.shape
        if B == 0 or x.dtype not in INFER or not _is_small(x, w, FEW_ROWS):
            return None
        H = GH // cell.gates_per_unit
        y, h_n, c_n = x.new_empty(T, B, P), x.new_empty(1, B, P), x.new_empty(1, B, H) if cell.states == 2 else None
        given: tuple[Tensor | None, ...] = (x, *w, *hx)
        for t in given:
            if t is not None and (not t.is_contiguous() or t.is_neg() or t._is_zerotensor()):
                given = tuple(map(dense, given))  # alive until the call is over
                break
        walk = INFER[x.dtype]()
        walk.cell = CODES[cell.mode]
        walk.T = T
        walk.B = B
        walk.I = inputs
        walk.H = H
        walk.P = P
        walk.x, walk.w_ih, walk.w_hh, walk.b_ih, walk.b_hh, walk.w_hr, walk.h_0, *c_0 = map(at, given)
        walk.y = at(y)
        walk.h_n = at(h_n)
        if c_n is not None:
            walk.c_0, walk.c_n = c_0[0], at(c_n)
        walk.run(variant=self._variant, threads=torch.get_num_threads())
        return (y, h_n) if c_n is None else (y, h_n, c_n)

    def whole(self, request: WholeRequest) -> WholePasses | None:
        cell, rows = request.cell, request.T * request.B
        weights = cell.gates_per_unit * request.H * (request.I + request.H)
        small = rows > 0 and request.dtype in INFER and is_small(rows, weights, FEW_ROWS)
        if not small or rows * request.H * request.dtype.itemsize > COPIED:
            return None
        pulls = request.frames.walks.covers and is_small(rows, weights, FEW_ROWS_BACK)
        pulls = pulls and (request.gates or cell.taped_per_unit == 0)
        walks = FORWARD[request.dtype], INFER[request.dtype], SWEEP[request.dtype]
        return WholeWalks(request, CODES[cell.mode], self._variant, *walks, pulls)

    def sweep(self, request: Sweep) -> SweepResult:
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
        if x is not None and wanted and (_is_small(x, w, FEW_ROWS_BACK) or _by_conversion(x, w)):
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
        # What is computed from lives until the call is over, as these names do. A field that is not set is none.
        h, gates, w_hh = dense(tape.states[0]), dense(tape.gates), widened(w.hh)
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
            c = dense(tape.states[1])
            walk.c = at(c)
            walk.arriving_c = at(arriving[1]) if arriving else 0
            walk.adjoint_c = at(adjoints[1]) if len(adjoints) == 2 else 0
            walk.leaving_c = at(leaving[1]) if leaving else 0
        if w.hr is not None:
            w_hr = widened(w.hr)
            walk.w_hr = at(w_hr)
        if tape.resets is not None:
            resets, ((reset_h, reset_c), steps) = dense(tape.resets), restart(tape.reset_state)
            walk.resets = at(resets)
            walk.reset_h = at(reset_h)
            walk.reset_c = at(reset_c)
            walk.reset_h_step, walk.reset_c_step = steps
        if packed is not None:
            tops, before = packed.tops(frames, request.direction), packed.before(request.direction)
            walk.tops = at(tops)
            walk.before = at(before)
            walk.S = packed.S
        if request.edge_factors is not None:
            factors = widened(request.edge_factors)
            walk.edge_factors = at(factors)
        if w_ih is not None:
            x = dense(x)
            walk.x = at(x)
            walk.w_ih = at(w_ih)
            walk.dx = at(dx)
            walk.dw_ih = at(dw_ih)
            walk.dw_hh = at(dw_hh)
        walk.run(variant=self._variant, threads=torch.get_num_threads())
        if stored != computed:
            leaving = tuple([a.to(stored) for a in leaving])
            if totals is None:
                da, adjoints = da.to(stored), tuple([a.to(stored) for a in adjoints])
        if cell.inner is not None and request.x is not None and wanted and request.weights and dw_ih is None:
            dw_ih, dw_hh, bias = inner_sums(self._variant, da, request, H)
        weights: tuple[Tensor | None, ...] = () if dw_ih is None else (dw_ih, dw_hh)
        if bias is not None:
            weights = (dw_ih, dw_hh, *bias.unbind(0))
        recurrent: tuple[Tensor, ...] = ()
        if totals is not None:
            return SweepResult(da[..., width - GH :] if by_position else None, (), leaving)
        if cell.inner is not None:  # its error as the recurrent product sees it comes first in a row
            inner_first, da = da, da[..., H:]
            if dw_hh is None or (bias is None and w.b_hh is not None):  # else nobody asks: a view takes a microsecond
                recurrent = da[..., :-H], inner_first[..., :H]
        return SweepResult(da, adjoints, leaving, recurrent, weights, dx)

    def totals(self, request: Sweep) -> SweepResult:
        cell, frames, states = request.cell, request.frames, request.tape.states
        GH = len(request.w.hh)
        H, new, dtype = GH // cell.gates_per_unit, states[0].new_zeros, computed_in(states[0].dtype)
        adjoints = tuple([new(frames.T, frames.B, s.shape[2], dtype=dtype) for s in states[: request.adjoints]])
        if cell.inner is None:
            return SweepResult(new(frames.T, frames.B, GH, dtype=dtype), adjoints)
        rows = new(frames.T, frames.B, GH + H, dtype=dtype)
        return SweepResult(rows[..., H:], adjoints, (), (rows[..., H:-H], rows[..., :H]))

    def row_sums(
        self, a: Tensor, factors: Sequence[Tensor], rows: Tensor | None, alone: bool
    ) -> tuple[list[Tensor], Tensor | None] | None:
        return row_sums(self._variant, a, factors, rows, alone)


def _is_small(x: Tensor, w: Weights, few: int) -> bool:
    """Whether the products over all steps are done with the walk, since a call of the BLAS would take longer."""
    GH, P = w.hh.shape
    T, B, inputs = x.shape
    return is_small(T * B, GH * (inputs + P), few)


def _by_conversion(x: Tensor, w: Weights) -> bool:
    """Whether the products over all steps with the input's weight are done with the walk, which converts rows as it
    reads and writes them; of weights that do not stay in a cache of a core a BLAS reads less.
    """
    return computed_in(x.dtype) != x.dtype and w.ih.numel() <= NEAR[0]


def is_small(rows: int, weights: int, few: int) -> bool:
    """`_is_small`, of so many rows and weights."""
    near, most = NEAR
    return rows <= few or rows * weights <= (most if weights <= near else SMALL)
