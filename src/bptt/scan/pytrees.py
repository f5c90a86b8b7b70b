"""Pytrees as lists of tensors and a form that holds the rest, and small functions of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_is_leaf, tree_map, tree_unflatten

__all__ = ["Form", "Step", "added", "alias", "beside", "differentiable", "fresh", "put", "reset", "split", "split_y"]

Step = Callable[[Any, Any], tuple[Any, Any]]
"""A function of (carry, x) to (carry, y)."""


class _Hole:
    """The placeholder of a tensor in a `Form`."""


_HOLE = _Hole()


@dataclass(frozen=True)
class Form:
    """A pytree without its tensors, into which other tensors can be put."""

    spec: TreeSpec
    leaves: tuple[Any, ...]

    @property
    def values(self) -> list[Any]:
        """The Python values among the leaves; None, which holds nothing, is not one."""
        return [leaf for leaf in self.leaves if leaf is not _HOLE and leaf is not None]

    def join(self, tensors: Iterable[Tensor]) -> Any:
        """The pytree with these tensors."""
        tensors = iter(tensors)
        return tree_unflatten([next(tensors) if leaf is _HOLE else leaf for leaf in self.leaves], self.spec)


def split(tree: Any, like: Form | None = None) -> tuple[list[Tensor], Form]:
    """The tensors of a pytree, and its form. like: a form, whose order of dict keys the result gets."""
    leaves, spec = tree_flatten(tree)
    if like is not None and spec != like.spec:
        with suppress(ValueError):  # the tree has another structure
            by_key = like.spec.flatten_up_to(tree)
            if all(map(tree_is_leaf, by_key)):
                leaves, spec = by_key, like.spec
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return tensors, Form(spec, tuple(_HOLE if isinstance(leaf, Tensor) else leaf for leaf in leaves))


def split_y(y: Any, like: Form | None = None) -> tuple[list[Tensor], Form]:
    """`split` of a y, whose numbers become tensors, on the CPU whatever the default device is now and in backward."""
    numbers = (bool, int, float, complex)
    return split(tree_map(lambda v: torch.as_tensor(v, device="cpu") if isinstance(v, numbers) else v, y), like)


def differentiable(t: Tensor) -> bool:
    """Whether a tensor can have a gradient."""
    return t.is_floating_point() or t.is_complex()


def fresh(t: Tensor, wanted: bool) -> Tensor:
    """A leaf with the same values, which requires a gradient if that is wanted and it can have one."""
    return t.detach().requires_grad_(wanted and differentiable(t))


def alias(t: Tensor) -> Tensor:
    """Another tensor of the same values, with a node of its own in the graph: a view; of a sparse tensor, a copy."""
    return t.view_as(t) if t.layout is torch.strided else t.clone()


def added(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The sum, in which None counts as zero."""
    if a is None or b is None:
        return b if a is None else a
    return b + a if b.layout is torch.strided else a + b  # a sparse tensor can be added to a dense one only


def beside(rows: Tensor, leaf: Tensor) -> Tensor:
    """`[B]` (or `[blocks, B]`) shaped to be broadcast with a leaf `[B, ...]`; `[1]` with any leaf."""
    return rows.reshape(rows.shape + (1,) * (leaf.dim() - rows.dim())) if leaf.dim() else rows.reshape(())


def reset(carry: Sequence[Tensor], resets: Tensor | None, t: int) -> list[Tensor]:
    """The carry that enters step t, after resets. resets: `[T, B]` or `[T, 1]`."""
    return list(carry) if resets is None else [c.masked_fill(beside(resets[t], c), 0) for c in carry]


def put(rows: Sequence[Tensor], t: int, values: Sequence[Tensor]) -> None:
    """Write values into row t of each."""
    for whole, value in zip(rows, values, strict=False):
        whole[t] = value
