"""The CPU kernel: compiled walks (csrc/) with the recurrent product and the gates fused. Large products are torch's.

Legend: T steps, B lanes, F taped gate values, R positions and N columns of a sweep (see `frames`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..cells import Cell, Weights
from . import _walks
from .kernel import Request, Sweep, SweepResult
from .product import product

__all__ = ["Cpu", "variants"]

FORWARD = {torch.float32: _walks.ForwardFloat32, torch.float64: _walks.ForwardFloat64}
INFER = {torch.float32: _walks.InferFloat32, torch.float64: _walks.InferFloat64}
SWEEP = {torch.float32: _walks.SweepFloat32, torch.float64: _walks.SweepFloat64}

CODES = {"RNN_TANH": 0, "RNN_RELU": 1, "RNN_IDENTITY": 2, "RNN_SIGMOID": 3, "GRU": 4, "LSTM": 5}
"""The enum Cell of csrc/walks.hpp, by the mode of the cell: those that have a walk."""

SMALL = 15_000_000
"""Multiplications in the products over all steps, one way, up to which they are done with the walk: measured at B = 1,
H = 128, where they took four fifths of the time of a BLAS's calls."""

NEAR = 2**18, 70_000_000
"""Weights up to which they stay in a cache of a core, and with which that holds up to so many multiplications."""

FEW_ROWS, FEW_ROWS_BACK = 32, 16
"""Rows of all steps together up to which that holds whatever their size: forward the walk multiplies by the weights as
they lie (few_rows of csrc/product.hpp); backward so few rows make a product with hardly a sum in it."""


def variants() -> list[str]:
    """The instruction sets this machine runs, of those the build has; the widest first, which is the one used."""
    return [name for name, runs in _walks.variants() if runs]


