"""The calls that torch.func.vmap maps over: as lanes of one call, or one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .levels import apply

__all__ = ["folded", "lane", "one_by_one", "unfolded"]


def lane(tensor: Tensor) -> int:
    """The dimension of the lanes of any tensor of a program but a weight."""
    return max(tensor.dim() - 2, 0)


def folded(tensor: Tensor | None, dim: int | None, V: int) -> Tensor | None:
    """A tensor for V calls with all lanes of the first call, then all of the second, and so on."""
    if tensor is None:
        return None
    if dim is None:
        at = lane(tensor)
        whole = tensor.unsqueeze(at).expand(*tensor.shape[:at], V, *tensor.shape[at:])
    else:
        at = max(tensor.dim() - 3, 0)
        whole = tensor.movedim(dim, at)
    return whole.flatten(at, at + 1)


def unfolded(tensor: Tensor, V: int) -> Tensor:
    """The inverse of `folded`: the calls in a dimension of their own, before that of the lanes."""
    at = lane(tensor)
    return tensor.unflatten(at, (V, tensor.shape[at] // V))


def one_by_one(
    function: Any, arguments: tuple[Any, ...], dims: Sequence[int | None], given: Sequence[Tensor | None], V: int
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """(the results of V calls, one after the other, as one; where the calls are in them)."""

    def call(i: int) -> tuple[Tensor, ...]:
        own = [t if d is None or t is None else t.select(d, i) for t, d in zip(given, dims, strict=True)]
        results: tuple[Tensor, ...] = apply(function, *arguments, *own)
        return results

    results = [call(i) for i in range(V)]
    together = tuple(map(torch.stack, zip(*results, strict=True)))
    return together, (0,) * len(together)
