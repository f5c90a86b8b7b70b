"""Sums over the rows of all steps, (6.4): the gradients of weights, by compiled code that packs each factor once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _walks
from .addresses import at, computed_in, dense
from .kernel import Sweep

__all__ = ["inner_sums", "row_sums"]

ROW_SUMS = {
    torch.float32: _walks.RowSumsFloat32,
    torch.float64: _walks.RowSumsFloat64,
    torch.bfloat16: _walks.RowSumsBfloat16,
}

WIDEST = 2**21
"""The largest number of values of all products together: more of them do not stay near, and a BLAS divides its work
for that."""


def row_sums(
    variant: int, a: Tensor, factors: Sequence[Tensor], rows: Tensor | None, alone: bool, inner: int = 0
) -> tuple[list[Tensor], Tensor | None] | None:
    """a' b `[M, K]` of each of up to two factors b `[.., K]`, and the sum over rows of a `[.., M]` if `alone` is.

    variant: the instruction set, by its number. rows: those that count, int64 on the CPU; None is all. None where
    torch's products take less time, or compiled code cannot read these tensors. inner: of two factors, the number of
    columns that a has first for the second one alone, whose product has them last, and last for the first one alone.
    """
    M = a.shape[1]
    tensors = (a, *factors)
    if (
        inner % 8
        or a.dtype not in ROW_SUMS
        or not 0 < len(factors) <= 2
        or M * sum([b.shape[1] for b in factors]) > WIDEST
    ):
        return None
    if any(t.dtype != a.dtype or not t.is_cpu or len(t) != len(a) for t in tensors):
        return None
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return None
    count = len(a) if rows is None else len(rows)
    new = a.new_zeros if count == 0 else a.new_empty
    computed = computed_in(a.dtype)
    products = [new(M - inner, b.shape[1], dtype=computed) for b in factors]
    sums = new(M, dtype=computed) if alone else None
    # What is computed from lives until the call is over, as these names do. A field that is not set is none.
    (own, stride), *spaced = map(_spaced, tensors)
    walk = ROW_SUMS[a.dtype]()
    walk.inner = inner
    walk.N, walk.M, walk.a, walk.a_stride, walk.sums = count, M, at(own), stride, at(sums)
    b, walk.b_stride = spaced[0]
    walk.K, walk.b, walk.out = factors[0].shape[1], at(b), at(products[0])
    if len(factors) == 2:
        b2, walk.b2_stride = spaced[1]
        walk.K2, walk.b2, walk.out2 = factors[1].shape[1], at(b2), at(products[1])
    if rows is not None:
        rows = rows.contiguous()
        walk.rows = at(rows)
    walk.run(variant=variant, threads=torch.get_num_threads())
    if computed != a.dtype:
        return [p.to(a.dtype) for p in products], None if sums is None else sums.to(a.dtype)
    return products, sums


def inner_sums(variant: int, da: Tensor, request: Sweep, H: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of both weights and of the biases `[2, G * H]`, of a cell with an inner gate, each row packed once.

    da: its rows have the inner gate's error for the recurrent product too, first. None for all where that does not pay.
    """
    tape, packed, x = request.tape, request.packed, request.x
    assert x is not None
    if packed is None:
        h = tape.prev[0].flatten(0, 1)
    else:
        h = tape.states[0].index_select(0, packed.before(request.direction))
    found = row_sums(variant, da.flatten(0, 1), (x.flatten(0, 1), h), None, request.bias, H)
    if found is None:
        return None, None, None
    (dw_ih, dw_hh), sums = found
    bias = None if sums is None else torch.stack([sums[H:], torch.cat([sums[H:-H], sums[:H]])])
    return dw_ih, dw_hh, bias


def _spaced(x: Tensor) -> tuple[Tensor | None, int]:
    """A tensor `[.., F]` with dense rows at equal distances, and that distance; copied only if it must be."""
    row, one = x.stride()
    if (one == 1 or x.shape[1] == 1) and row >= x.shape[1] and not (x.is_neg() or x._is_zerotensor()):
        return x, row
    return dense(x), x.shape[1]
