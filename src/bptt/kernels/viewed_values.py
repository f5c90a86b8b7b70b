"""Values of a core that are views of others, or constants: where they lie, without an instruction."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from ..steps import Value
from .graph_values import packet
from .program import Refused
from .value_places import ValuePlaces, permuted
from .views import View, dims_of
from .whole_numbers import COUNTS

__all__ = ["SAME", "ViewedValues"]

aten = torch.ops.aten

SAME = {aten.clone, aten.detach, aten.alias, aten.lift_fresh_copy, aten._to_copy}
RESHAPED = {aten.view, aten.reshape, aten._unsafe_view}
FILLED = {aten.zeros: 0.0, aten.ones: 1.0, aten.zeros_like: 0.0, aten.ones_like: 1.0}


class ViewedValues(ValuePlaces):
    """The program of a part of a step, with the values that need no instruction."""

    def viewed(self, node: Node) -> View | None:
        """The view that a node is of another, or of a constant."""
        op, kind = packet(node), self.kind(node)
        dims, by_row = dims_of(kind), kind.rows > 0
        if op in FILLED or op in (aten.full, aten.full_like, aten.scalar_tensor):
            at = {aten.full: 1, aten.full_like: 1, aten.scalar_tensor: 0}.get(op)
            number: Any = FILLED[op] if at is None else node.args[at]
            large = kind.dtype in COUNTS and node not in self.bounds and abs(number) > 2**16
            if not isinstance(number, (bool, int, float)) or large:
                raise Refused(f"{self.told(node)}: its argument {number}")
            place = self.program.constant(float(number))
            return View(self.constants, by_row, dims, (0,) * len(dims), place)
        if op is aten.arange and all(isinstance(n, (int, float)) for n in node.args):
            numbers: Any = node.args
            start, step = (numbers[0] if len(numbers) > 1 else 0), (numbers[2] if len(numbers) > 2 else 1)
            place = len(self.program.constants)
            self.program.constants += [float(start + i * step) for i in range(dims[0])]
            return View(self.constants, False, dims, (1,), place)
        first = node.args[0] if node.args else None
        if op in SAME and isinstance(first, Node):
            return None if self._makes_truth(first, kind) or self._cut(node) else self.views[first]
        if op in RESHAPED or op in (aten.squeeze, aten.unsqueeze):
            assert isinstance(first, Node)
            return self._reshaped(self.views[first], dims, by_row, node)
        if op in (aten.permute, aten.transpose, aten.t):
            return self._permuted(node)
        if op is aten.expand:
            assert isinstance(first, Node)
            spread = self.view(first).broadcast(dims, by_row)
            if spread is None:
                raise Refused(f"{self.told(node)}: it expands rows")
            return spread
        if op in (aten.slice, aten.select):
            return self._sliced(node)
        return self._flipped(node) if op is aten.flip else None

    def _flipped(self, node: Node) -> View:
        first: Any = node.args[0]
        view = self.view(first)
        offset, strides = view.offset, list(view.strides)
        for dim in self.argument(node, 1, "dims"):
            d = dim % len(strides)
            if view.by_row and d == 0:
                raise Refused(f"{self.told(node)}: it turns the order of rows round")
            offset, strides[d] = offset + (view.dims[d] - 1) * strides[d], -strides[d]
        return replace(view, strides=tuple(strides), offset=offset)

    def _makes_truth(self, node: Node, kind: Value) -> bool:
        return kind.dtype == torch.bool and self.kind(node).dtype != torch.bool

    def _reshaped(self, view: View, dims: tuple[int, ...], by_row: bool, node: Node) -> View:
        if view.by_row != by_row or math.prod(dims) != math.prod(view.dims):
            raise Refused(f"{self.told(node)}: it mixes rows with other dimensions")
        found = view.reshape(dims, by_row)
        if found is None:
            found = self.program.dense(view).reshape(dims, by_row)
            assert found is not None
        return found

    def _permuted(self, node: Node) -> View:
        first: Any = node.args[0]
        view = self.view(first)
        order = permuted(node, len(view.dims))
        if view.by_row and order[0] != 0:
            raise Refused(f"{self.told(node)}: it moves rows to another dimension")
        return view.pick(order)

    def _sliced(self, node: Node) -> View:
        first: Any = node.args[0]
        view, dim = self.view(first), self.dimension(node, 1, first)
        size = view.dims[dim]
        if packet(node) is aten.select:
            index: Any = self.argument(node, 2, "index")
            if view.by_row and dim == 0:
                raise Refused(f"{self.told(node)}: it selects a row")
            return view.select(dim, index % size)
        start, end, step = (self.argument(node, i, name) for i, name in ((2, "start"), (3, "end"), (4, "step")))
        if view.by_row and dim == 0:
            if start in (0, None) and (end is None or (isinstance(end, int) and end >= 2**31)) and step in (1, None):
                return view
            raise Refused(f"{self.told(node)}: it slices rows")
        if any(isinstance(x, Node) for x in (start, end, step)):
            raise Refused(f"{self.told(node)}: its bounds count rows")
        start, end, step = slice(start, end, step).indices(size)
        return view.slice(dim, start, max(0, -(-(end - start) // step)), step)
