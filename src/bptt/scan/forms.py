"""Pytrees taken apart: their tensors, and the form that is left."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_is_leaf, tree_map, tree_unflatten

__all__ = ["Form", "Step", "split", "split_y"]

Step = Callable[[Any, Any], tuple[Any, Any]]
"""A function of (carry, x) to (carry, y)."""


class _Hole:
    """Stands for a tensor in a `Form`."""


_HOLE = _Hole()


@dataclass(frozen=True)
class Form:
    """A pytree without its tensors: what is needed to put others in their place."""

    spec: TreeSpec
    leaves: tuple[Any, ...]

    @property
    def tensors_only(self) -> bool:
        """Whether no leaf is a Python value (None, which holds nothing, aside)."""
        return all(leaf is _HOLE or leaf is None for leaf in self.leaves)

    def join(self, tensors: Iterable[Tensor]) -> Any:
        """The pytree with these tensors."""
        tensors = iter(tensors)
        return tree_unflatten([next(tensors) if leaf is _HOLE else leaf for leaf in self.leaves], self.spec)


def split(tree: Any, like: Form | None = None) -> tuple[list[Tensor], Form]:
    """The tensors of a pytree, and its form. like: keys of dicts that only come in another order are put in its."""
    leaves, spec = tree_flatten(tree)
    if like is not None and spec != like.spec:
        leaves, spec = _by_key(tree, like.spec) or (leaves, spec)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return tensors, Form(spec, tuple(_HOLE if isinstance(leaf, Tensor) else leaf for leaf in leaves))


def split_y(y: Any, like: Form | None = None) -> tuple[list[Tensor], Form]:
    """The same for a y, whose numbers become tensors."""
    return split(tree_map(lambda v: _number(v) if isinstance(v, (bool, int, float, complex)) else v, y), like)


def _number(value: complex) -> Tensor:
    return torch.as_tensor(value, device="cpu")  # whatever the default device is, here and in backward


def _by_key(tree: Any, spec: TreeSpec) -> tuple[list[Any], TreeSpec] | None:
    """The leaves in the order of spec, or None where the tree has another structure."""
    try:
        leaves = spec.flatten_up_to(tree)
    except ValueError:
        return None
    return (leaves, spec) if all(map(tree_is_leaf, leaves)) else None
