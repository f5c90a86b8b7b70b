"""Elements taken by an index, and their gradients, in the canonical set: `index_select`, `index_add`, `gather`."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from .rules import cast, full, rule

__all__ = ["by_row"]

aten = torch.ops.aten

_WHOLE = (torch.int64, torch.int32)

Indices = Sequence[Tensor | None]


@rule(aten.embedding.default)
def _embedding(weight: Tensor, index: Tensor, *_: Any) -> Tensor:
    return _selected(weight, 0, index)


@rule(aten.embedding_dense_backward.default)
def _embedding_backward(grad: Tensor, index: Tensor, count: int, padding: int, by_count: bool) -> Any:
    if by_count:
        return NotImplemented
    flat, rows = _flat(index), _viewed(grad, [index.numel(), grad.shape[-1]])
    if padding >= 0:
        padded = aten.unsqueeze.default(aten.eq.Scalar(flat, padding), 1)
        rows = aten.where.self(padded, full(grad, [], 0), rows)
    return aten.index_add.default(full(grad, [count, grad.shape[-1]], 0), 0, flat, rows)


@rule(aten.index.Tensor, aten._unsafe_index.Tensor)
def _index(a: Tensor, indices: Indices) -> Any:
    """By tensors of whole numbers for dimensions one after the other; others stay as they are."""
    found = _joined(a, indices)
    return NotImplemented if found is None else _selected(*found)


def _joined(a: Tensor, indices: Indices) -> tuple[Tensor, int, Tensor] | None:
    """A tensor with the dimensions that are indexed as one, that one, and its index; None where they are apart."""
    given = [(dim, i) for dim, i in enumerate(indices) if i is not None]
    first = given[0][0] if given else 0
    if not given or [dim for dim, _ in given] != list(range(first, first + len(given))):
        return None
    if any(i.dtype not in _WHOLE for _, i in given):
        return None
    index = _from_first(given[0][1], a.shape[first])
    for dim, i in given[1:]:
        index = aten.add.Tensor(aten.mul.Tensor(index, a.shape[dim]), _from_first(i, a.shape[dim]))
    if len(given) == 1:
        return a, first, index
    last = first + len(given)
    return _viewed(a, [*a.shape[:first], prod(a.shape[first:last]), *a.shape[last:]]), first, index


@rule(aten.index_put.default, aten._index_put_impl.default)
def _index_put(a: Tensor, indices: Indices, values: Tensor, accumulate: bool = False, *_: Any) -> Any:
    given = [(dim, i) for dim, i in enumerate(indices) if i is not None]
    if not given:
        return NotImplemented
    dim, index = given[0]
    if len(given) == 1 and index.dtype == torch.bool and dim == 0 and not accumulate and values.numel() == 1:
        mask = _viewed(index, [*index.shape, *[1] * (a.dim() - index.dim())])
        return aten.where.self(mask, _viewed(cast(values, a.dtype), []), a)
    found = _joined(a, indices)
    if found is None:
        return NotImplemented
    flat, dim, index = found
    shape = [*flat.shape[:dim], *index.shape, *flat.shape[dim + 1 :]]
    values = cast(values, a.dtype)
    values = values if list(values.shape) == shape else aten.expand.default(values, shape)
    rows = _viewed(values, [*flat.shape[:dim], index.numel(), *flat.shape[dim + 1 :]])
    if accumulate:
        made = aten.index_add.default(flat, dim, _flat(index), rows)
    else:
        along = _viewed(index, [*[1] * dim, index.numel(), *[1] * (flat.dim() - dim - 1)])
        made = aten.scatter.src(flat, dim, aten.expand.default(along, list(rows.shape)), rows)
    return _viewed(made, list(a.shape))


def by_row(recorder: Any, func: Any, args: Sequence[Any]) -> Tensor | None:
    """`a[torch.arange(len(a)), index]`, one element of each row, and its gradient; None for anything else."""
    if func not in (aten.index.Tensor, aten.index_put.default, aten._index_put_impl.default):
        return None
    a, indices = args[:2]
    if len(indices) != 2 or None in indices or not _counts(recorder, indices[0], len(a)):
        return None
    index = indices[1]
    if index.dtype != torch.int64 or index.shape != (len(a),):
        return None
    index = _from_first(index, a.shape[1])
    index = _viewed(index, [len(a), *[1] * (a.dim() - 1)])
    index = aten.expand.default(index, [len(a), 1, *a.shape[2:]])
    if func is aten.index.Tensor:
        return aten.squeeze.dims(aten.gather.default(a, 1, index), [1])
    adds, shape = len(args) > 3 and args[3], [len(a), *a.shape[2:]]
    values = args[2] if list(args[2].shape) == shape else aten.expand.default(args[2], shape)
    write = aten.scatter_add.default if adds else aten.scatter.src
    return write(a, 1, index, aten.unsqueeze.default(cast(values, a.dtype), 1))


def _counts(recorder: Any, t: Tensor, n: int) -> bool:
    """Whether a tensor is `torch.arange(n)`: made inside of the step, or captured, which is noted."""
    node = recorder.made(t)
    while node is not None and node.target in (aten.detach.default, aten.alias.default, aten.clone.default):
        node = node.args[0]
    if node is not None and node.meta.get("counting"):
        node.meta["counted"] = True
        return True
    if node is None or node.target not in _ARANGE:
        return False
    before, after = _ARANGE[node.target]
    return [*before, *node.args, *after] == [0, n, 1]


_ARANGE = {aten.arange.default: ([0], [1]), aten.arange.start: ([], [1]), aten.arange.start_step: ([], [])}
"""Operations that count, with what stands before and after their arguments in `arange(start, end, step)`."""


def _selected(a: Tensor, dim: int, index: Tensor) -> Tensor:
    """The elements of a dimension at an index of any shape, which takes the dimension's place."""
    made = aten.index_select.default(a, dim, _flat(index))
    return _viewed(made, [*a.shape[:dim], *index.shape, *a.shape[dim + 1 :]])


def _from_first(index: Tensor, n: int) -> Tensor:
    """An index that may count from the last element, as one that counts from the first."""
    return aten.where.self(aten.lt.Scalar(index, 0), aten.add.Tensor(index, n), index)


def _flat(index: Tensor) -> Tensor:
    return _viewed(index, [index.numel()])


def _viewed(a: Tensor, shape: Sequence[int]) -> Tensor:
    assert a.numel() == prod(shape)
    if list(a.shape) == list(shape):
        return a
    return aten.view.default(a if a.is_contiguous() else a.clone(memory_format=torch.contiguous_format), shape)
