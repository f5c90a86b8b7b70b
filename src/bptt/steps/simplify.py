"""A recorded graph made simpler: without identities, repeated operations, and what nothing needs."""

from __future__ import annotations

import operator
from itertools import pairwise
from typing import Any, cast

import torch
from torch.fx import Graph, Node

__all__ = ["simplified"]

aten = torch.ops.aten

_IDENTITIES = {aten.clone.default, aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default}


def simplified(graph: Graph) -> None:
    """Simplify a graph in place. Every node says the shape and dtype of its value."""
    while _simplified_once(graph):
        pass


def _simplified_once(graph: Graph) -> bool:
    """Whether one pass changed anything."""
    changed = False
    seen: dict[Any, Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        other = _simpler(graph, node)
        if other is None:
            key = _key(node)
            other = seen.setdefault(key, node)
        if other is not node:
            node.replace_all_uses_with(other)
            graph.erase_node(node)
            changed = True
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users:
            graph.erase_node(node)
            changed = True
    return changed


def _key(node: Node) -> Any:
    def frozen(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return tuple(map(frozen, value))
        return value if isinstance(value, Node) else (type(value), repr(value))

    return node.target, frozen(node.args), tuple((k, frozen(v)) for k, v in node.kwargs.items())


def _simpler(graph: Graph, node: Node) -> Node | None:
    """The node whose value is the same, with fewer operations; None where there is none."""
    target, args = node.target, node.args
    if target in _IDENTITIES:
        return args[0]  # type: ignore[return-value]  # what this operation is of, is a node
    if target is operator.getitem and isinstance(args[0], (tuple, list)):
        return args[0][args[1]]  # type: ignore[index,return-value]  # what this operation is of, is a node
    if target in (aten.view.default, aten.expand.default) and _shape(args[0]) == _shape(node):
        return args[0]  # type: ignore[return-value]  # what this operation is of, is a node
    if target is aten.view.default and _target(args[0]) is aten.view.default:
        with graph.inserting_before(node):
            return _like(graph.call_function(aten.view.default, (args[0].args[0], args[1])), node)  # type: ignore[union-attr]  # what this operation is of, is a node
    if target is aten.permute.default:
        dims, inner = list(args[1]), args[0]  # type: ignore[arg-type]  # what this operation is of, is a node
        if _target(inner) is aten.permute.default:
            before = list(inner.args[1])  # type: ignore[union-attr,arg-type]  # what this operation is of, is a node
            dims, inner = [before[d] for d in dims], inner.args[0]  # type: ignore[union-attr]  # what this operation is of, is a node
            if dims == sorted(dims):
                return inner  # type: ignore[return-value]  # what this operation is of, is a node
            with graph.inserting_before(node):
                return _like(graph.call_function(aten.permute.default, (inner, dims)), node)
        if dims == sorted(dims):
            return inner  # type: ignore[return-value]  # what this operation is of, is a node
        if _target(inner) is aten.unsqueeze.default and len(dims) == 2:
            with graph.inserting_before(node):
                column = graph.call_function(aten.unsqueeze.default, (inner.args[0], 1 - inner.args[1]))  # type: ignore[operator,union-attr]  # what this operation is of, is a node
                return _like(column, node)
        if _target(inner) is aten.mm.default and all(map(_transposes, inner.users)):  # type: ignore[union-attr]  # what this operation is of, is a node
            with graph.inserting_before(node):
                factors = [_transposed(graph, f) for f in reversed(inner.args)]  # type: ignore[union-attr]  # what this operation is of, is a node
                return _like(graph.call_function(aten.mm.default, tuple(factors)), node)
    if target is aten.squeeze.dims and args[1] == [0] and _is_row_by_transposed(args[0]):
        with graph.inserting_before(node):
            column = _transposed(graph, args[0])
            return _like(graph.call_function(aten.squeeze.dims, (column, [1])), node)
    if target is aten.cat.default:
        dim = args[1]
        inner = [p for p in args[0] if _target(p) is aten.cat.default and p.args[1] == dim]  # type: ignore[union-attr]  # what this operation is of, is a node
        if len(args[0]) == 1:  # type: ignore[arg-type]  # what this operation is of, is a node
            return args[0][0]  # type: ignore[index,return-value]  # what this operation is of, is a node
        if inner:
            flat = [q for p in args[0] for q in (p.args[0] if p in inner else [p])]  # type: ignore[union-attr]  # what this operation is of, is a node
            with graph.inserting_before(node):
                return _like(graph.call_function(aten.cat.default, (flat, dim)), node)
    if target is aten.slice.Tensor and args[4] == 1:
        return _sliced(graph, node, args)
    if target is aten.add.Tensor and isinstance(args[1], Node):
        return _sum(graph, node, args[0], args[1])  # type: ignore[arg-type]  # what this operation is of, is a node
    if target is aten.select.int and _target(args[0]) is aten.permute.default:
        return _selected_of_permuted(graph, node)
    if _reshapes(node) and _reshapes(args[0]):
        source = args[0].args[0]  # type: ignore[union-attr]  # what this operation is of, is a node
        if _shape(source) == _shape(node):
            return source  # type: ignore[return-value]  # what this operation is of, is a node
        if aten.view.default in (target, _target(args[0])):
            with graph.inserting_before(node):
                return _like(graph.call_function(aten.view.default, (source, list(_shape(node)))), node)
    if target is aten.mul.Tensor and args[1] == 1 and not isinstance(args[1], Node):
        return args[0] if _dtype(args[0]) == _dtype(node) else None  # type: ignore[return-value]  # what this operation is of, is a node
    return None


def _selected_of_permuted(graph: Graph, node: Node) -> Node:
    """A part of a permuted value as what is left of the permutation, of that part."""
    permuted, dim, index = cast("Any", node.args)
    inner, dims = permuted.args
    selected, (shape, dtype) = dims[dim], inner.meta["tensor"]
    with graph.inserting_before(node):
        part = graph.call_function(aten.select.int, (inner, selected, index))
        part.meta["tensor"] = torch.Size([*shape[:selected], *shape[selected + 1 :]]), dtype
        part.meta["line"] = node.meta.get("line")
        rest = [d - (d > selected) for d in dims if d != selected]
        return _like(graph.call_function(aten.permute.default, (part, rest)), node)


def _reshapes(node: Any) -> bool:
    """Whether the elements of a value are those of its argument in their order, in another shape."""
    target = _target(node)
    if target in (aten.view.default, aten.unsqueeze.default, aten.squeeze.dims):
        return True
    if target is aten.select.int:
        return bool(_shape(node.args[0])[node.args[1]] == 1)
    if target is aten.permute.default:
        moved = [d for d in node.args[1] if _shape(node.args[0])[d] != 1]
        return moved == sorted(moved)
    return False


def _is_row_by_transposed(product: Any) -> bool:
    """Whether a product is that of one row with a transposed matrix: of the matrix with a column, transposed."""
    return (
        _target(product) is aten.mm.default
        and _shape(product)[0] == 1
        and _target(product.args[1]) is aten.permute.default
    )


def _transposes(node: Node) -> bool:
    return node.target is aten.permute.default and list(node.args[1]) == [1, 0]  # type: ignore[arg-type]  # what this operation is of, is a node


def _transposed(graph: Graph, matrix: Any) -> Node:
    (rows, columns), dtype = matrix.meta["tensor"]
    made = graph.call_function(aten.permute.default, (matrix, [1, 0]))
    made.meta["tensor"], made.meta["line"] = (torch.Size([columns, rows]), dtype), matrix.meta.get("line")
    return made


def _sum(graph: Graph, node: Node, a: Node, b: Node) -> Node | None:
    """A sum with zeros is the other term; one with a negative value a difference; one of pieces between zeros their
    concatenation.
    """
    same = [n for n, other in ((a, b), (b, a)) if _zero(other)
            and (_shape(n), _dtype(n)) == (_shape(node), _dtype(node))]  # fmt: skip
    if same:
        return same[0]
    for negative, other in ((a, b), (b, a)):
        if _target(negative) is aten.neg.default and len(node.args) == 2 and not node.kwargs:
            with graph.inserting_before(node):
                return _like(graph.call_function(aten.sub.Tensor, (other, negative.args[0])), node)
    if _target(a) is not aten.cat.default or _target(b) is not aten.cat.default or a.args[1] != b.args[1]:
        return None
    dim, first, second = a.args[1], _pieces(a), _pieces(b)
    merged = _interleaved(first, second)
    if merged is None or _shape(a) != _shape(b) or _dtype(a) != _dtype(b):
        return None
    with graph.inserting_before(node):
        return _like(graph.call_function(aten.cat.default, (merged, dim)), node)


def _sliced(graph: Graph, node: Node, args: Any) -> Node | None:
    """A slice of a slice, of constants, or of a concatenation, of which it takes whole pieces or lies in one."""
    base, dim, start, end, _ = args
    if _shape(base) == _shape(node):
        return base
    with graph.inserting_before(node):
        if _target(base) is aten.slice.Tensor and base.args[1] == dim and base.args[4] == 1:
            first = base.args[2]
            inner = graph.call_function(aten.slice.Tensor, (base.args[0], dim, start + first, end + first, 1))
            return _like(inner, node)
        if _target(base) is aten.full.default:
            made = graph.call_function(aten.full.default, (list(_shape(node)), base.args[1]), dict(base.kwargs))
            return _like(made, node)
        if _target(base) is aten.cat.default and base.args[1] == dim:
            pieces = _pieces(base)
            parts = [_part(graph, p, dim, start, end) for p in pieces if p[0] < end and start < p[1]]
            if len(parts) == 1:
                return parts[0]
            return _like(graph.call_function(aten.cat.default, (parts, dim)), node)
    return None


def _part(graph: Graph, piece: tuple[int, int, Node], dim: int, start: int, end: int) -> Node:
    """What of a piece lies between start and end."""
    first, last, node = piece
    a, b = max(start, first) - first, min(end, last) - first
    if (a, b) == (0, last - first):
        return node
    shape, dtype = node.meta["tensor"]
    made = graph.call_function(aten.slice.Tensor, (node, dim, a, b, 1))
    made.meta["tensor"] = torch.Size([*shape[:dim], b - a, *shape[dim + 1 :]]), dtype
    made.meta["line"] = node.meta.get("line")
    return made


def _pieces(cat: Node) -> list[tuple[int, int, Node]]:
    """(start, end, piece) of a concatenation."""
    pieces, dim = cast("Any", cat.args)
    start, found = 0, list[tuple[int, int, Node]]()
    for piece in pieces:
        size = _shape(piece)[dim]
        found.append((start, start + size, piece))
        start += size
    return found


def _interleaved(first: list[tuple[int, int, Node]], second: list[tuple[int, int, Node]]) -> list[Node] | None:
    """The pieces of a sum of two concatenations, where each piece of one lies within zeros of the other.

    A stretch of zeros that is neither may be cut only where the other's pieces end: else None.
    """
    own = sorted([p for p in (*first, *second) if not _zero(p[2])], key=lambda p: p[0])
    if any(x[1] > y[0] for x, y in pairwise(own)):
        return None
    zeros = {(p[0], p[1]): p[2] for p in (*first, *second) if _zero(p[2])}
    end, merged = max(p[1] for p in first), list[Node]()
    at = 0
    for start, stop, piece in [*own, (end, end, None)]:
        if start > at:
            gap = zeros.get((at, start))
            if gap is None:
                return None
            merged.append(gap)
        if piece is not None:
            merged.append(piece)
        at = stop
    return merged


def _zero(node: Any) -> bool:
    return _target(node) is aten.full.default and node.args[1] == 0


def _target(node: Any) -> Any:
    return node.target if isinstance(node, Node) and node.op == "call_function" else None


def _shape(node: Any) -> Any:
    return tuple(node.meta["tensor"][0])


def _dtype(node: Any) -> Any:
    return node.meta["tensor"][1]


def _like(made: Node, node: Node) -> Node:
    made.meta["tensor"], made.meta["line"] = node.meta["tensor"], node.meta.get("line")
    return made
