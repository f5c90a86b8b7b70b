"""The calls that torch.func.vmap maps over: as lanes of one call, or one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .levels import apply

__all__ = ["at_once", "folded", "in_pieces", "lane", "no_calls", "one_by_one", "unfolded"]

MOST_VALUES = 2**25
"""Values of all lanes of the calls that are made at once: so many cotangents of one call share a tape."""


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


def no_calls(
    function: Any, arguments: tuple[Any, ...], dims: Sequence[int | None], given: Sequence[Tensor | None]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """(the results of no calls as one; where the calls would be in them), by what one of zeros gives."""
    own = [t if d is None or t is None else t.sum(d, dtype=t.dtype) for t, d in zip(given, dims, strict=True)]
    results = apply(function, *arguments, *own)
    return tuple(r[None][:0] for r in results), (0,) * len(results)


def at_once(given: Sequence[Tensor | None], dims: Sequence[int | None], V: int, weights: Sequence[int]) -> int:
    """How many of V calls are made as lanes of one, of which each takes a copy of what they share."""
    shared = [t.numel() for i, (t, d) in enumerate(zip(given, dims, strict=True)) if t is not None and d is None
              and i not in weights]  # fmt: skip
    return V if sum(shared) * V <= MOST_VALUES else max(MOST_VALUES // sum(shared), 1)


def in_pieces(
    rule: Callable[..., tuple[tuple[Tensor, ...], tuple[int, ...]]],
    info: Any,
    dims: Sequence[int | None],
    given: Sequence[Tensor | None],
    size: int,
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """(the results of all calls, where the calls are in them), by a rule for so many of them at once."""
    parts: list[tuple[Tensor, ...]] = []
    for first in range(0, info.batch_size, size):
        some = min(size, info.batch_size - first)
        own = [t if d is None or t is None else t.narrow(d, first, some) for t, d in zip(given, dims, strict=True)]
        results, out_dims = rule(info._replace(batch_size=some), own)
        parts.append(results)
    return tuple(torch.cat(p, d) for p, d in zip(zip(*parts, strict=True), out_dims, strict=True)), out_dims
