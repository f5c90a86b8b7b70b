"""The CPU kernel: compiled walks (csrc/), the recurrent product and the gates fused. Large products are torch's.

Legend: T steps, B lanes, F taped gate values, R positions and N columns of a sweep (see `frames`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..cells import Cell, Weights
from . import _walks
from .frames import Frames
from .kernel import Request, Swept, Tape, Walked, Wanted
from .product import product

__all__ = ["Cpu", "variants"]

FORWARD = {torch.float32: _walks.forward_float32, torch.float64: _walks.forward_float64}
INFER = {torch.float32: _walks.infer_float32, torch.float64: _walks.infer_float64}
SWEEP = {torch.float32: _walks.sweep_float32, torch.float64: _walks.sweep_float64}

Products = tuple[Tensor | None, Tensor | None, Tensor | None]
"""dL/dx, dL/dW_ih, dL/dW_hh, each None where not wanted."""

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
    """Stage 1 and stage 3 in C++, float32 and float64.

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
        restart, distances = _restart(reset_state)
        held = (  # alive until the call is over
            lane,
            active,
            gates,
            _dense(x) if small else None,
            _dense(w.ih) if small else None,
            _dense(initial[0]),
            _dense(initial[1]) if c is not None else None,
            _dense(resets),
            *restart,
            *map(_dense, (w.hh, w.b_ih, w.b_hh, w.hr)),
            h,
            c,
        )
        at = list(map(_at, held))
        sizes = (T, B, inputs, H, P, *distances)
        if B:
            FORWARD[x.dtype](self._variant, CODES[cell.mode], *sizes, stride, tape_gates, *at, torch.get_num_threads())
        return (h,) if c is None else (h, c), gates if tape_gates else None

    def infer(self, cell: Cell, x: Tensor, hx: tuple[Tensor, ...], w: Weights) -> tuple[Tensor, ...] | None:
        _check(cell, x, hx, w, layers=(1,))
        T, B, inputs = x.shape
        GH, P = w.hh.shape
        if B == 0 or not _is_small(x, w, FEW_ROWS):
            return None
        H = GH // cell.gates_per_unit
        h_0, c_0 = hx if cell.states == 2 else (hx[0], None)
        outputs = [x.new_empty(T, B, P), x.new_empty(1, B, P), *([] if c_0 is None else [x.new_empty(1, B, H)])]
        given: tuple[Tensor | None, ...] = (x, w.ih, h_0, c_0, w.hh, w.b_ih, w.b_hh, w.hr)
        for t in given:
            if t is not None and (not t.is_contiguous() or t.is_neg() or t._is_zerotensor()):
                given = tuple(map(_dense, given))  # alive until the call is over
                break
        at = list(map(_at, (*given, *outputs, None)[:11]))
        INFER[x.dtype](self._variant, CODES[cell.mode], T, B, inputs, H, P, *at, torch.get_num_threads())
        return tuple(outputs)

    def walk(
        self,
        cell: Cell,
        x: Tensor,
        w: Weights,
        tape: Tape,
        frames: Frames,
        error: Tensor | None,
        final: tuple[Tensor | None, ...],
        edges: Tensor | None,
        wanted: Wanted,
    ) -> Walked:
        T, B, _ = x.shape
        covers = frames.walks.covers
        products: Products = (None, None, None)
        small = covers and B > 0 and _is_small(x, w, FEW_ROWS_BACK)
        if small:
            weights = (w.ih.new_empty(w.ih.shape), w.hh.new_empty(w.hh.shape)) if wanted.weights else (None, None)
            products = (x.new_empty(x.shape) if wanted.x else None, *weights)
        da, lam, lam_c, bias, leaving = self._sweep(
            cell, w, tape, frames, (error, None), final, edges, wanted, (x, products) if small else None
        )
        dx, ih, hh = products
        if wanted.x and dx is None and covers and B > 0:
            dx = product(da.view(T * B, -1)[:, -len(w.ih) :], w.ih.t()).view(x.shape)
        initial = frames.collect_initial(leaving) if wanted.initial else ()
        H = w.hh.shape[1]
        if cell.inner is not None:
            return Walked(da[..., H:], lam, initial, bias, ih, hh, dx, leaving, inner=da[..., :H])
        return Walked(da, lam, initial, bias, ih, hh, dx, leaving, adjoint_c=lam_c)

    def sweep(
        self,
        cell: Cell,
        w: Weights,
        tape: Tape,
        frames: Frames,
        errors: tuple[Tensor | None, ...],
        edges: Tensor | None,
        wanted: Wanted,
    ) -> Swept:
        wanted = wanted._replace(bias=False)
        da, lam, lam_c, _, initial = self._sweep(
            cell, w, tape, frames, (*errors, None)[:2], (None, None), edges, wanted, None, framed=True
        )
        return Swept(da if cell.inner is None else da[..., w.hh.shape[1] :], lam, initial, lam_c)

    def _sweep(
        self,
        cell: Cell,
        w: Weights,
        tape: Tape,
        frames: Frames,
        errors: tuple[Tensor | None, ...],
        final: tuple[Tensor | None, ...],
        edges: Tensor | None,
        wanted: Wanted,
        small: tuple[Tensor, Products] | None,
        framed: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, tuple[Tensor, ...]]:
        """(da, lambda of h, of c, gradients of the biases, what reaches the initial state), the last by column.

        By step and lane or, where framed, by position and column. The rows of da begin with (4.10), if there is an
        inner gate.
        small: x and where to put the products over all steps, if they are to be done here.
        """
        GH, P = w.hh.shape
        N, H = len(frames.start), GH // cell.gates_per_unit
        walks = frames.walks
        rows = (frames.R, N) if framed else (frames.T, frames.B)
        new = tape.states[0].new_empty if walks.covers and not framed else tape.states[0].new_zeros
        da = new(*rows, GH if cell.inner is None else GH + H)
        lam = new(*rows, P) if wanted.adjoint else None
        lam_c = new(*rows, H) if wanted.adjoint_c and cell.states == 2 else None
        bias = (da.new_empty if N else da.new_zeros)(2, GH) if wanted.bias else None
        reached = tuple([s.new_empty(N, s.shape[2]) for s in tape.states]) if wanted.initial else ()
        h, c = tape.states if cell.states == 2 else (tape.states[0], None)
        error, stride = (None, 0) if errors[0] is None else _rows(errors[0])
        x, products = (None, (None, None, None)) if small is None else small
        restart, distances = _restart(tape.reset_state)
        held = (  # alive until the call is over
            walks.columns,
            walks.counts,
            *map(_dense, (tape.gates, h, c, tape.resets)),
            *restart,
            error,
            *map(_dense, (errors[1], final[0], final[1] if c is not None else None, edges, w.hh, w.hr)),
            da,
            lam,
            lam_c,
            bias,
            reached[0] if reached else None,
            reached[1] if len(reached) == 2 else None,
            _dense(x),
            None if x is None else _dense(w.ih),
            *products,
        )
        at = list(map(_at, held))
        sizes = (frames.T, frames.B, w.ih.shape[1], H, P, N, frames.R, *distances)
        overlaps = walks.overlaps and not framed
        SWEEP[da.dtype](self._variant, CODES[cell.mode], *sizes, stride, framed, overlaps, *at, torch.get_num_threads())
        return da, lam, lam_c, bias, reached


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
