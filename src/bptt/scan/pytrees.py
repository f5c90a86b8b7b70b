"""Pytrees as lists of tensors and a form that holds the rest, and small functions of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_is_leaf, tree_leaves, tree_map, tree_unflatten

__all__ = [
    "Form",
    "Step",
    "added",
    "alias",
    "beside",
    "differentiable",
    "fresh",
    "put",
    "reset",
    "split",
    "split_known",
    "split_y",
    "tensors_in",
]

Step = Callable[[Any, Any], tuple[Any, Any]]
"""A function of (carry, x) to (carry, y)."""


class _Hole:
    """The placeholder of a tensor in a `Form`."""


_HOLE = _Hole()

_Read = Callable[[Any, list[Tensor]], bool]
"""A function that appends the tensors of a pytree to a list, and tells whether it has the form it was made for."""

_Build = Callable[[Iterator[Tensor]], Any]
"""A function that puts tensors into a pytree."""


@dataclass(frozen=True)
class Form:
    """A pytree without its tensors, into which other tensors can be put."""

    spec: TreeSpec
    leaves: tuple[Any, ...]

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.spec, self.leaves))

    @cached_property
    def values(self) -> list[Any]:
        """The Python values among the leaves; None, which holds nothing, is not one."""
        return [leaf for leaf in self.leaves if leaf is not _HOLE and leaf is not None]

    @cached_property
    def count(self) -> int:
        """The number of its tensors."""
        return sum(leaf is _HOLE for leaf in self.leaves)

    def of_tensors(self) -> Form:
        """The same form with None in the place of all that is not a tensor."""
        return Form(self.spec, tuple(leaf if leaf is _HOLE else None for leaf in self.leaves))

    def join(self, tensors: Iterable[Tensor]) -> Any:
        """The pytree with these tensors."""
        width = self._width
        if width == 0:
            (tensor,) = tensors
            return tensor
        if width > 0:
            return tuple(tensors)
        tensors = iter(tensors)
        if self._plain is not None:
            return self._plain[1](tensors)
        return tree_unflatten([next(tensors) if leaf is _HOLE else leaf for leaf in self.leaves], self.spec)

    def tensors(self, tree: Any) -> list[Tensor] | None:
        """The tensors of a pytree of this form; None where it has another form, or one that only `split` can tell."""
        width = self._width
        if width == 0:
            return [tree] if isinstance(tree, Tensor) else None
        if width > 0:
            return list(tree) if type(tree) is tuple and len(tree) == width and _all_tensors(tree) else None
        found: list[Tensor] = []
        return found if self._plain is not None and self._plain[0](tree, found) else None

    @cached_property
    def _width(self) -> int:
        """The number of tensors in a tuple of nothing else; 0 for one tensor without a tuple; -1 for any other form."""
        tree = tree_unflatten(list(self.leaves), self.spec)
        flat = type(tree) is tuple and len(tree) > 0 and all(leaf is _HOLE for leaf in tree)
        return 0 if tree is _HOLE else len(tree) if flat else -1

    @cached_property
    def _plain(self) -> tuple[_Read, _Build] | None:
        """How to take apart and put together tensors in tuples, lists and dicts, many times faster than any pytree."""
        return _plain(tree_unflatten(list(self.leaves), self.spec))


def _all_tensors(tree: tuple[Any, ...]) -> bool:
    for leaf in tree:  # noqa: SIM110  # every step runs this
        if not isinstance(leaf, Tensor):
            return False
    return True


def _plain(tree: Any) -> tuple[_Read, _Build] | None:
    kind = type(tree)
    if tree is _HOLE:
        return _read_tensor, next
    if tree is None:
        return _read_none, _build_none
    if kind not in (tuple, list, dict):
        return None
    parts = list(map(_plain, tree.values() if kind is dict else tree))
    reads, builds = [part[0] for part in parts if part], [part[1] for part in parts if part]
    if len(reads) < len(parts):
        return None
    if kind is dict:
        return _of_dict(list(tree), reads, builds)
    return _of_sequence(kind, reads, builds)


def _read_tensor(tree: Any, found: list[Tensor]) -> bool:
    found.append(tree)
    return isinstance(tree, Tensor)


def _read_none(tree: Any, found: list[Tensor]) -> bool:
    return tree is None


def _build_none(tensors: Iterator[Tensor]) -> None:
    return None


def _of_dict(keys: list[Any], reads: list[_Read], builds: list[_Build]) -> tuple[_Read, _Build]:
    def read(tree: Any, found: list[Tensor]) -> bool:
        if type(tree) is not dict or len(tree) != len(keys):
            return False
        return all(key in tree and part(tree[key], found) for key, part in zip(keys, reads, strict=True))

    def build(tensors: Iterator[Tensor]) -> dict[Any, Any]:
        return {key: part(tensors) for key, part in zip(keys, builds, strict=True)}

    return read, build


def _of_sequence(kind: Any, reads: list[_Read], builds: list[_Build]) -> tuple[_Read, _Build]:
    def read(tree: Any, found: list[Tensor]) -> bool:
        if type(tree) is not kind or len(tree) != len(reads):
            return False
        for part, item in zip(reads, tree, strict=True):  # noqa: SIM110  # every step runs this
            if not part(item, found):
                return False
        return True

    def build(tensors: Iterator[Tensor]) -> Any:
        return kind([part(tensors) for part in builds])

    return read, build


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


def split_known(tree: Any) -> tuple[list[Tensor], Form]:
    """`split`, in less time for tensors in tuples, lists and dicts of a form that was met before."""
    tensors: list[Tensor] = []
    try:
        form = _KNOWN.get(key := _outline(tree, tensors))
    except TypeError:
        return split(tree)
    if form is None:
        found, form = split(tree)
        if len(_KNOWN) >= MOST_KNOWN:
            _KNOWN.clear()
        if len(found) == len(tensors) and all(map(is_, found, tensors)):
            _KNOWN[key] = form
        return found, form
    return tensors, form


MOST_KNOWN = 256

_KNOWN: dict[Any, Form] = {}
"""Forms by their outline."""


def _outline(tree: Any, tensors: list[Tensor]) -> Any:
    """What tells the form of tensors in tuples, lists and dicts, which are appended to a list. Raises TypeError."""
    if isinstance(tree, Tensor):
        tensors.append(tree)
        return Tensor
    kind = type(tree)
    if kind is tuple or kind is list:
        return (kind, *[_outline(part, tensors) for part in tree])
    if kind is dict:
        return (dict, *tree, *[_outline(part, tensors) for part in tree.values()])
    if tree is None:
        return None
    raise TypeError


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors of a pytree."""
    if isinstance(tree, Tensor):
        return [tree]
    if type(tree) is tuple:  # many times faster than as any pytree
        return [t for part in tree for t in tensors_in(part)]
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def split_y(y: Any, like: Form | None = None) -> tuple[list[Tensor], Form]:
    """`split` of a y, whose numbers become tensors, on the CPU whatever the default device is now and in backward."""
    numbers = (bool, int, float, complex)
    return split(tree_map(lambda v: torch.as_tensor(v, device="cpu") if isinstance(v, numbers) else v, y), like)


def differentiable(t: Tensor) -> bool:
    """Whether a tensor can have a gradient."""
    return t.is_floating_point() or t.is_complex()


def fresh(t: Tensor, wanted: bool) -> Tensor:
    """A leaf with the same values, which requires a gradient if that is wanted and it can have one."""
    made = t.detach()
    if type(made) is Tensor and type(t) not in (Tensor, torch.nn.Parameter):
        made = made.as_subclass(type(t))  # whose own functions may give plain tensors
    return made.requires_grad_(wanted and differentiable(t))


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