class Cpu:
    """The CPU kernel: stage 1 and stage 3 in C++, float32 and float64.

    variant: an instruction set by name; None is the widest that this machine runs.
    """

    name = "cpu"

    def __init__(self, variant: str | None = None) -> None:
        names = [name for name, _ in _walks.variants()]
        wanted = variants()[0] if variant is None else variant
        if wanted not in variants():
            raise ValueError(f"variant must be one of {', '.join(map(repr, variants()))}: got {variant!r}")
        self.variant: str | None = wanted
        self._variant = names.index(wanted)

    def refuses(self, request: Request) -> str | None:
        if request.device.type != "cpu":
            return f"it runs on the CPU, not on {request.device}"
        if request.dtype not in FORWARD:
            return f"it computes float32 and float64, not {request.dtype}"
        if request.cell.mode not in CODES:
            return f"it has no walk for {request.cell.name}"
        return None

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
        _check(cell, x, initial, w, reset_state)
        T, B, inputs = x.shape
        GH, P = w.hh.shape
        H = GH // cell.gates_per_unit
        h = x.new_empty(T + 1, B, P)
        c = x.new_empty(T + 1, B, H) if cell.states == 2 else None
        stride = cell.taped(w) if tape_gates else GH
        # The input product comes first, into what the walk makes gates of or, where the state is the tape, states.
        into = None if cell.tape_names else h[1:]
        small = lengths is None and _is_small(x, w, FEW_ROWS)
        if into is None and (small or stride > GH or lengths is not None):
            into = x.new_empty(T, B, stride)
        gates = into if small else _input_product(x, w, into, lengths)
        lane = active = None
        if lengths is not None:
            lane = lengths.argsort(descending=True)
            active = B - torch.searchsorted(lengths.sort()[0], torch.arange(T, device="cpu"), right=True)
        # What is computed from lives until the call is over, as these names do. A field that is not set is none.
        h_0, w_hh, b_ih, b_hh = map(_dense, (initial[0], w.hh, w.b_ih, w.b_hh))
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
            walk.gates = _at(gates)
            walk.h_0 = _at(h_0)
            walk.w_hh = _at(w_hh)
            walk.b_ih = _at(b_ih)
            walk.b_hh = _at(b_hh)
            walk.h = _at(h)
            if c is not None:
                c_0 = _dense(initial[1])
                walk.c_0 = _at(c_0)
                walk.c = _at(c)
            if w.hr is not None:
                w_hr = _dense(w.hr)
                walk.w_hr = _at(w_hr)
            if small:
                dense_x, w_ih = _dense(x), _dense(w.ih)
                walk.x = _at(dense_x)
                walk.w_ih = _at(w_ih)
            if resets is not None:
                resets, ((reset_h, reset_c), steps) = _dense(resets), _restart(reset_state)
                walk.resets = _at(resets)
                walk.reset_h = _at(reset_h)
                walk.reset_c = _at(reset_c)
                walk.reset_h_step, walk.reset_c_step = steps
            if lengths is not None:
                walk.lane = _at(lane)
                walk.active = _at(active)
            walk.run(variant=self._variant, threads=torch.get_num_threads())
        return (h,) if c is None else (h, c), gates if tape_gates else None

    def infer(self, cell: Cell, x: Tensor, hx: tuple[Tensor, ...], w: Weights) -> tuple[Tensor, ...] | None:
        _check(cell, x, hx, w, layers=(1,))
        T, B, inputs = x.shape
        GH, P = w.hh.shape
        if B == 0 or not _is_small(x, w, FEW_ROWS):
            return None
        H = GH // cell.gates_per_unit
        h_0, c_0 = hx if cell.states == 2 else (hx[0], None)
        y, h_n, c_n = x.new_empty(T, B, P), x.new_empty(1, B, P), None if c_0 is None else x.new_empty(1, B, H)
        given: tuple[Tensor | None, ...] = (x, w.ih, h_0, c_0, w.hh, w.b_ih, w.b_hh, w.hr)
        for t in given:
            if t is not None and (not t.is_contiguous() or t.is_neg() or t._is_zerotensor()):
                given = tuple(map(_dense, given))  # alive until the call is over
                break
        at_x, w_ih, at_h_0, at_c_0, w_hh, b_ih, b_hh, w_hr = map(_at, given)
        walk = INFER[x.dtype]()
        walk.cell = CODES[cell.mode]
        walk.T = T
        walk.B = B
        walk.I = inputs
        walk.H = H
        walk.P = P
        walk.x = at_x
        walk.w_ih = w_ih
        walk.h_0 = at_h_0
        walk.c_0 = at_c_0
        walk.w_hh = w_hh
        walk.b_ih = b_ih
        walk.b_hh = b_hh
        walk.w_hr = w_hr
        walk.y = _at(y)
        walk.h_n = _at(h_n)
        walk.c_n = _at(c_n)
        walk.run(variant=self._variant, threads=torch.get_num_threads())
        return (y, h_n) if c_n is None else (y, h_n, c_n)

    def sweep(self, request: Sweep) -> SweepResult:
        cell, w, tape, frames, by_position = request.cell, request.w, request.tape, request.frames, request.by_position
        GH, P = w.hh.shape
        N, H = frames.start.shape[0], GH // cell.gates_per_unit
        walks = frames.walks
        rows = (frames.R, N) if by_position else (frames.T, frames.B)
        covers = walks.covers and not by_position
        new = tape.states[0].new_empty if covers else tape.states[0].new_zeros
        da = new(*rows, GH if cell.inner is None else GH + H)
        adjoints = tuple([new(*rows, s.shape[2]) for s in tape.states[: request.adjoints]])
        leaving = tuple([s.new_empty(N, s.shape[2]) for s in tape.states]) if request.leaving else ()
        bias = (da.new_empty if N else da.new_zeros)(2, GH) if request.bias and not by_position else None
        x, dx, dw_ih, dw_hh = request.x, None, None, None
        wanted = covers and N > 0 and (request.weights or request.dx)
        if x is not None and wanted and _is_small(x, w, FEW_ROWS_BACK):
            dx = x.new_empty(x.shape) if request.dx else None
            if request.weights:
                dw_ih, dw_hh = w.ih.new_empty(w.ih.shape), w.hh.new_empty(w.hh.shape)
        else:
            x = None
        for a in request.arriving:
            if a is not None and a.shape[0] < walks.rows:
                shapes = ", ".join(str(list(a.shape)) for a in request.arriving if a is not None)
                raise RuntimeError(
                    f"what arrives must have the {walks.rows} rows that are asked for: got shapes {shapes}"
                )
        # What is computed from lives until the call is over, as these names do. A field that is not set is none.
        h, gates, w_hh = _dense(tape.states[0]), _dense(tape.gates), _dense(w.hh)
        errors, stride = (None, 0) if request.errors is None else _rows(request.errors)
        walk = SWEEP[da.dtype]()
        walk.cell = CODES[cell.mode]
        walk.T = frames.T
        walk.B = frames.B
        walk.I = w.ih.shape[1]
        walk.H = H
        walk.P = P
        walk.N = N
        walk.R = frames.R
        walk.by_position = by_position
        walk.overlaps = walks.overlaps and not by_position
        walk.columns = walks.columns.data_ptr()
        walk.counts = walks.counts.data_ptr()
        walk.h = _at(h)
        walk.gates = _at(gates)
        walk.errors = _at(errors)
        walk.error_stride = stride
        walk.w_hh = _at(w_hh)
        walk.da = da.data_ptr()
        if bias is not None:
            walk.bias = bias.data_ptr()
        arriving = tuple(map(_dense, request.arriving))
        if arriving:
            walk.arriving_h = _at(arriving[0])
        if adjoints:
            walk.adjoint_h = adjoints[0].data_ptr()
        if leaving:
            walk.leaving_h = leaving[0].data_ptr()
        if cell.states == 2:
            c = _dense(tape.states[1])
            walk.c = _at(c)
            walk.arriving_c = _at(arriving[1]) if arriving else 0
            walk.adjoint_c = _at(adjoints[1]) if len(adjoints) == 2 else 0
            walk.leaving_c = _at(leaving[1]) if leaving else 0
        if w.hr is not None:
            w_hr = _dense(w.hr)
            walk.w_hr = _at(w_hr)
        if tape.resets is not None:
            resets, ((reset_h, reset_c), steps) = _dense(tape.resets), _restart(tape.reset_state)
            walk.resets = _at(resets)
            walk.reset_h = _at(reset_h)
            walk.reset_c = _at(reset_c)
            walk.reset_h_step, walk.reset_c_step = steps
        if request.edge_factors is not None:
            factors = _dense(request.edge_factors)
            walk.edge_factors = _at(factors)
        if x is not None:
            x, w_ih = _dense(x), _dense(w.ih)
            walk.x = _at(x)
            walk.w_ih = _at(w_ih)
            walk.dx = _at(dx)
            walk.dw_ih = _at(dw_ih)
            walk.dw_hh = _at(dw_hh)
        walk.run(variant=self._variant, threads=torch.get_num_threads())
        weights: tuple[Tensor | None, ...] = () if dw_ih is None else (dw_ih, dw_hh)
        if bias is not None:
            weights = (dw_ih, dw_hh, *bias.unbind(0))
        recurrent: tuple[Tensor, ...] = ()
        if cell.inner is not None:  # its error as the recurrent product sees it comes first in a row
            inner_first, da = da, da[..., H:]
            if dw_hh is None or (bias is None and w.b_hh is not None):  # else nobody asks: a view takes a microsecond
                recurrent = da[..., :-H], inner_first[..., :H]
        return SweepResult(da, adjoints, leaving, recurrent, weights, dx)


