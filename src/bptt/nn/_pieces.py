"""Sequences that are never in memory as a whole: read by slices of steps, or piece by piece."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from math import prod
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

__all__ = [
    "STEPS",
    "Sliceable",
    "as_tensor",
    "check_lanes",
    "is_sliceable",
    "on_disk",
    "one_length",
    "rechunked",
    "steps_of",
]

STEPS = 1024
"""The largest number of steps that are written to the files of pieces at a time."""


class Sliceable(Protocol):
    """A sequence of T steps that is read by slices: a tensor, an array, a memory map."""

    def __len__(self) -> int: ...

    def __getitem__(self, steps: slice, /) -> Any: ...


def is_sliceable(x: Any) -> bool:
    """Whether a value has a length and slices."""
    return hasattr(x, "__len__") and hasattr(x, "__getitem__")


def check_lanes(name: str, x: Any, shape: str = "[T, ...]") -> None:
    """Raise TypeError for sequences of several lengths, and for a tensor that is not dense."""
    if isinstance(x, PackedSequence):
        got = "a PackedSequence"
    elif isinstance(x, Tensor) and x.is_nested:
        got = f"a nested tensor of {x.layout}"
    elif isinstance(x, Tensor) and x.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor: got layout {x.layout} (to_dense() of it)")
    else:
        return
    raise one_length(f"{name} must be {shape} with lanes of one length: got {got}")


def one_length(what: str) -> TypeError:
    """The error for sequences of several lengths, with the form that they may have instead."""
    return TypeError(f"{what}. Sequences one after the other may be one lane, with resets where each begins")


def steps_of(name: str, whole: Any, a: int, b: int) -> Tensor:
    """The steps a to b-1 of an argument, which errors call `name`."""
    try:
        return as_tensor(whole[a:b])
    except TypeError as error:
        got = f"got {type(whole).__name__}, whose [{a}:{b}] raises {error}"
        raise TypeError(f"{name} must have slices that become tensors: {got}") from error


def as_tensor(piece: Any) -> Tensor:
    """A tensor of the values of an array or of a list; a tensor as it is."""
    if isinstance(piece, np.ndarray):  # torch takes none that is read-only, backwards or of the other byte order
        piece = np.array(piece, piece.dtype.newbyteorder("="), order="C")
    return piece if isinstance(piece, Tensor) else torch.as_tensor(piece, device="cpu")


def rechunked(
    pieces: Iterable[Any], k: int, leaves_of: Callable[[Any], Sequence[Any]], as_computed: Callable[[Any], Tensor]
) -> Iterator[list[Tensor]]:
    """The leaves `[k, ...]` of the same steps in chunks of k; the last may be shorter.

    leaves_of: the leaves `[n, ...]` of a piece, checked. as_computed: the tensor of a slice of one.
    """
    held: list[list[Tensor]] = []
    count = 0
    for piece in pieces:
        leaves = leaves_of(piece)
        n, begins = len(leaves[0]), 0
        while n - begins >= k - count:
            ends = begins + k - count
            chunk = [as_computed(leaf[begins:ends]) for leaf in leaves]
            yield _joined([*held, chunk])
            held, count, begins = [], 0, ends
        if begins < n:  # a view would keep the piece, whose memory may be reused
            held.append([as_computed(leaf[begins:]).clone() for leaf in leaves])
            count += n - begins
    if held:
        yield _joined(held)


def _joined(parts: list[list[Tensor]]) -> list[Tensor]:
    return parts[0] if len(parts) == 1 else [torch.cat(leaves) for leaves in zip(*parts, strict=True)]


def on_disk(stack: ExitStack, chunks: Iterable[list[Tensor]]) -> list[_OnDisk]:
    """The leaves of chunks that are written to temporary files, one for each leaf, which the stack closes."""
    leaves: list[_OnDisk] = []
    for chunk in chunks:
        leaves = leaves or [_OnDisk(stack, leaf) for leaf in chunk]
        for leaf, x in zip(leaves, chunk, strict=True):
            leaf.append(x)
    return leaves


class _OnDisk:
    """Steps `[T, ...]` that are written one after another to a file, and read from it by slices."""

    def __init__(self, stack: ExitStack, like: Tensor) -> None:
        self.file = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115  the stack closes it
        self.steps, self.like = 0, like[:0].clone()
        self.row = prod(like.shape[1:]) * like.element_size()

    def append(self, x: Tensor) -> None:
        """Write the steps that come next."""
        self.steps += len(x)
        self.file.write(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, steps: slice) -> Tensor:
        a, b, _ = steps.indices(self.steps)
        self.file.seek(a * self.row)
        data = bytearray(self.file.read((b - a) * self.row))
        shape = (b - a, *self.like.shape[1:])
        return torch.frombuffer(data, dtype=self.like.dtype).view(shape) if data else self.like.new_empty(shape)
