"""Packed sequences as padded ones and back, inside transforms too, where torch's own functions read memory directly."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from ..engine import transformed, whole_numbers
from ..kernels import PackedRows

__all__ = ["packed_rows", "padded", "rows_of"]


def padded(packed: PackedSequence) -> tuple[Tensor, Tensor]:
    """(x `[T, B, F]` with zeros after the end of each sequence, the lengths `[B]` on the CPU)."""
    if not transformed():
        # A graph is broken here anyway, since lengths are values; of torch 2.8 a compiler cannot trace it either.
        pad = torch.compiler.disable(pad_packed_sequence) if is_dynamo_compiling() else pad_packed_sequence
        return pad(packed)
    sizes = whole_numbers(packed.batch_sizes)
    T, B = len(sizes), sizes[0]
    x = packed.data.new_zeros(T * B, *packed.data.shape[1:]).index_copy(0, _places(packed), packed.data)
    lengths = [sum(size > lane for size in sizes) for lane in range(B)]
    if packed.unsorted_indices is not None:
        lengths = [lengths[lane] for lane in whole_numbers(packed.unsorted_indices)]
    return x.unflatten(0, (T, B)), torch.tensor(lengths, device="cpu")


def packed_rows(y: Tensor, packed: PackedSequence, lengths: Tensor | None) -> Tensor:
    """The data of y `[T, B, F]` packed like another sequence."""
    if transformed():
        return y.flatten(0, 1).index_select(0, _places(packed))
    order = packed.sorted_indices
    if lengths is None:
        lengths = torch.full((y.shape[1],), y.shape[0], device="cpu")
    if order is not None:
        y, lengths = y.index_select(1, order), lengths[order.cpu()]
    return pack_padded_sequence(y, lengths).data


def rows_of(lengths: Tensor) -> tuple[PackedRows, Tensor, Tensor]:
    """(the rows that padded sequences of these lengths `[B]` have packed, the order `[B]` of their lanes there, the
    lane `[S]` of each row), all on the CPU.
    """
    order = lengths.argsort(descending=True, stable=True)
    longest = lengths[order]
    rows = PackedRows(torch.searchsorted(-longest, -torch.arange(int(longest[0]), device="cpu")))
    return rows, order, order[rows.lane]


def _places(packed: PackedSequence) -> Tensor:
    """The row of `[T * B]` in which each row of the data lies."""
    sizes = whole_numbers(packed.batch_sizes)
    B = sizes[0]
    lanes = list(range(B)) if packed.sorted_indices is None else whole_numbers(packed.sorted_indices)
    return torch.tensor(
        [t * B + lane for t, size in enumerate(sizes) for lane in lanes[:size]], device=packed.data.device
    )