def _check(
    cell: Cell,
    x: Tensor,
    initial: tuple[Tensor, ...],
    w: Weights,
    reset_state: tuple[Tensor, ...] = (),
    layers: tuple[int, ...] = (),
) -> None:
    """Raise RuntimeError for what does not fit together: no pointer may lead beyond its tensor.

    layers: the first dimension of the initial states, if they have one beside their own.
    """
    GH, P = w.hh.shape
    H = GH // cell.gates_per_unit
    B, wide = x.shape[1], (P, H)
    sizes = (cell.gates_per_unit * H, H if w.hr is None else P) == (GH, P) and w.ih.shape == (GH, x.shape[2])
    for b in (w.b_ih, w.b_hh):
        sizes = sizes and (b is None or b.shape == (GH,))
    sizes = sizes and (w.hr is None or w.hr.shape == (P, H))
    for s, size in zip(initial, wide, strict=False):
        sizes = sizes and s.shape == (*layers, B, size)
    for r, s in zip(reset_state, initial, strict=False):
        sizes = sizes and r.shape in (s.shape, (len(x), *s.shape))
    if not sizes:
        shapes = ", ".join(f"{name} {list(t.shape)}" for name, t in _named(x, initial, w, reset_state))
        raise RuntimeError(f"sizes must fit together, {cell.gates_per_unit} gates a hidden unit: got {shapes}")
    dtype = x.dtype
    for t in (*w, *initial, *reset_state):
        if t is not None and not (t.is_cpu and t.dtype == dtype):
            kinds = ", ".join(f"{name} {t.dtype} on {t.device}" for name, t in _named(x, initial, w, reset_state))
            raise RuntimeError(f"weights and states must be {dtype} on the CPU, as x is: got {kinds}")


