"""Tensors, the leaves of carries, xs and ys: what is asked of one, and done to one."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["added", "alias", "alive", "beside", "differentiable", "fresh", "reset"]


def differentiable(t: Tensor) -> bool:
    """Whether a tensor can have a gradient."""
    return t.is_floating_point() or t.is_complex()


def fresh(t: Tensor, wanted: bool) -> Tensor:
    """The same values without a past, to receive a gradient if that is wanted and they can have one."""
    return t.detach().requires_grad_(wanted and differentiable(t))


def alias(t: Tensor) -> Tensor:
    """The same values as a tensor of its own, behind a node of its own. Sparse tensors have no views."""
    return t.view_as(t) if t.layout is torch.strided else t.clone()


def alive(ref: weakref.ref[Tensor]) -> Tensor | None:
    """The tensor that ref refers to, or None. Not ref() alone: up to torch 2.8, what only C++ holds would be lost."""
    t = ref()
    if t is not None:
        t._fix_weakref()  # type: ignore[attr-defined]  # not in torch's stubs
    return t


def added(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The sum, None counting as zero."""
    if a is None or b is None:
        return b if a is None else a
    return b + a if b.layout is torch.strided else a + b  # a sparse tensor can be added to a dense one only


def beside(rows: Tensor, leaf: Tensor) -> Tensor:
    """`[B]` (or `[blocks, B]`) shaped to stand beside a leaf `[B, ...]`; `[1]` beside any leaf."""
    return rows.reshape(rows.shape + (1,) * (leaf.dim() - rows.dim())) if leaf.dim() else rows.reshape(())


def reset(carry: Sequence[Tensor], resets: Tensor | None, t: int) -> list[Tensor]:
    """The carry that enters step t. resets: `[T, B]` or `[T, 1]`."""
    return list(carry) if resets is None else [c.masked_fill(beside(resets[t], c), 0) for c in carry]
