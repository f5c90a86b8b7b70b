"""Parts of a traced step that are computed for all rows at once, as programs: for calls so small that torch's
operations take longer to be called than to be done.

Legend: R rows, those of all steps and lanes.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import suppress
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from ..steps import Part, SplitStep, Value
from . import _walks
from .graph_values import is_weight_gradient, packet
from .joined import MOST_VALUES, in_one
from .lowering import ELEMENT_WISE, Lowering
from .prepared import BOUND, walk_of
from .program import Refused

__all__ = ["RowPart"]

aten = torch.ops.aten

RESHAPED = {aten.view, aten.reshape, aten._unsafe_view, aten.squeeze, aten.unsqueeze}

FEWEST = 3
"""Operations in a part that is worth a program, products counting threefold."""

MOST_SIZES = 64
"""The numbers of rows for which one program is kept."""


class _RowProgram:
    """A part of a step as a program for all rows. inputs, outputs: the names of its values, in their order."""

    def __init__(self, step: SplitStep, part: Part, sums: Container[str] = (), hoisted: bool = False) -> None:
        self.outputs = part.outputs
        ends = [("sum" if name in sums else "output", name) for name in part.outputs]
        self.program = program = Lowering(part, step, {}, ends, meets_indices=hoisted).program
        program.lay_out(frozenset())
        self.inputs = tuple(program.inputs)
        self.at = [program.number[program.inputs[name]] for name in self.inputs]
        self.ends = [program.number[slot] for slot in program.ends]
        self.dtype = step.dtype
        self.walk, self.constants, self.addresses = walk_of(program, self.dtype)

    def bound(self, R: int, sources: Mapping[str, tuple[int, int]]) -> _walks.Bound:
        walk = self.walk.copy()
        walk.T, walk.B = 1, R
        parts: list[int] = []
        for name, at in (*zip(self.inputs, self.at, strict=True), *zip(self.outputs, self.ends, strict=True)):
            parts += (at, *sources[name])
        return BOUND[self.dtype](walk, self.addresses.tolist(), parts, [], 0)


class RowPart:
    """Parts of a step, one after the other, as a program for all rows, and what follows from its sums over rows.

    inputs, outputs: those of programs. same: other outputs, which are one of these, or of the inputs, in other
    dimensions. after: what is left to torch operations, if anything is. Raises Refused where nothing is worth a
    program.
    """

    def __init__(self, step: SplitStep, parts: Sequence[Part], wanted: Sequence[str], variant: int) -> None:
        self.kinds, self.dtype, self.variant = step.values, step.dtype, variant
        divided = _Divided(in_one(parts, tuple(dict.fromkeys(wanted))), step.values)
        if divided.worth < FEWEST:
            raise Refused("hardly anything is to be computed")
        hoisted = step.hoisted in parts
        self.programs = [_RowProgram(step, divided.by_row(), divided.sums, hoisted)]
        self.same, self.after = divided.same, divided.after()
        if self.after is not None and divided.after_is_small():
            with suppress(Refused):
                self.programs.append(_RowProgram(step, self.after, hoisted=hoisted))
                self.after = None
        self.outputs = tuple(name for program in self.programs for name in program.outputs)
        given = (name for program in self.programs for name in program.inputs if name not in self.outputs)
        of_others = (name for name in self.same.values() if name not in self.outputs)
        self.inputs = tuple(dict.fromkeys((*given, *of_others)))
        self._bound: dict[int, list[_walks.Bound]] = {}

    @property
    def needs(self) -> tuple[str, ...]:
        """All that is to be given: the inputs, and what else `after` takes."""
        return self.inputs if self.after is None else (*self.inputs, *self.after.inputs)

    @property
    def row_work(self) -> float:
        """Multiplications of a row."""
        return self.programs[0].program.work

    def bound(self, R: int, sources: Mapping[str, tuple[int, int]]) -> list[_walks.Bound]:
        """The programs for R rows, of which every value has a source: (number of a memory, distance in bytes)."""
        return [program.bound(R, sources) for program in self.programs]

    def __call__(self, R: int, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The outputs by name. read: gives an input, by row `[R, ...]`."""
        given = [self._plain(read(name)) for name in self.inputs]
        made = [torch.empty(_size(self.kinds[name], R), dtype=self.dtype, device="cpu") for name in self.outputs]
        bound = self._bound.get(R)
        if bound is None:
            if len(self._bound) >= MOST_SIZES:
                self._bound.clear()
            sources = {name: (i, 0) for i, name in enumerate((*self.inputs, *self.outputs))}
            bound = self._bound[R] = self.bound(R, sources)
        begins = [t.data_ptr() for t in (*given, *made)]
        for program in bound:
            program.run(begins, self.variant, torch.get_num_threads())
        found = dict(zip(self.outputs, made, strict=True))
        known = dict(zip(self.inputs, given, strict=True)) | found
        found |= {name: known[of].view(_size(self.kinds[name], R)) for name, of in self.same.items()}
        if self.after is not None:
            inputs = [found[n] if n in found else read(n) for n in self.after.inputs]
            found |= zip(self.after.outputs, self.after.function(R, *inputs), strict=True)
        return found

    def _plain(self, x: Tensor) -> Tensor:
        x = x.detach().to(self.dtype)
        return x.contiguous().resolve_neg().clone() if not x.is_contiguous() or x.is_neg() or x._is_zerotensor() else x


