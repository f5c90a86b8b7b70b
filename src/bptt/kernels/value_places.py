"""The places of the values of a core: slots for inputs and outputs, and where each value is written and read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch.fx import Node

from ..steps import Part, SplitStep
from .graph_values import GraphValues, packet
from .program import Program, Refused
from .views import Slot, View, dims_of
from .whole_numbers import COUNTS

__all__ = ["ValuePlaces", "permuted"]

aten = torch.ops.aten


def permuted(node: Node, rank: int) -> list[int]:
    """The order in which a node has the dimensions of another."""
    order, args = list(range(rank)), cast("Any", node.args)
    if packet(node) is aten.permute:
        given: Any = args[1] if len(args) > 1 else node.kwargs["dims"]
        return [d % rank for d in given]
    a, b = (0, 1) if packet(node) is aten.t else (args[1], args[2])
    if order:
        order[a], order[b] = order[b], order[a]
    return order


class ValuePlaces(GraphValues):
    """The program of a part of a step, as yet without instructions but those that bring outputs where they belong.

    inputs: the kind of slot of those that are not plain ones. ends: (kind of slot, name) of each output that is wanted,
    in the kinds "next", "output", "back" and "sum". meets_indices: nobody has looked at its indices before.
    """

    def __init__(
        self,
        part: Part,
        step: SplitStep,
        inputs: Mapping[str, str],
        ends: Sequence[tuple[str, str]],
        counts: bool = False,
        meets_indices: bool = False,
    ) -> None:
        super().__init__(part, step, [name for _, name in ends], counts)
        self.program = Program(assumed=self.assumed)
        self.looks_at_indices = meets_indices or any(kind == "next" for kind, _ in ends)
        self.constants = self.program.slot("outside", 0, "constants")
        self.views: dict[Node, View] = {}
        self.wanted: dict[Node, Slot] = {}  # where a value is written at once
        self.places: dict[Node, View] = {}  # where one is written that is asked for
        for node, name in self.inputs.items():
            if node in self.needed:
                self.views[node] = self._input(node, name, inputs.get(name, "input"))
        self.ends = ends
        self.program.ends = [self._end(self.results[name], kind, name) for kind, name in ends]

    def finish(self) -> None:
        """Have every output where it belongs, once all values are computed."""
        for i, (_, name) in enumerate(self.ends):
            self.program.ends[i] = self._finish(self.results[name], self.program.ends[i], name)
        self.constants.width = max(1, len(self.program.constants))

    def _input(self, node: Node, name: str, kind: str) -> View:
        value = self.step.values[name]
        if value.rows < 0:
            raise Refused(f"input {name}: rows lie in another dimension than the first")
        counts = value.dtype in COUNTS and (name in self.step.kept or node in self.bounds)
        if value.dtype not in (torch.bool, self.dtype) and not counts:
            raise Refused(f"input {name}: its values are {value.dtype}, others are {self.dtype}")
        slot = self.program.slot(kind if value.rows else "outside", math.prod(dims_of(value)), name)
        self.program.inputs[name] = slot
        return View.of(slot, value)

    def _end(self, node: Node, kind: str, name: str) -> Slot:
        """The slot of an output, which the first output of a value is written to at once."""
        value = self.kind(node)
        counts = value.dtype in COUNTS and (name in self.step.kept or node in self.bounds)
        if value.dtype not in (torch.bool, self.dtype) and not counts:
            raise Refused(f"{self.told(node)}: {name} is {value.dtype}")
        slot = self.program.slot(
            "outside" if kind == "output" and not value.rows else kind, math.prod(dims_of(value)), name
        )
        if kind != "sum" and node.op != "placeholder":
            self.wanted.setdefault(self._unshaped(node), slot)
        return slot

    def _unshaped(self, node: Node) -> Node:
        """The value whose numbers are those of a value in their order, in other dimensions: what is written there."""
        while True:
            first: Any = node.args[0] if node.args else None
            if not isinstance(first, Node) or packet(first) is None or not self._reshapes(node, first):
                return node
            node = first

    def _reshapes(self, node: Node, first: Node) -> bool:
        here, there = self._known(node), self._known(first)
        if here is None or there is None or (here.rows, here.dtype) != (there.rows, there.dtype):
            return False
        if packet(node) in (aten.permute, aten.transpose, aten.t):
            dims, order = dims_of(there), permuted(node, len(dims_of(there)))
            moved = [d for d in order if dims[d] != 1]
            return moved == sorted(moved)
        if packet(node) is aten.select:
            return math.prod(dims_of(here)) == math.prod(dims_of(there))
        return packet(node) in (aten.view, aten.reshape, aten._unsafe_view, aten.squeeze, aten.unsqueeze)

    def _finish(self, node: Node, slot: Slot, name: str) -> Slot:
        """Have the value of an output in its slot, if it is not there yet. Sums have one already."""
        view, value = self.views[node], self.kind(node)
        if slot.kind == "sum":
            whole = View.of(view.slot, value)
            if view.slot.kind != "sum" or not view.same(whole) or view.slot.width != whole.slot.width:
                raise Refused(f"{self.told(node)}: {name} is not a sum over rows")
            if view.slot.width != slot.width:
                raise Refused(f"{self.told(node)}: {name} is part of a sum over rows")
            self.program.slots.remove(slot)
            return view.slot
        if view.slot.kind == "sum":
            raise Refused(f"{self.told(node)}: {name} is a sum over rows, within a step")
        to = View.of(slot, value)
        if not view.same(to):
            spread = view.broadcast(to.dims, to.by_row)
            assert spread is not None
            self.program.copy(to, spread)
        return slot

    def destination(self, node: Node) -> View:
        """Where the value of a node is to be written."""
        if node in self.places:
            return self.places[node]
        kind = self.kind(node)
        if node in self.wanted:
            place = View.of(self.wanted[node], kind)
        else:
            place = self._part_of_cat(node) or self.program.new(dims_of(kind), kind.rows > 0)
        self.places[node] = place
        return place

    def _part_of_cat(self, node: Node) -> View | None:
        """Its place in the first concatenation that uses it: others copy it from there."""
        if self.kind(node).rows == 0:
            return None
        for user in node.users:
            if user in self.needed and packet(user) is aten.cat and self.kind(user).rows:
                for part, place in self.parts_of_cat(user, self.destination(user)):
                    if part is node:
                        return place
        return None

    def parts_of_cat(self, cat: Node, whole: View) -> list[tuple[Node, View]]:
        parts: Any = cat.args[0]
        dim = self.dimension(cat, 1, cat)
        if self.kind(cat).rows and dim == 0:
            raise Refused(f"{self.told(cat)}: it concatenates rows")
        found, at = [], 0
        for part in parts:
            kind = self.kind(part)
            if kind.rows != self.kind(cat).rows or len(dims_of(kind)) != len(whole.dims):
                raise Refused(f"{self.told(cat)}: its parts have unequal dimensions")
            size = dims_of(kind)[dim]
            found.append((part, whole.slice(dim, at, size)))
            at += size
        return found

    def view(self, node: Node) -> View:
        found = self.views.get(node)
        if found is None:
            raise Refused(f"{self.told(node)}: it cannot be told when it is computed")
        if found.slot.kind == "sum":
            raise Refused(f"{self.told(node)}: a sum over rows is used within a step")
        return found

    def operand(self, x: object, like: View, node: Node) -> View:
        """An argument, a tensor or a number, in the dimensions of a result."""
        if isinstance(x, Node) and self.is_value(x):
            spread = self.view(x).broadcast(like.dims, like.by_row)
            if spread is None:
                raise Refused(f"{self.told(node)}: it broadcasts across rows")
            return spread
        if not isinstance(x, (bool, int, float)):
            raise Refused(f"{self.told(node)}: its argument {x}")
        at = self.program.constant(float(x))
        return View(self.constants, like.by_row, like.dims, (0,) * len(like.dims), at)
