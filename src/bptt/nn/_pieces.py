"""A sequence that comes in pieces `[n, B, I]`: cut anew, or laid down in a file to be read by slices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

import torch
from torch import Tensor

__all__ = ["Laid", "rechunked"]

STEPS = 1024
"""Written at a time, at most."""


def rechunked(pieces: Iterable[Any], k: int, as_computed: Callable[[Any], Tensor]) -> Iterator[Tensor]:
    """The same steps in chunks of k; the last may be shorter. Raises ValueError for pieces of different sizes."""
    held: list[Tensor] = []
    count, sizes = 0, None
    for piece in pieces:
        shape = list(getattr(piece, "shape", ()))
        if len(shape) != 3:
            raise ValueError(f"x must have pieces [n, B, I], time first: got a {type(piece).__name__} {shape}")
        sizes = sizes or shape[1:]
        if shape[1:] != sizes:
            raise ValueError(f"x must have pieces [n, {sizes[0]}, {sizes[1]}] like the first: got {shape}")
        n, begins = shape[0], 0
        while n - begins >= k - count:
            ends = begins + k - count
            x = as_computed(piece[begins:ends])
            yield torch.cat([*held, x]) if held else x
            held, count, begins = [], 0, ends
        if begins < n:
            held.append(as_computed(piece[begins:]).clone())  # a view would keep the piece, whose memory may be reused
            count += n - begins
    if held:
        yield torch.cat(held)


class Laid:
    """Pieces laid one behind the other in a file, to be read by slices."""

    def __init__(self, file: BinaryIO, pieces: Iterable[Any], as_computed: Callable[[Any], Tensor]) -> None:
        self.file, self.steps = file, 0
        for x in rechunked(pieces, STEPS, as_computed):
            self.like, self.steps = x[:0], self.steps + len(x)
            file.write(x.cpu().contiguous().view(torch.uint8).numpy().data)

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, steps: slice) -> Tensor:
        a, b, _ = steps.indices(self.steps)
        B, I = self.like.shape[1:]
        row = B * I * self.like.element_size()
        self.file.seek(a * row)
        data = bytearray(self.file.read((b - a) * row))
        return torch.frombuffer(data, dtype=self.like.dtype).view(b - a, B, I) if data else self.like
