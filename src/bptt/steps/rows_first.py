"""Values whose rows lie in another dimension than the first, computed with the rows first.

So they can be kept, handed on and run by programs. What is written in another order, as attention is over `[S, B, E]`,
is a view of that.

Legend: R rows; of a value `[before, k R, after]`, rows first is `[k R, before, after]`.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from math import prod
from typing import Any, cast

import torch
from torch.fx import Graph, Node

from .kinds import ELEMENTWISE, SUMS
from .rows import row_dim

__all__ = ["rows_first"]

aten = torch.ops.aten

Dims = tuple[tuple[int, bool], ...]


def rows_first(graph: Graph) -> None:
    """Rewrite a graph in place. Every node says its dimensions in "dims"."""
    if any(row_dim(n) not in (0, None) for n in graph.nodes):
        _RowsFirst(graph).rewrite()
        graph.eliminate_dead_code()


class _RowsFirst:
    """A pass over a graph. first: of values whose rows lie elsewhere, the same with rows first."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.first = graph, dict[Node, Node]()
        self.rows = next(iter(graph.nodes))

    def rewrite(self) -> None:
        for node in list(self.graph.nodes):
            if node.op != "call_function" or "dims" not in node.meta:
                continue
            if row_dim(node) not in (0, None):
                self._turn(node)
            elif node.target in SUMS and row_dim(node.args[0]) not in (0, None):
                self._reduced(node)
            elif node.target in (aten.permute.default, aten.view.default) and node.args[0] in self.first:
                with self.graph.inserting_before(node):
                    made = self._made(node)
                if made is not None:
                    self._exchange(node, made)

    def _turn(self, node: Node) -> None:
        with self.graph.inserting_before(node):
            made = self._made(node)
            if made is None:
                return
            if node.target is aten.permute.default and row_dim(node.args[0]) == 0:
                self.first[node] = made  # a view already of what has them first
                return
            i = _row(node)
            back = [*range(1, i + 1), 0, *range(i + 1, len(node.meta["dims"]))]
            whole = self._permuted(made, back)
        self._exchange(node, whole)
        self.first[whole] = made

    def _exchange(self, node: Node, new: Node) -> None:
        node.replace_all_uses_with(new)

    def _reduced(self, node: Node) -> None:
        """A sum over rows, or over others where the rows that stay come first then."""
        source: Any = node.args[0]
        dims = node.args[1] if isinstance(node.args[1], (list, tuple)) else [node.args[1]]
        i, first = _row(source), self.first.get(source)
        keeps = len(node.meta["dims"]) == len(source.meta["dims"])
        if first is None or keeps:
            return
        moved = [0 if d == i else d + (d < i) for d in cast("Sequence[int]", dims)]
        node.args = (first, moved if isinstance(node.args[1], (list, tuple)) else moved[0], *node.args[2:])

    def _made(self, node: Node) -> Node | None:
        """A value with its rows first; None where it is not known how."""
        target, args = node.target, cast("Any", node.args)
        dims: Dims = node.meta["dims"]
        i, source = row_dim(node), args[0]
        assert i is not None
        wanted = (dims[i], *dims[:i], *dims[i + 1 :])
        order = [i, *(d for d in range(len(dims)) if d != i)]
        if target in ELEMENTWISE:
            return self._new(node, wanted, *(self._aligned(a, len(dims), i) for a in args))
        if not isinstance(source, Node) or (row_dim(source) not in (0,) and source not in self.first):
            return self._of_others(node, wanted)
        given = self.first.get(source, source)
        j = _row(source)
        held = [j, *(d for d in range(len(source.meta["dims"])) if d != j)]  # of given, in the order of source
        if target is aten.permute.default:
            return self._permuted(given, [held.index(args[1][d]) for d in order])
        if target is aten.view.default:
            return self._viewed(given, source.meta["dims"], j, dims, i)
        if target is aten.unsqueeze.default:
            return self._new(node, wanted, given, args[1] + 1 if args[1] <= j else args[1])
        if target in (aten.select.int, aten.slice.Tensor, aten.slice_scatter.default):
            at = 2 if target is aten.slice_scatter.default else 1
            others = [self._rows_ahead(args[1])] if at == 2 else []
            if args[at] == j or None in others:
                return None
            return self._new(node, wanted, given, *others, held.index(args[at]), *args[at + 1 :])
        if target is aten.squeeze.dims:
            return self._new(node, wanted, given, [held.index(d) for d in args[1]])
        if target in SUMS:
            several = isinstance(args[1], (list, tuple))
            moved = [held.index(d) for d in (args[1] if several else [args[1]])]
            return self._new(node, wanted, given, moved if several else moved[0], *args[2:])
        if target is aten.expand.default:
            sizes = list(args[1])
            extra = len(dims) - len(source.meta["dims"])
            for _ in range(extra):
                given = self._unsqueezed(given, 1)
            return self._new(node, wanted, given, [sizes[d] for d in order])
        return None

    def _of_others(self, node: Node, wanted: Dims) -> Node | None:
        """What is made of several values."""
        target, args = node.target, cast("Any", node.args)
        i = _row(node)
        if target is aten.cat.default and args[1] != i:
            parts = [self._rows_ahead(a) for a in args[0]]
            return None if None in parts else self._new(node, wanted, parts, args[1] + (args[1] < i))
        if target is aten.mm.default and i == 1 and args[1] in self.first:
            left = self._permuted(args[0], [1, 0])
            return self._new(node, wanted, self.first[args[1]], left)
        if target is aten.full.default:
            sizes = list(args[0])
            return self._new(node, wanted, [sizes[i], *sizes[:i], *sizes[i + 1 :]], *args[1:])
        return None

    def _rows_ahead(self, node: Any) -> Node | None:
        return node if row_dim(node) == 0 else self.first.get(node)

    def _aligned(self, a: Any, rank: int, i: int) -> Any:
        """An operand of an element-wise operation whose result has the rows of its i-th dimension first."""
        if not isinstance(a, Node):
            return a
        own = len(a.meta["dims"])
        at = i - (rank - own)
        if row_dim(a) is None:
            return a if at < 0 else self._squeezed(a, at)
        given = self.first.get(a)
        if given is None:
            given = a if row_dim(a) == 0 else self._permuted(a, [at, *(d for d in range(own) if d != at)])
        for _ in range(rank - own):
            given = self._unsqueezed(given, 1)
        return given

    def _viewed(self, given: Node, before: Dims, j: int, after: Dims, i: int) -> Node | None:
        """Both are the same numbers in order: what is ahead of rows, rows, and what comes after them."""
        ahead, behind = prod(s for s, _ in before[:j]), prod(s for s, _ in before[j + 1 :])
        k, m = before[j][0], after[i][0]
        if ahead != prod(s for s, _ in after[:i]) or k * behind != m * prod(s for s, _ in after[i + 1 :]):
            return None
        others = (*after[:i], *after[i + 1 :])
        if k == m:
            return self._shaped(given, (after[i], *others))
        if k > 1:
            split = self._shaped(given, ((1, True), (k, False), *before[:j], *before[j + 1 :]))
            given = self._permuted(split, [0, *range(2, j + 2), 1, *range(j + 2, len(before) + 1)])
        whole = ((1, True), *after[:i], *([(m, False)] if m > 1 else []), *after[i + 1 :])
        given = self._shaped(given, whole)
        if m > 1:
            turned = self._permuted(given, [0, i + 1, *range(1, i + 1), *range(i + 2, len(whole))])
            given = self._shaped(turned, (after[i], *others))
        return given

    # New nodes

    def _new(self, like: Node, dims: Dims, *args: Any) -> Node:
        return self._call(like.target, dims, like, args, like.kwargs)

    def _call(self, target: Any, dims: Dims, like: Node, args: Any, kwargs: Any = None) -> Node:
        made = self.graph.call_function(target, tuple(args), dict(kwargs or {}))
        made.meta |= {"dims": tuple(dims), "dtype": like.meta["dtype"], "line": like.meta.get("line"),
                      "mixed": like.meta.get("mixed", False)}  # fmt: skip
        return made

    def _permuted(self, a: Node, order: Sequence[int]) -> Node:
        order = list(order)
        if a.target is aten.permute.default:
            inner: Any = a.args
            order, a = [inner[1][d] for d in order], inner[0]
        if order == sorted(order):
            return a
        return self._call(aten.permute.default, tuple(a.meta["dims"][d] for d in order), a, (a, order))

    def _shaped(self, a: Node, dims: Dims) -> Node:
        if a.meta["dims"] == dims:
            return a
        return self._call(aten.view.default, dims, a, (a, [self._size(d) for d in dims]))

    def _size(self, dim: tuple[int, bool]) -> Any:
        size, rows = dim
        if not rows:
            return size
        if size == 1:
            return self.rows
        for n in self.rows.users:
            if n.target is operator.mul and n.args == (self.rows, size):
                return n
        with self.graph.inserting_after(self.rows):
            return self.graph.call_function(operator.mul, (self.rows, size))

    def _unsqueezed(self, a: Node, dim: int) -> Node:
        dims = a.meta["dims"]
        return self._call(aten.unsqueeze.default, (*dims[:dim], (1, False), *dims[dim:]), a, (a, dim))

    def _squeezed(self, a: Node, dim: int) -> Node:
        dims = a.meta["dims"]
        return self._call(aten.squeeze.dims, (*dims[:dim], *dims[dim + 1 :]), a, (a, [dim]))


def _row(node: Node) -> int:
    along = row_dim(node)
    assert along is not None
    return along
