"""Large matrix products, by the faster of torch's libraries.

oneDNN compiles code for every size that it meets and keeps it, about 0.8 MiB a size, up to a thousand sizes. The
number of rows, steps times lanes, differs from call to call where sequences do. So products are computed in pieces
of whole sizes, of which there are few.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import Parameter

from . import _walks

__all__ = ["input_product", "product", "summed_product"]

ONEDNN_LINEAR = (
    torch.ops.mkldnn._linear_pointwise.default
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    else None
)
"""oneDNN's linear layer on plain tensors, where this build of torch has it."""

BY_MKL = torch.backends.mkl.is_available() and _walks.intel()
"""Whether torch.mm is the faster one at any size: MKL uses the widest instructions of Intel's processors alone."""

LARGE = 1_200_000
"""Multiplications in a product from which on oneDNN is asked: below, its call takes longer than MKL's."""

MOST_ROWS = 16384
"""The largest number of rows of a piece, so that the memory it uses besides its result is bounded too."""

CONVERTED = 2**18
"""Values of both factors' rows, or of one and the result's, that are float32 at a time where they are stored as
bfloat16: so few that they stay in a core's cache."""

WIDE, WIDE_BESIDE = 128, 96
"""Columns of the wider and of the narrower factor from which on the faster product of a sum over rows pays for copies:
of the one that oneDNN wants turned round, and of the other where it has gaps between its rows."""


def product(x: Tensor, w: Tensor, out: Tensor | None = None) -> Tensor:
    """x w': `[N, K]`, `[M, K]` -> `[N, M]`, each in any layout; N is the number that differs from call to call.

    out: where the result is to be written.

    torch.mm asks MKL, which does not use the widest instructions of every processor. oneDNN, which torch has too, does:
    on an AMD with AVX-512 it took 0.4 to 0.5 of the time from K = M = 512 on, with 16 to 512 rows. On an Intel with
    AVX-512 it took 0.97 to 2.1 times as long, with 64 to 8000 rows and K, M = 32 to 1024.

    bfloat16 on a CPU is multiplied as float32, a few rows at a time: that Intel multiplied float32 at ten times the
    rate of bfloat16.
    """
    if _converts(x, w):
        return _converted_product(x, w, out)
    if not _by_onednn(x, w, x.numel() * len(w)):
        return torch.mm(x, w.t()) if out is None else torch.mm(x, w.t(), out=out)
    N = len(x)
    if out is None:
        if _whole(N) == N:
            return _linear(x, w)
        out = x.new_empty(N, len(w))
    for a, b in _pieces(N, w.numel()):
        if (b - a) * w.numel() < LARGE:
            torch.mm(x[a:b], w.t(), out=out[a:b])
        else:
            out[a:b] = _linear(x[a:b], w)
    return out


def summed_product(a: Tensor, b: Tensor) -> Tensor:
    """a' b, the sum over rows: `[N, K]`, `[N, M]` -> `[K, M]`, as `product`; N is what differs from call to call."""
    if _converts(a, b):
        return _converted_sum(a, b)
    K, M = a.shape[1], b.shape[1]
    pays = min(K, M) >= WIDE_BESIDE and max(K, M) >= WIDE
    if not pays or not _by_onednn(a, b, a.numel() * M):
        return torch.mm(a.t(), b)
    if len(a) * (K - M) > K * M:  # fewer values are turned round
        return summed_product(b, a).t().contiguous()
    total: Tensor | None = None
    for first, end in _pieces(len(a), K * M):
        part, of = a[first:end].t(), b[first:end].t()
        if total is None:
            total = _linear(part, of)
        elif (end - first) * K * M < LARGE:
            total.addmm_(part, of.t())
        else:
            total += _linear(part, of)
    assert total is not None  # since there are rows
    return total


def input_product(x: Tensor, w: Tensor, into: Tensor | None, lengths: Tensor | None) -> Tensor:
    """w x_t of all steps, in the first columns of `into` `[T, B, ..]`; steps past the end are left as they are."""
    T, B, inputs = x.shape
    rows, width = x.reshape(T * B, inputs), len(w)
    if into is None:
        return product(rows, w).view(T, B, width)
    out = into.view(T * B, -1)[:, :width]
    if lengths is None:
        product(rows, w, out)
    else:
        present = (torch.arange(T, device="cpu")[:, None] < lengths).flatten().nonzero()[:, 0]
        out.index_copy_(0, present, product(rows.index_select(0, present), w))
    return into


def _converts(x: Tensor, w: Tensor) -> bool:
    """Whether factors are multiplied as float32, a few rows at a time."""
    if x.dtype != torch.bfloat16 or w.dtype != torch.bfloat16 or not (x.is_cpu and w.is_cpu):
        return False
    return not torch.is_grad_enabled() or not (x.requires_grad or w.requires_grad)


def _converted_product(x: Tensor, w: Tensor, out: Tensor | None) -> Tensor:
    (N, K), M, turned = x.shape, len(w), w.float().t()
    if out is None:
        out = x.new_empty(N, M)
    at_once = max(CONVERTED // (K + M), 64)
    for i in range(0, N, at_once):
        out[i : i + at_once] = torch.mm(x[i : i + at_once].float(), turned)
    return out


def _converted_sum(a: Tensor, b: Tensor) -> Tensor:
    (N, K), M = a.shape, b.shape[1]
    total = a.new_zeros(K, M, dtype=torch.float32)
    at_once = max(CONVERTED // (K + M), 64)
    for i in range(0, N, at_once):
        total.addmm_(a[i : i + at_once].float().t(), b[i : i + at_once].float())
    return total.to(a.dtype)


def _linear(x: Tensor, w: Tensor) -> Tensor:
    """oneDNN's x w'. Of a w with gaps between its rows or columns it would take a thousand times as long."""
    assert ONEDNN_LINEAR is not None
    if not (w.is_contiguous() or w.t().is_contiguous()):
        w = w.t().contiguous().t() if w.stride(0) == 1 else w.contiguous()
    return ONEDNN_LINEAR(x, w, None, "none", [], "")


def _by_onednn(x: Tensor, w: Tensor, multiplications: int) -> bool:
    plain = x.dtype == w.dtype == torch.float32 and type(x) is Tensor and type(w) in (Tensor, Parameter) and x.is_cpu
    if ONEDNN_LINEAR is None or BY_MKL or not plain or multiplications < LARGE or x.is_neg() or w.is_neg():
        return False
    if not torch._C._get_mkldnn_enabled():  # torch.backends.mkldnn.flags(enabled=False)
        return False
    recorded = torch.is_grad_enabled() and (x.requires_grad or w.requires_grad)
    return not recorded and not torch._C._are_functorch_transforms_active()


def _whole(N: int) -> int:
    """The most rows, up to N, that a piece may have: a size with five leading binary digits, sixteen in an octave."""
    zeros = max(N.bit_length() - 5, 0)
    return min(N >> zeros << zeros, MOST_ROWS)


def _pieces(N: int, multiplications: int) -> Iterator[tuple[int, int]]:
    """The rows of each piece, as (first, one after the last); of a whole size as long as the rest is large.

    multiplications: for each row.
    """
    first = 0
    while first < N:
        rest = N - first
        count = _whole(rest) if rest * multiplications >= LARGE else rest
        yield first, first + count
        first += count