def _named(
    x: Tensor, initial: tuple[Tensor, ...], w: Weights, reset_state: tuple[Tensor, ...]
) -> list[tuple[str, Tensor]]:
    named = {"x": x, **dict(zip(("h_0", "c_0"), initial, strict=False)), **w._asdict()}
    named |= zip(("reset_state of h", "reset_state of c"), reset_state, strict=False)
    return [(name, t) for name, t in named.items() if t is not None]


def _is_small(x: Tensor, w: Weights, few: int) -> bool:
    """Whether the products over all steps are done with the walk, since a call of the BLAS would take longer."""
    GH, P = w.hh.shape
    T, B, inputs = x.shape
    rows, weights = T * B, GH * (inputs + P)
    near, most = NEAR
    return rows <= few or rows * weights <= (most if weights <= near else SMALL)


def _input_product(x: Tensor, w: Weights, into: Tensor | None, lengths: Tensor | None) -> Tensor:
    """W_ih x_t of all steps, in the first columns of `into` `[T, B, ..]`; steps past the end are left as they are."""
    T, B, inputs = x.shape
    rows, width = x.reshape(T * B, inputs), len(w.ih)
    if into is None:
        return product(rows, w.ih).view(T, B, width)
    out = into.view(T * B, -1)[:, :width]
    if lengths is None:
        product(rows, w.ih, out)
    else:
        present = (torch.arange(T, device="cpu")[:, None] < lengths).flatten().nonzero()[:, 0]
        out.index_copy_(0, present, product(rows.index_select(0, present), w.ih))
    return into


def _at(tensor: Tensor | None) -> int:
    """Where the values lie; 0 for none, which a tensor without memory must not be taken for."""
    if tensor is None:
        return 0
    try:
        address = tensor.data_ptr()
    except RuntimeError:  # of what torch.func.vmap has wrapped
        address = 0
    if address == 0 and tensor.numel() > 0:
        raise RuntimeError(
            "tensors of a call must have memory that the compiled kernel can read, which those inside torch.func.vmap "
            "do not (kernel='eager' calls torch's operations instead; a dimension that is mapped can be lanes): got a "
            f"{type(tensor).__name__} of shape {list(tensor.shape)} without"
        )
    return address


def _dense(tensor: Tensor | None) -> Tensor | None:
    """The same values, contiguous; the result must live as long as its address is in use."""
    if tensor is None:
        return None
    if not tensor.is_cpu:
        raise RuntimeError(f"all tensors of a call must be on the CPU: got one on {tensor.device}")
    try:
        if tensor._is_zerotensor():  # zeros that autograd has not written anywhere
            return torch.zeros_like(tensor, memory_format=torch.contiguous_format)
        return (tensor.resolve_neg() if tensor.is_neg() else tensor).contiguous()
    except RuntimeError:
        if tensor.layout is torch.strided:
            raise
        raise RuntimeError(f"weights and states must be dense tensors: got layout {tensor.layout}") from None


def _restart(reset_state: tuple[Tensor, ...]) -> tuple[tuple[Tensor | None, ...], tuple[int, ...]]:
    """h and c `[.., B, F]` with dense steps, None for none, and the distance from each one's step to the next."""
    if not reset_state:
        return (None, None), (0, 0)
    dense = [
        r if r.dim() == 3 and r[0].is_contiguous() and not (r.is_neg() or r._is_zerotensor()) else _dense(r)
        for r in reset_state
    ]
    distances = [0 if r is None or r.dim() == 2 else r.stride(0) for r in dense]
    return (*dense, None)[:2], (*distances, 0)[:2]


def _rows(x: Tensor) -> tuple[Tensor | None, int]:
    """A tensor `[.., .., F]` with dense rows at equal distances, and that distance; copied only if it must be."""
    if x._is_zerotensor():
        return _dense(x), x.shape[2]
    if x.is_contiguous() and not x.is_neg() and x.is_cpu:
        return x, x.shape[2]
    step, row, one = x.stride()
    if one == 1 and step == x.shape[1] * row and row >= x.shape[2] and not x.is_neg() and x.is_cpu:
        return x, row
    return _dense(x), x.shape[2]
