"""Values of a core that are taken by an index or are one: gathered, scattered, in order, the places of extremes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from .graph_values import packet
from .program import Refused
from .viewed_values import ViewedValues
from .views import View, collapse

__all__ = ["IndexedValues", "gives_parts"]

aten = torch.ops.aten

MOST_ORDERED = 64
"""Values that are put in order by insertion."""

LARGEST = 2**31

_WITH_INDEX = {aten.max.dim: ("amax", "argmax"), aten.min.dim: ("amin", "argmin")}
_ORDERED = {aten.sort.default, aten.sort.stable}


def gives_parts(node: Node) -> bool:
    """Whether a node gives several tensors, each of which is computed where it is asked for."""
    return node.target in _ORDERED or node.target in _WITH_INDEX


class IndexedValues(ViewedValues):
    """The program of a part of a step, with the values that have to do with indices."""

    def indexed(self, node: Node, to: View) -> bool:
        """Whether a node has to do with an index; then its instructions are there."""
        op = packet(node)
        if op in (aten.gather, aten.index_select):
            self._gathered(node, to)
        elif op in (aten.scatter, aten.scatter_add, aten.index_add):
            self._written(node, to)
        elif op in (aten.argmax, aten.argmin):
            self._to_index(node, to, "argmax" if op is aten.argmax else "argmin", node.args[0], node.args[1])
        else:
            return False
        return True

    def part(self, node: Node, to: View) -> bool:
        """Whether a node is a part of what is put in order, or of extremes with their places; likewise."""
        whole, which = node.args
        assert isinstance(whole, Node)
        first: Any = whole.args[0]
        if whole.target in _WITH_INDEX:
            dim: Any = whole.args[1]
            if which == 1:
                self._to_index(node, to, _WITH_INDEX[whole.target][1], first, dim)
            else:
                self.extreme(_WITH_INDEX[whole.target][0], to, self.view(first), dim, self._keeps(whole, 2))
        elif whole.target in _ORDERED:
            self._ordered(node, whole, to)
        else:
            return False
        return True

    def extreme(self, op: str, to: View, view: View, dim: int, keepdim: bool) -> None:
        """The largest or smallest values along a dimension."""
        raise NotImplementedError

    def _keeps(self, node: Node, position: int) -> bool:
        return bool(self.argument(node, position, "keepdim", False))

    def _to_index(self, node: Node, to: View, op: str, first: Any, dim: Any) -> None:
        view = self.view(first)
        if dim is None:
            raise Refused(f"{self.told(node)}: of all values")
        dim %= max(1, len(view.dims))
        if view.by_row and dim == 0:
            raise Refused(f"{self.told(node)}: it mixes rows")
        rest = [d for d in range(len(view.dims)) if d != dim]
        left = to.pick(rest) if len(to.dims) == len(view.dims) else to
        self.along(node, op, left, view.pick(rest), (0, view.dims[dim], view.strides[dim]))

    def along(self, node: Node, op: str, to: View, view: View, last: tuple[int, int, int], modes: int = 0) -> None:
        """An instruction over three dimensions at most and one more. last: stride of the result there, size, stride."""
        sizes, strides = collapse(to.dims, [to.strides, view.strides])
        if len(sizes) > 3:
            raise Refused(f"{self.told(node)}: over {len(sizes)} other dimensions of their own")
        ends = [[*s, along] for s, along in zip(strides, (last[0], last[2]), strict=True)]
        count = 1
        for size in (*sizes, last[1]):
            count *= size
        self.program.add(op, [to, view], [*sizes, last[1]], ends, modes, work=8 * count)

    def _ordered(self, node: Node, whole: Node, to: View) -> None:
        first: Any = whole.args[0]
        at = 1 if whole.target is aten.sort.default else 2
        dim, down = self.argument(whole, at, "dim", -1), bool(self.argument(whole, at + 1, "descending", False))
        view = self.view(first)
        dim = dim % max(1, len(view.dims))
        if not view.dims or (view.by_row and dim == 0) or view.dims[dim] > MOST_ORDERED:
            raise Refused(f"{self.told(whole)}: over rows, or more than {MOST_ORDERED} values")
        rest = [d for d in range(len(view.dims)) if d != dim]
        index = to if node.args[1] == 1 else self.program.new(to.dims, to.by_row)
        self.along(whole, "order", index.pick(rest), view.pick(rest),
                    (index.strides[dim], view.dims[dim], view.strides[dim]), int(down))  # fmt: skip
        if node.args[1] == 0:
            self._take(whole, to, view, dim, index)

    def _gathered(self, node: Node, to: View) -> None:
        table, dim, index = self._operands(node, to)
        self._take(node, to, table, dim, index)

    def _operands(self, node: Node, like: View) -> tuple[View, int, View]:
        """The tensor, the dimension that is indexed, and the index in the dimensions of `like`."""
        given: Any = node.args[0]
        by: Any = node.args[2]
        table, index = self.view(given), self.view(by)
        dim = self.dimension(node, 1, given)
        if table.by_row and dim == 0:
            raise Refused(f"{self.told(node)}: it takes rows of others")
        low, high = self.bounds.get(by, (-1.0, 0.0))
        if self.looks_at_indices and not 0 <= low <= high < table.dims[dim]:
            raise Refused(f"{self.told(node)}: its index may lie beyond the dimension")
        if packet(node) not in (aten.index_select, aten.index_add):
            return table, dim, index
        if dim == 0 and index.by_row:  # a row of the table for each
            strides = (index.strides[0], *[0] * (len(like.dims) - 1))
            return table, dim, View(index.slot, True, like.dims, strides, index.offset)
        spread = [index.strides[0] if d == dim else 0 for d in range(len(like.dims))]
        return table, dim, replace(index, by_row=like.by_row, dims=like.dims, strides=tuple(spread))

    def _take(self, node: Node, to: View, table: View, dim: int, index: View) -> None:
        """to[.., i, ..] = table[.., index[.., i, ..], ..], all in the dimensions of `to`."""
        strides = list(table.strides)
        size, along, strides[dim] = table.dims[dim], strides[dim], 0
        if to.by_row and not table.by_row and dim == 0:
            pass
        elif to.by_row != table.by_row:
            raise Refused(f"{self.told(node)}: it takes rows of others")
        dims = to.dims if dim == 0 and not table.by_row else (*table.dims[:dim], to.dims[dim], *table.dims[dim + 1 :])
        if dims != to.dims and any(a > b for a, b in zip(to.dims, dims, strict=True)):
            raise Refused(f"{self.told(node)}: its index has other dimensions")
        shown = View(table.slot, to.by_row, to.dims, tuple(strides), table.offset)
        self._by_index(node, "gather", to, [to, shown, index], size, along)

    def _written(self, node: Node, to: View) -> None:
        given: Any = node.args[0]
        source: Any = node.args[3]
        self.emit(node, "same", to, [given])
        if isinstance(source, Node):
            values = self.view(source)
        else:
            by: Any = node.args[2]
            values = self.operand(source, self.view(by), node)
        if node.kwargs:
            raise Refused(f"{self.told(node)}: with {', '.join(node.kwargs)}")
        table, dim, index = self._operands(node, values)
        if not to.by_row or to.by_row != table.by_row or not values.by_row:
            raise Refused(f"{self.told(node)}: rows are added up")
        dims = index.dims
        values = replace(values, dims=dims)
        if any(a > b for d, (a, b) in enumerate(zip(dims, to.dims, strict=True)) if d != dim):
            raise Refused(f"{self.told(node)}: its index has other dimensions")
        strides = list(to.strides)
        along, strides[dim] = strides[dim], 0
        target = replace(to, dims=dims, strides=tuple(strides))
        op = "scatter" if packet(node) is aten.scatter else "scatter_add"
        self._by_index(node, op, target, [target, values, index], to.dims[dim], along)

    def _by_index(self, node: Node, op: str, like: View, views: list[View], size: int, along: int) -> None:
        sizes, strides = collapse(like.dims, [v.strides for v in views])
        if len(sizes) > 4 or along < 0 or max(size, along) >= LARGEST:
            raise Refused(f"{self.told(node)}: over {len(sizes)} dimensions of their own")
        count = 1
        for n in sizes:
            count *= n
        self.program.add(op, views, sizes, strides, size << 32 | along, work=8 * count)

    def emit(self, node: Node, op: str, to: View, operands: Any) -> None:
        """An element-wise instruction."""
        self.program.element_wise(op, to, [self.operand(x, to, node) for x in operands])
