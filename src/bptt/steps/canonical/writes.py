"""Writes to tensors as new values: of the tensor, and of what it is a view of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .rules import cast, full

__all__ = ["scattered", "without_write"]

aten = torch.ops.aten


def without_write(func: Any, target: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor | None:
    """What an operation that writes to `target` would leave there, as a new tensor; None where it is not known."""
    name = func._schema.name.removeprefix("aten::")
    if func in (aten.copy_.default,):
        source = cast(args[0], target.dtype)
        return (
            aten.expand.default(source, list(target.shape))
            if source.shape != target.shape
            else aten.clone.default(source)
        )
    if func is aten.zero_.default:
        return full(target, target.shape, 0, None)
    if func is aten.fill_.Scalar:
        return full(target, target.shape, args[0], None)
    if func is aten.fill_.Tensor:
        return aten.expand.default(cast(args[0], target.dtype), list(target.shape))
    packet = getattr(aten, name.removesuffix("_"), None)
    overload = None if packet is None else getattr(packet, func._overloadname, None)
    if overload is None or not name.endswith("_"):
        return None
    result = overload(target, *args, **kwargs)
    return result if isinstance(result, Tensor) and result.shape == target.shape else None


def scattered(recorder: Any, base: Any, value: Any, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The node of a base after a view of it, made by func, got another value; None where that is not known."""
    graph = recorder.graph
    shape, _ = base.meta["tensor"]
    if func in (aten.detach.default, aten.alias.default):
        return value
    if func in (aten.view.default, aten.unsqueeze.default, aten.squeeze.dims):
        return _node(graph, aten.view.default, value, base, list(shape))
    if func is aten.permute.default:
        dims = list(args[1])
        return _node(graph, aten.permute.default, value, base, [dims.index(d) for d in range(len(dims))])
    if func is aten.diagonal.default:
        return _on_diagonal(graph, base, value, *args[1:], **kwargs)
    if func is aten.select.int or func is aten.slice.Tensor:
        dim, whole = args[1], shape[args[1]]
        if func is aten.select.int:
            start, end, step = args[2], args[2] + 1, 1
            value = _node(graph, aten.unsqueeze.default, value, None, dim)
            value.meta["tensor"] = torch.Size([*shape[:dim], 1, *shape[dim + 1 :]]), base.meta["tensor"][1]
        else:
            start, end, step = args[2:5]
        scaled = _scaled(graph, base, value, dim, (start, end)) if step == 1 else None
        if scaled is not None:
            return scaled
        if step != 1:
            return _node(graph, aten.slice_scatter.default, base, base, value, dim, start, end, step)
        parts = []
        for a, b in ((0, start), (end, whole)):
            if b > a:
                part = graph.call_function(aten.slice.Tensor, (base, dim, a, b, 1))
                part.meta["tensor"] = torch.Size([*shape[:dim], b - a, *shape[dim + 1 :]]), base.meta["tensor"][1]
                parts.append((a, part))
        pieces = [node for _, node in sorted([*parts, (start, value)], key=lambda p: p[0])]
        return value if len(pieces) == 1 else _node(graph, aten.cat.default, pieces, base, dim)
    return None


def _scaled(graph: Any, base: Any, value: Any, dim: int, where: tuple[int, int]) -> Any:
    """A base of complex numbers of which a slice is multiplied by a number, as one product, by ones elsewhere: in the
    gradient of a Fourier transform to real numbers. None of any other.
    """
    shape, dtype = base.meta["tensor"]
    if not dtype.is_complex or value.target not in (aten.mul.Tensor, aten.mul.Scalar) or len(value.args) != 2:
        return None
    part, number = value.args
    while getattr(part, "target", None) in (aten.detach.default, aten.alias.default):
        part = part.args[0]
    if isinstance(number, torch.fx.Node) or getattr(part, "target", None) is not aten.slice.Tensor:
        return None
    if part.args[0] is not base or part.args[1:4] != (dim, *where):
        return None
    after = [1] * (len(shape) - dim - 1)
    pieces = []
    for size, factor in ((where[0], 1.0), (where[1] - where[0], number), (shape[dim] - where[1], 1.0)):
        if size > 0:
            pieces.append(graph.call_function(aten.full.default, ([size, *after], factor), {"dtype": dtype.to_real()}))
            pieces[-1].meta["tensor"] = torch.Size([size, *after]), dtype.to_real()
    factors = graph.call_function(aten.cat.default, (pieces, 0))
    factors.meta["tensor"] = torch.Size([shape[dim], *after]), dtype.to_real()
    return _node(graph, aten.mul.Tensor, base, base, factors)


def _on_diagonal(graph: Any, base: Any, value: Any, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Any:
    """Matrices in the last two dimensions with another diagonal: every so many of their values."""
    shape, dtype = base.meta["tensor"]
    rank, n = len(shape), shape[-1]
    if offset or (dim1 % rank, dim2 % rank) != (rank - 2, rank - 1) or shape[-2] != n:
        return None
    flat = _node(graph, aten.view.default, base, None, [*shape[:-2], n * n])
    flat.meta["tensor"] = torch.Size([*shape[:-2], n * n]), dtype
    written = _node(graph, aten.slice_scatter.default, flat, flat, value, rank - 2, 0, n * n, n + 1)
    return _node(graph, aten.view.default, written, base, list(shape))


def _node(graph: Any, func: Any, value: Any, like: Any, *args: Any, **kwargs: Any) -> Any:
    node = graph.call_function(func, (value, *args), kwargs)
    if like is not None:
        node.meta["tensor"] = like.meta["tensor"]
    return node
