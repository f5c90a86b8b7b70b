"""The CPU kernel: compiled walks (csrc/) with the recurrent product and the gates fused. Large products are torch's.

Legend: T steps, B lanes, F taped gate values, R positions and N columns of a sweep (see `frames`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..cells import Cell, Weights
from ..policies import Reach
from . import _walks
from .addresses import at, check, computed_in, dense
from .compiled_forward import CODES, FORWARD, CompiledForward
from .compiled_sweep import SWEEP, CompiledSweep
from .kernel import Request, Sweep, SweepResult, Way, WholePasses, WholeRequest
from .packed_rows import PackedRows
from .product import BY_MKL
from .row_sums import row_sums
from .variants import chosen_variant, variants
from .whole import WholeWalks

__all__ = ["Cpu", "variants"]

INFER: dict[torch.dtype, Any] = {
    torch.float32: _walks.InferFloat32,
    torch.float64: _walks.InferFloat64,
    torch.bfloat16: _walks.ForwardBfloat16Whole,
}

WHOLE = {
    torch.float32: (FORWARD[torch.float32], INFER[torch.float32], SWEEP[torch.float32]),
    torch.float64: (FORWARD[torch.float64], INFER[torch.float64], SWEEP[torch.float64]),
    torch.bfloat16: (_walks.ForwardBfloat16Whole, _walks.ForwardBfloat16Whole, _walks.SweepBfloat16Whole),
}
"""The walks of small calls: with a tape, without one, and back."""

SMALL = 15_000_000
"""Multiplications in the products over all steps, one way, up to which they are done with the walk: measured at B = 1,
H = 128, where they took four fifths of the time of a BLAS's calls."""

NEAR = 2**18, 40_000_000 if BY_MKL else 70_000_000
"""Weights up to which they stay in a cache of a core, and with which that holds up to so many multiplications."""

INFERRED = 500_000_000 if BY_MKL else 70_000_000
"""The same of a call that keeps no gates, whose one such product the walk does block by block of steps: on an Intel
Xeon, on one thread, it took 0.88 to 0.95 of the CPU time that it takes with MKL's product at 35, 32, 256, 256 (RNN),
100, 32, 128, 128 and 100, 32, 32, 64 (LSTM), and 1.04 or more from some 800 million on; by AVX2 alone 0.95 to 0.98."""

TAPED = {"avx512": 270_000_000} if BY_MKL else {}
"""The same forward of a call that keeps its gates, by instruction set: 0.94 to 0.97 at 1000, 8, 64, 64 (all cells),
1.05 at 100, 32, 128, 128 (LSTM); by AVX2 1.00 to 1.05 at all of these."""

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
        small = lengths is None and self._multiplies(x, w, tape_gates)
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
        made = CompiledForward(cell, x, way, tape_gates, None, rows, self._multiplies(x, w, tape_gates))
        if made.walk is not None:
            made.walk.run(variant=self._variant, threads=torch.get_num_threads())
        return made.result

    def forward_ways(
        self, cell: Cell, x: Tensor, ways: Sequence[Way], tape_gates: bool
    ) -> list[tuple[tuple[Tensor, ...], Tensor | None]]:
        small = [self._multiplies(x, way.w, tape_gates) for way in ways]
        made = [CompiledForward(cell, x, way, tape_gates, None, None, s) for way, s in zip(ways, small, strict=True)]
        walks = [each.walk for each in made if each.walk is not None]
        if len(walks) == 2:
            walks[0].run_beside(walks[1], variant=self._variant, threads=torch.get_num_threads())
        elif walks:
            walks[0].run(variant=self._variant, threads=torch.get_num_threads())
        return [each.result for each in made]

    def _multiplies(self, x: Tensor, w: Weights, tape_gates: bool) -> bool:
        """Whether the input product is done with the walk."""
        near = TAPED.get(self.variant or "", NEAR[1]) if tape_gates else INFERRED
        return _is_small(x, w, FEW_ROWS, near) or _by_conversion(x, w)

    def infer(self, cell: Cell, x: Tensor, hx: tuple[Tensor, ...], w: Weights) -> tuple[Tensor, ...] | None:
        check(cell, x, hx, w, layers=(1,))
        T, B, inputs = x.shape
        GH, P = w.hh.shape
        if B == 0 or x.dtype not in INFER or not _is_small(x, w, FEW_ROWS, INFERRED):
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
        small = rows > 0 and request.dtype in WHOLE and is_small(rows, weights, FEW_ROWS)
        if not small or rows * request.H * request.dtype.itemsize > COPIED:
            return None
        pulls = request.frames.walks.covers and is_small(rows, weights, FEW_ROWS_BACK)
        pulls = pulls and (request.gates or cell.taped_per_unit == 0)
        return WholeWalks(request, CODES[cell.mode], self._variant, *WHOLE[request.dtype], pulls)

    def sweep(self, request: Sweep) -> SweepResult:
        made = self._sweep(request)
        made.walk.run(variant=self._variant, threads=torch.get_num_threads())
        return made.result()

    def sweep_ways(self, requests: Sequence[Sweep]) -> list[SweepResult]:
        first, second = map(self._sweep, requests)
        first.walk.run_beside(second.walk, variant=self._variant, threads=torch.get_num_threads())
        return [first.result(), second.result()]

    def _sweep(self, request: Sweep) -> CompiledSweep:
        x, w = request.x, request.w
        small = x is not None and (_is_small(x, w, FEW_ROWS_BACK) or _by_conversion(x, w))
        return CompiledSweep(request, self._variant, small)

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


def _is_small(x: Tensor, w: Weights, few: int, near: int = NEAR[1]) -> bool:
    """Whether the products over all steps are done with the walk, since a call of the BLAS would take longer."""
    GH, P = w.hh.shape
    T, B, inputs = x.shape
    return is_small(T * B, GH * (inputs + P), few, near)


def _by_conversion(x: Tensor, w: Weights) -> bool:
    """Whether the products over all steps with the input's weight are done with the walk, which converts rows as it
    reads and writes them; of weights that do not stay in a cache of a core a BLAS reads less.
    """
    return computed_in(x.dtype) != x.dtype and w.ih.numel() <= NEAR[0]


def is_small(rows: int, weights: int, few: int, near: int = NEAR[1]) -> bool:
    """`_is_small`, of so many rows and weights."""
    return rows <= few or rows * weights <= (near if weights <= NEAR[0] else SMALL)