def _size(kind: Value, R: int) -> tuple[int, ...]:
    return (R * kind.rows, *kind.shape) if kind.rows else kind.shape


def _computes(node: Node) -> bool:
    """Whether a value of a graph is a tensor that an operation gives."""
    return (packet(node) is not None and packet(node) is not aten.convolution_backward) or is_weight_gradient(node)


def _given(node: Node) -> list[Node]:
    """What a value is computed from."""
    return (node.args[0] if is_weight_gradient(node) else node).all_input_nodes  # type: ignore[union-attr]  # a node, by the operation


def _worth(node: Node) -> int:
    return 3 if packet(node) in (aten.mm, aten.convolution) or is_weight_gradient(node) else 1


class _Divided:
    """A part of a step, divided into what is computed row by row, with sums over all rows, and what follows from these.

    outputs: what the former gives, of which `sums` have no rows. same: see `RowPart`. worth: see `FEWEST`.
    """

    def __init__(self, part: Part, kinds: Mapping[str, Value]) -> None:
        self.part, self.kinds = part, kinds
        results: Any = part.graph.output_node().args[0]
        self.results: dict[str, Node] = dict(zip(part.outputs, results, strict=True))
        nodes = [n for n in part.graph.nodes if _computes(n)]
        self.sums: set[str] = set()
        self.later: set[Node] = set()  # what depends on sums
        self.fixed: set[Node] = set()  # what is the same for all rows
        for node in nodes:
            operands = [n for n in _given(node) if packet(n) is not None or n.op == "placeholder"]
            if any(n.name in self.sums or n in self.later for n in operands):
                self.later.add(node)
            elif self._rows(node) == 0 and any(self._rows(n) for n in operands):
                self.sums.add(node.name)
            elif self._rows(node) == 0:
                self.fixed.add(node)
        self.same, used = dict[str, str](), dict[str, None]()
        for name, node in self.results.items():
            first: Any = node.args[0] if node.args else None
            if node in self.later and packet(node) in RESHAPED and first.name in self.sums:
                self.same[name] = first.name
                used[first.name] = None
            elif node in self.fixed and packet(node) in RESHAPED and first.op == "placeholder":
                self.same[name] = first.name
            elif node.op == "call_function" and node not in self.later and node not in self.fixed:
                used[node.name] = None
        self.left = [name for name, n in self.results.items() if name not in self.same and name not in used]
        for node in nodes:
            if node in self.later and not (node.name in self.same and len(node.users) == 1):
                operands = [n for n in _given(node) if n not in self.later and n not in self.fixed]
                used |= dict.fromkeys(n.name for n in operands if packet(n) is not None)
        self.outputs = tuple(used)
        self.worth = sum(_worth(n) for n in nodes if n not in self.later and n not in self.fixed)

    def _rows(self, node: Node) -> int:
        known = self.kinds.get(node.name)
        if known is None:
            raise Refused(f"{node.name}: nothing says of which kind its value is")
        return known.rows

    def by_row(self) -> Part:
        """What is computed row by row."""
        graph, made = Graph(), dict[Node, Node]()
        for node in self.part.graph.nodes:
            if node.op != "output" and node not in self.later:
                made[node] = graph.node_copy(node, made.__getitem__)
                made[node].name = node.name
        by_name = {node.name: made[node] for node in made}
        graph.output(tuple(by_name[name] for name in self.outputs))
        return in_one((Part(graph, self.part.inputs, self.outputs),), self.outputs)

    def after(self) -> Part | None:
        """What follows."""
        if not self.left:
            return None
        graph, made = Graph(), dict[Node, Node]()
        order = list(self.part.graph.nodes)
        inputs = []
        for node in order:
            if node.op == "placeholder":
                made[node] = graph.placeholder(node.name)
                inputs.append(node.name)
        for node in order:
            if node.name in self.outputs:
                made[node] = graph.placeholder(node.name)
                inputs.append(node.name)
        for node in order:
            if node not in made and node.op == "call_function" and all(n in made for n in node.all_input_nodes):
                made[node] = graph.node_copy(node, made.__getitem__)
                made[node].name = node.name
        graph.output(tuple(made[self.results[name]] for name in self.left))
        return in_one((Part(graph, tuple(inputs[1:]), tuple(self.left)),), tuple(self.left))

    def after_is_small(self) -> bool:
        """Whether all that follows gives few values, and is done value by value."""
        nodes = [n for n in (*self.later, *self.fixed) if packet(n) is not None]
        return all(
            packet(n) in RESHAPED or (packet(n) in ELEMENT_WISE and prod(self.kinds[n.name].shape) <= MOST_VALUES)
            for n in nodes
        ) and all(self.kinds[name].rows == 0 for name in self.left)
