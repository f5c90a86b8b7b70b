"""Rewriting of a traced step so that less of it has to wait for the carry: sums and products taken apart.

Values stay the same up to rounding. A sum of terms adds those that wait for nothing first; a product with a
concatenation is a sum of products, of which some wait for nothing; of a product only the columns used are made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from .channels import by_channels, narrowed_channels

__all__ = ["reassociated"]

aten = torch.ops.aten


def reassociated(graph: Graph, late: Callable[[], set[Node]], shared: Callable[[], set[Node]]) -> None:
    """Rewrite a graph in place. late: the values that can only be had step by step, as the graph is now; shared: those
    that are the same at all steps.
    """
    for node in list(graph.nodes):
        if node.target is aten.slice.Tensor:
            _narrowed(graph, node)
    for node in list(graph.nodes):
        if node.target is aten.slice.Tensor:
            narrowed_channels(graph, node)
    waits = late().__contains__
    for node in list(graph.nodes):
        if node.target is aten.mm.default:
            _by_columns(graph, node, waits)
        elif node.target is aten.convolution.default:
            by_channels(graph, node, waits)
    waits = late().__contains__
    order = _Order(waits, shared().__contains__)
    for node in list(graph.nodes):
        if node.target is aten.add.Tensor and not any(_is_plain_sum(user) for user in node.users):
            _early_terms_first(graph, node, order)
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users:
            graph.erase_node(node)


def _narrowed(graph: Graph, node: Node) -> None:
    """Of a product, only the columns that a slice takes."""
    product, dim, start, end, step = node.args
    if not (isinstance(product, Node) and product.target is aten.mm.default and dim == 1 and step == 1):
        return
    if any(user.target is not aten.slice.Tensor for user in product.users):
        return
    left, right = product.args
    if not isinstance(right, Node) or _rows(right):
        return
    with graph.inserting_before(node):
        columns = graph.call_function(aten.slice.Tensor, (right, 1, start, end, 1))
        _describe(columns, (right.meta["dims"][0], node.meta["dims"][1]), node)
        made = graph.call_function(aten.mm.default, (left, columns))
        _describe(made, node.meta["dims"], node)
    made.meta["mixed"] = node.meta.get("mixed", False)
    node.replace_all_uses_with(made)
    graph.erase_node(node)


def _by_columns(graph: Graph, node: Node, waits: Callable[[Node], bool]) -> None:
    """A product with a concatenation of values that wait and values that do not, as a sum of products."""
    cat, weight = node.args
    if not (isinstance(cat, Node) and cat.target is aten.cat.default and cat.args[1] == 1) or not isinstance(
        weight, Node
    ):
        return
    pieces: Sequence[Any] = cat.args[0]  # type: ignore[assignment]  # what this operation is of, is a node
    if _rows(weight) or node.meta.get("mixed") or len({waits(p) for p in pieces}) < 2:
        return
    groups: list[tuple[bool, int, int, list[Node]]] = []
    start = 0
    for piece in pieces:
        size = piece.meta["dims"][1][0]
        if groups and groups[-1][0] == waits(piece):
            groups[-1] = (groups[-1][0], groups[-1][1], start + size, [*groups[-1][3], piece])
        else:
            groups.append((waits(piece), start, start + size, [piece]))
        start += size
    total: Node | None = None
    with graph.inserting_before(node):
        for _, a, b, own in groups:
            rows = graph.call_function(aten.slice.Tensor, (weight, 0, a, b, 1))
            _describe(rows, ((b - a, False), weight.meta["dims"][1]), weight)
            left = own[0]
            if len(own) > 1:
                left = graph.call_function(aten.cat.default, (own, 1))
                _describe(left, (cat.meta["dims"][0], (b - a, False)), cat)
            part = graph.call_function(aten.mm.default, (left, rows))
            _describe(part, node.meta["dims"], node)
            if total is not None:
                added = graph.call_function(aten.add.Tensor, (total, part))
                _describe(added, node.meta["dims"], node)
                part = added
            total = part
    assert total is not None
    node.replace_all_uses_with(total)
    graph.erase_node(node)


def _is_plain_sum(node: Node) -> bool:
    return node.target is aten.add.Tensor and all(isinstance(a, Node) for a in node.args)


@dataclass(frozen=True)
class _Order:
    """The order in which terms are added: 0 those the same at all steps, 1 those before the walk, 2 the rest."""

    waits: Callable[[Node], bool]
    shared: Callable[[Node], bool]

    def __call__(self, node: Node) -> int:
        return 2 if self.waits(node) else 0 if self.shared(node) else 1


def _early_terms_first(graph: Graph, node: Node, order: _Order) -> None:
    """A sum whose terms are added in the order in which they can be had."""
    terms = list[Node]()

    def collect(n: Node, root: bool) -> None:
        inner = _is_plain_sum(n) and (root or len(n.users) == 1) and n.meta["dtype"] == node.meta["dtype"]
        if inner and order(n) > 0:
            collect(n.args[0], False)  # type: ignore[arg-type]  # what this operation is of, is a node
            collect(n.args[1], False)  # type: ignore[arg-type]  # what this operation is of, is a node
        else:
            terms.append(n)

    collect(node, True)
    if len({order(t) for t in terms}) < 2 or len(terms) < 3:
        return
    with graph.inserting_before(node):
        total: Node | None = None
        for rank in range(3):
            own: Node | None = None
            for term in (t for t in terms if order(t) == rank):
                own = term if own is None else _added(graph, own, term, node)
            if own is not None:
                total = own if total is None else _added(graph, own, total, node)
    assert total is not None
    node.replace_all_uses_with(total)
    graph.erase_node(node)


def _added(graph: Graph, a: Node, b: Node, like: Node) -> Node:
    made = graph.call_function(aten.add.Tensor, (a, b))
    first, second = a.meta["dims"], b.meta["dims"]
    rank = max(len(first), len(second))
    one = (1, False)
    pairs = zip((one,) * (rank - len(first)) + first, (one,) * (rank - len(second)) + second, strict=True)
    _describe(made, tuple(q if p == one else p for p, q in pairs), like)
    return made


def _rows(node: Node) -> bool:
    return any(rows for _, rows in node.meta["dims"])


def _describe(made: Node, dims: Any, like: Node) -> None:
    made.meta["dims"], made.meta["dtype"], made.meta["line"] = tuple(dims), like.meta["dtype"], like.meta.get("line")
