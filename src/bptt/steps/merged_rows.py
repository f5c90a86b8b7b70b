"""Views that merge rows with dimensions before them, as a linear layer's of `[S, B, E]` to `[S * B, E]`, with the rows
before these: what a product along the last dimension, an activation or a sum over all of them gives is the same.

Legend: R rows. A merged dimension `(a, R, b)` is one of a * R * b values in this order; it is held as `(R, a, b)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from .kinds import ELEMENTWISE

__all__ = ["rows_ahead"]

aten = torch.ops.aten

_SAME = {aten.clone.default, aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default} | ELEMENTWISE


class _Order(NamedTuple):
    """Of a value that is held in another order: its merged dimension, and the sizes before and after rows in it."""

    dim: int
    before: int
    after: int


def rows_ahead(graph: Graph, R: int, other: Graph, S: int) -> None:
    """Rewrite two records of a step in place, on R and on S rows: views merge rows with dimensions after them only."""
    pairs = list(zip(graph.nodes, other.nodes, strict=False))
    if len(graph.nodes) != len(other.nodes) or any(n.target != m.target for n, m in pairs):
        return
    for n, m in pairs:
        if "tensor" in n.meta and "tensor" in m.meta and len(_shape(n)) == len(_shape(m)):
            differs = [i for i, (a, b) in enumerate(zip(_shape(n), _shape(m), strict=True)) if a != b]
            n.meta["differs"] = m.meta["differs"] = differs
    for each, rows in ((graph, R), (other, S)):
        in_order = _RowsAhead(each, rows)
        for node in list(each.nodes):
            in_order.visit(node)


@dataclass
class _RowsAhead:
    """A pass over a graph. orders: of the values that are held in another order than they are written."""

    graph: Graph
    R: int
    orders: dict[Node, _Order] = field(default_factory=dict)

    def visit(self, node: Node) -> None:
        if node.target is aten.view.default and node.args[0] not in self.orders:
            return self._merge(node)
        if not any(n in self.orders for n in node.all_input_nodes):
            return None
        found = self._follow(node)
        if found is not None:
            self.orders[node] = found
        return None

    def _merge(self, node: Node) -> None:
        source: Any = node.args[0]
        before, after = _shape(source), _shape(node)
        rows = source.meta.get("differs", ())
        if len(rows) != 1 or len(node.meta.get("differs", ())) != 1 or before[rows[0]] != self.R or 0 in before:
            return
        i, leading = rows[0], prod(before[: rows[0]])
        for j, size in enumerate(after):
            outer = prod(after[:j])
            first = next((k for k in range(i) if prod(before[:k]) == outer), None)
            if (
                [j] == node.meta["differs"]
                and leading > outer
                and first is not None
                and size % (leading // outer * self.R) == 0
            ):
                order = list(range(len(before)))
                order.insert(first, order.pop(i))
                with self.graph.inserting_before(node):
                    turned = self._made(aten.permute.default, node, [before[d] for d in order], source, order)
                node.args = (turned, *node.args[1:])
                a = leading // outer
                self.orders[node] = _Order(j, a, size // (a * self.R))
                return

    def _follow(self, node: Node) -> _Order | None:
        """The order of what an operation gives, of which some arguments are held in another one."""
        target, args = node.target, node.args
        first: Any = args[0]
        if target in _SAME:
            found = self._elementwise(node)
            if found is not None:
                return found
        elif target is aten.view.default:
            return self._viewed(node)
        elif target is aten.mm.default:
            return self._product(node)
        elif target is aten.permute.default:
            order = self.orders[first]
            return order._replace(dim=list(args[1]).index(order.dim))  # type: ignore[arg-type]  # what this operation is of, is a node
        elif target is aten.sum.dim_IntList:
            order, dims = self.orders[first], list(args[1])  # type: ignore[arg-type]  # what this operation is of, is a node
            if order.dim in dims:
                return None
            kept = len(_shape(node)) == len(_shape(first))
            return order if kept else order._replace(dim=order.dim - sum(d < order.dim for d in dims))
        elif target is aten.unsqueeze.default and isinstance(args[1], int):
            order = self.orders[first]
            return order._replace(dim=order.dim + (args[1] <= order.dim))
        for n in node.all_input_nodes:
            if n in self.orders:
                self._exchange(node, n, self._as_written(node, n))
        return None

    def _elementwise(self, node: Node) -> _Order | None:
        shape, order = _shape(node), next(self.orders[n] for n in node.all_input_nodes if n in self.orders)
        given = next(n for n in node.all_input_nodes if n in self.orders)
        order = order._replace(dim=order.dim + len(shape) - len(_shape(given)))
        for n in node.all_input_nodes:
            sizes, dim = _shape(n), order.dim - len(shape) + len(_shape(n))
            known = self.orders.get(n)
            if known is not None and known != order._replace(dim=dim):
                return None
            if known is None and dim >= 0 and sizes[dim] != 1:
                self._exchange(node, n, self._rows_ahead(node, n, order._replace(dim=dim)))
        return order

    def _viewed(self, node: Node) -> _Order | None:
        source: Any = node.args[0]
        order, before, after = self.orders[source], _shape(source), list(_shape(node))
        outer = prod(before[: order.dim])
        for j, size in enumerate(after):
            if prod(after[:j]) != outer:
                continue
            if size == before[order.dim]:
                return order._replace(dim=j)
            last = next((k for k in range(j, len(after)) if prod(after[j:k]) == order.before), None)
            if last is None or last == len(after) or after[last] != self.R:
                continue
            held = [*after[:j], self.R, *after[j:last], *after[last + 1 :]]
            back = list(range(len(after)))
            back.insert(last, back.pop(j))
            with self.graph.inserting_before(node):
                split = self._made(aten.view.default, node, held, source, held)
                whole = self._made(aten.permute.default, node, after, split, back)
            whole.meta["differs"] = [last]
            node.replace_all_uses_with(whole)
            self.graph.erase_node(node)
            return None
        node.args = (self._as_written(node, source), *node.args[1:])
        return None

    def _product(self, node: Node) -> _Order | None:
        left, right = node.args
        assert isinstance(left, Node)
        assert isinstance(right, Node)
        a, b = self.orders.get(left), self.orders.get(right)
        if (a is not None and a.dim == 1) or (b is not None and b.dim == 0):  # what is summed over
            if a is None or a.dim != 1:
                assert b is not None
                self._exchange(node, left, self._rows_ahead(node, left, b._replace(dim=1)))
            elif b is None or b.dim != 0:
                self._exchange(node, right, self._rows_ahead(node, right, a._replace(dim=0)))
            elif a._replace(dim=0) != b:
                for n in (left, right):
                    self._exchange(node, n, self._as_written(node, n))
            return None
        if a is not None and b is None:
            return a
        if b is not None and a is None:
            return b
        for n in (left, right):
            self._exchange(node, n, self._as_written(node, n))
        return None

    # Values in the other order

    def _as_written(self, node: Node, n: Node) -> Node:
        """A value in the order in which it is written."""
        if n not in self.orders:
            return n
        dim, a, b = self.orders[n]
        return self._turned(node, n, dim, [self.R, a, b], [1, 0, 2])

    def _rows_ahead(self, node: Node, n: Node, order: _Order) -> Node:
        """A value that is in the order in which it is written, in another one."""
        n = self._as_written(node, n)
        made = self._turned(node, n, order.dim, [order.before, self.R, order.after], [1, 0, 2])
        self.orders[made] = order
        return made

    def _turned(self, node: Node, n: Node, dim: int, parts: list[int], turn: list[int]) -> Node:
        shape = list(_shape(n))
        split, rank = [*shape[:dim], *parts, *shape[dim + 1 :]], len(shape) + 2
        order = [*range(dim), *(dim + t for t in turn), *range(dim + 3, rank)]
        with self.graph.inserting_before(node):
            made = self._made(aten.view.default, n, split, n, split)
            made = self._made(aten.permute.default, n, [split[d] for d in order], made, order)
            return self._made(aten.view.default, n, shape, made, shape)

    def _exchange(self, node: Node, old: Node, new: Node) -> None:
        if old is not new:
            node.replace_input_with(old, new)

    def _made(self, target: Any, like: Node, shape: Sequence[int], *args: Any) -> Node:
        made = self.graph.call_function(target, args)
        made.meta |= {"tensor": (torch.Size(shape), like.meta["tensor"][1]), "line": like.meta.get("line")}
        return made


def _shape(node: Node) -> tuple[int, ...]:
    return tuple(node.meta["tensor"][0])
