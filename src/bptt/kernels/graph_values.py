"""The values of the graph of a core: of which kind each is, which are needed, and how often each is used."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from ..steps import Part, SplitStep, Value
from .program import Refused
from .views import dims_of
from .whole_numbers import COUNTS, Bounds, bounds_of

__all__ = ["GraphValues", "is_part", "is_weight_gradient", "packet"]

aten = torch.ops.aten

EXACT = {
    aten.full, aten.scalar_tensor, aten.zeros, aten.ones, aten.where, aten.sum, aten.neg, aten.add, aten.sub, aten.mul,
    aten._to_copy, aten.view, aten.reshape, aten.unsqueeze, aten.squeeze, aten.expand, aten.clone, aten.detach,
    aten.alias, aten.lift_fresh_copy, aten.arange,
}  # fmt: skip
"""Operations that may have whole numbers for results: what begins with constants and truth values stays small enough
to be the same as a real number."""


def packet(node: Node) -> Any:
    """The operation of aten that a node calls, whichever its overload; None of other nodes."""
    return getattr(node.target, "overloadpacket", None) if node.op == "call_function" else None


def is_part(node: Node) -> bool:
    """Whether a node is one of several tensors that an operation gives."""
    return node.op == "call_function" and node.target is operator.getitem


def is_weight_gradient(node: Node) -> bool:
    """Whether a node is the gradient of a convolution's weights."""
    if not is_part(node):
        return False
    (whole,) = node.all_input_nodes
    return packet(whole) is aten.convolution_backward and node.args[1:] == (1,)


class GraphValues:
    """The values of a part of a step, as far as some of its outputs need them. ends: the names of these outputs.
    counts: whether whole numbers are computed, between bounds that every call looks at.
    """

    def __init__(self, part: Part, step: SplitStep, ends: Sequence[str], counts: bool = False) -> None:
        self.step, self.dtype = step, step.dtype
        self.nodes = list(part.graph.nodes)
        placeholders = [node for node in self.nodes if node.op == "placeholder"][1:]
        (output,) = [node for node in self.nodes if node.op == "output"]
        self.inputs = dict(zip(placeholders, part.inputs, strict=True))
        self.kinds = {node: step.values[name] for node, name in self.inputs.items()}
        results: Any = output.args[0]
        self.results: dict[str, Node] = dict(zip(part.outputs, results, strict=True))
        nodes = [self.results[name] for name in ends]
        self.needed = self._needed(nodes)
        self.counts = self._counts(nodes)
        self.bounds: dict[Node, Bounds] = {}
        self.assumed: dict[str, Bounds] = {}
        if counts:
            needed = [node for node in self.nodes if node in self.needed]
            self.bounds, self.assumed = bounds_of(needed, self._known, self.inputs, self.dtype)
        self.absorbed = self._absorbed()

    def _needed(self, ends: Sequence[Node]) -> set[Node]:
        found: set[Node] = set()
        waiting = list(ends)
        while waiting:
            node = waiting.pop()
            if node not in found:
                found.add(node)
                waiting += [n for n in _operands(node) if self.is_value(n)]
        return found

    def _counts(self, ends: Sequence[Node]) -> dict[Node, int]:
        counts = dict.fromkeys(self.needed, 0)
        for node in self.needed:
            for operand in _operands(node):
                if operand in counts:
                    counts[operand] += 1
        for node in ends:
            counts[node] += 1
        return counts

    def is_value(self, node: Node) -> bool:
        """Whether a node is a tensor, not a number of rows or a size computed from it."""
        return node in self.kinds or packet(node) is not None or is_part(node) or node.op == "get_attr"

    def _absorbed(self) -> dict[Node, Node]:
        """Products that become part of the addition that alone uses them, with it."""
        found: dict[Node, Node] = {}
        for node in self.nodes:
            if node not in self.needed or packet(node) not in (aten.add, aten.sub) or len(node.args) < 2:
                continue
            if node.kwargs.get("alpha", 1) != 1 or self.kind(node).dtype == torch.bool:
                continue
            a, b = node.args[0], node.args[1]
            adds = packet(node) is aten.add
            for inner in (aten.mm, aten.mul):
                sides = [x for x in (a, b) if isinstance(x, Node) and packet(x) is inner and self.counts.get(x) == 1]
                sides = [x for x in sides if self.kind(x) == self.kind(node) and (adds or inner is aten.mul)]
                if sides and a is not b:
                    found[sides[0]] = node
                    break
        return found

    def _known(self, node: Node) -> Value | None:
        return self.kinds.get(node) or self.step.values.get(node.name)

    def kind(self, node: Node) -> Value:
        found = self._known(node)
        if found is None:
            raise Refused(f"{self.told(node)}: nothing says of which kind its value is")
        if found.rows < 0:
            raise Refused(f"{self.told(node)}: rows lie in another dimension than the first")
        counts = found.dtype in COUNTS and (node in self.bounds or (packet(node) in EXACT and not self._cut(node)))
        if found.dtype not in (torch.bool, self.dtype) and not counts:
            raise Refused(f"{self.told(node)}: its values are {found.dtype}, others are {self.dtype}")
        if 0 in found.shape:
            raise Refused(f"{self.told(node)}: it has no values")
        return found

    def _cut(self, node: Node) -> bool:
        """Whether it makes whole numbers of real ones."""
        first = node.args[0] if packet(node) is aten._to_copy else None
        return isinstance(first, Node) and (known := self._known(first)) is not None and known.dtype.is_floating_point

    def told(self, node: Node) -> str:
        line = node.meta.get("line")
        name = node.target if node.op != "placeholder" else f"input {node.name}"
        return f"{name} ({line})" if line else f"{name}"

    def dimension(self, node: Node, position: int, of: Node) -> int:
        """An argument that is a dimension of a tensor, from 0 on; 0 where it is not given."""
        dim: Any = self.argument(node, position, "dim", 0)
        return dim % len(dims_of(self.kind(of)))

    def argument(self, node: Node, position: int, name: str, default: Any = None) -> Any:
        return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _operands(node: Node) -> list[Node]:
    found: list[Node] = []
    torch.fx.node.map_arg((node.args, node.kwargs), found.append)
    return found
