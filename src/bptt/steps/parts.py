"""A traced step in parts: what is computed once, step by step, and for all steps at once, as graphs of aten operations.

Legend: R rows (lanes of a batch, of one step or of several), T steps.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node

__all__ = ["Part", "SplitStep", "Value"]

aten = torch.ops.aten

_FUNCTIONS: dict[Any, Any] = {
    getattr(getattr(aten, name), overload): getattr(torch, name)
    for overload, names in {
        "Tensor": "add sub mul div eq ne lt le gt ge",
        "default": "neg exp expm1 log log1p tanh sigmoid sqrt rsqrt abs reciprocal relu sign sin cos erf maximum "
        "minimum mm bmm logical_not logical_and logical_or",
        "self": "where",
        "dim_IntList": "sum",
    }.items()
    for name in names.split()
} | {
    aten.view.default: torch.reshape,  # what it is a view of may lie in memory in another way
    aten.permute.default: torch.permute,
    aten.cat.default: torch.cat,
}
"""Functions of torch that do the same, and are called in less time."""

_ALIASES = {aten.view.default, aten.permute.default, aten.squeeze.dims, aten.unsqueeze.default}
_FRESH = {aten.mm.default, aten.bmm.default, aten.sum.dim_IntList, aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor,
          aten.div.Tensor, aten.neg.default, aten.cat.default}  # fmt: skip
"""Operations whose result is a part of its argument; some whose result is in memory of its own."""


class Value(NamedTuple):
    """The kind of a value in a traced step.

    rows: its first dimension is `rows * R`, row after row; 0: it has no rows, and is the same for all of them; -1: rows
    lie in another dimension (in deferred parts only). shape: the other dimensions; all of them where rows is 0.
    """

    rows: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Part:
    """A part of a traced step: a function from named values to named values.

    graph: a placeholder "R", the number of rows, then one for each input; operations of aten; a tuple of the outputs.
    Sizes in the graph that count rows are products of R: `SplitStep.values` says the kind of every value. An output
    may be an input, and may stand there twice.
    """

    graph: Graph
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @cached_property
    def function(self) -> Callable[..., tuple[Tensor, ...]]:
        """The part by torch operations: a function of R and the inputs."""
        return _function(self._fused())

    @cached_property
    def in_turn(self) -> tuple[Callable[[int], tuple[Tensor, ...]], Callable[..., tuple[Tensor, ...]]]:
        """The same for many calls of one number of rows: a function of R that makes what follows from it alone, and one
        of R, all that the first has made, and the inputs.
        """
        graph, made = self._fused(), Graph()
        end, rows = graph.output_node(), next(iter(graph.nodes))
        free = {rows}
        for node in graph.nodes:
            if node.op == "call_function" and free.issuperset(node.all_input_nodes):
                free.add(node)
        counts = {rows, *(n for n in free if n.target is operator.mul)}
        used = [n for n in graph.nodes if n in free - counts and end not in n.users and not free.issuperset(n.users)]
        own: dict[Any, Any] = {}
        for node in graph.nodes:
            if node in free:
                own[node] = made.node_copy(node, lambda n: own[n])
        made.output(tuple(own[n] for n in used))
        made.eliminate_dead_code()
        with graph.inserting_after(rows):
            for node in reversed(used):
                node.replace_all_uses_with(graph.placeholder(f"free_{node.name}"))
        graph.eliminate_dead_code()
        return _function(made), _function(graph)

    def _fused(self) -> Graph:
        graph = Graph()
        graph.output(graph.graph_copy(self.graph, {}))
        _fuse_products(graph)
        return graph

    @cached_property
    def operations(self) -> float:
        """How many operations torch is asked for at each of many calls; a view counts half."""
        made = [n for n in self.graph.nodes if n.op == "call_function"]
        free = set[Node]()
        for node in made:
            if all(n in free or n is next(iter(self.graph.nodes)) for n in node.all_input_nodes):
                free.add(node)
        asked = [n.target for n in made if n not in free and isinstance(n.target, OpOverload)]
        return sum(0.5 if target.is_view else 1.0 for target in asked)

    def only(self, names: Container[str]) -> Part:
        """The part as far as these of its outputs need it. Inputs stay as they are."""
        outputs = tuple(name for name in self.outputs if name in names)
        graph, made = Graph(), dict[Node, Node]()
        results = graph.graph_copy(self.graph, made)
        assert isinstance(results, tuple)
        graph.output(tuple(r for r, name in zip(results, self.outputs, strict=True) if name in names))
        graph.eliminate_dead_code()
        return Part(graph, self.inputs, outputs)

    def __call__(self, R: int, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs by name, of R rows, by torch operations."""
        if not self.outputs:
            return {}
        return dict(zip(self.outputs, self.function(R, *(values[n] for n in self.inputs)), strict=True))


def _function(graph: Graph) -> Callable[..., tuple[Tensor, ...]]:
    for node in graph.nodes:
        node.target = _FUNCTIONS.get(node.target, node.target)
    return GraphModule(torch.nn.Module(), graph).forward


def _fuse_products(graph: Graph) -> None:
    """Products to which the same row is added everywhere, as one operation."""
    for node in list(graph.nodes):
        if node.target is not aten.add.Tensor or not all(isinstance(a, Node) for a in node.args):
            continue
        for product, other in (node.args, node.args[::-1]):
            dims = other.meta.get("dims", ())
            if product.target is aten.mm.default and len(product.users) == 1 and len(dims) == 1 and not dims[0][1]:
                with graph.inserting_before(node):
                    node.replace_all_uses_with(graph.call_function(torch.addmm, (other, *product.args)))
                graph.erase_node(node)
                graph.erase_node(product)
                break


@dataclass(frozen=True, eq=False)
class SplitStep:
    """A step `(carry, x) -> (carry, y)` and its vector-Jacobian product, split by when each value can be computed.

    Every value has one name in all parts. values: the kind of each. Of each leaf: carry, x, captured, the names of what
    the step is given; next, y: of what it returns; adjoints: of the adjoint of `next` that arrives (None: the leaf has
    no gradient); dys: of the cotangent of y (None likewise); back: of the adjoint that goes on to the step before
    (None: zero); dx, dcaptured: of the gradients of x and of captured tensors (None: not wanted, or zero).
    """

    values: Mapping[str, Value]
    carry: tuple[str, ...]
    x: tuple[str, ...]
    captured: tuple[str, ...]
    next: tuple[str, ...]
    y: tuple[str, ...]
    adjoints: tuple[str | None, ...]
    dys: tuple[str | None, ...]
    back: tuple[str | None, ...]
    dx: tuple[str | None, ...]
    dcaptured: tuple[str | None, ...]

    constants: Part  # of captured tensors alone: once a call
    hoisted: Part  # of x and constants: once, for all T * B rows, before the walk
    forward: Part  # the core of stage 1, step by step: from carry, x, hoisted, constants to `next`, `kept`, core ys
    outputs: Part  # of ys that the core does not compute: once, for all rows, after the walk
    errors: Part  # of dys and what the forward pass left: once, for all rows, before the walk back
    adjoint: (
        Part  # the core of stage 3, step by step: from adjoints, errors and what is kept to `back`, `sent`, `summed`
    )
    deferred: Part  # from `sent` and what is kept to dx and dcaptured: once, for all rows, after the walk back

    kept: tuple[str, ...]  # values of the core of stage 1 (besides carry) that later parts need: the tape
    owned: frozenset[str]  # inputs of the core of stage 3 that count only at a block's own losses: dys and errors
    sent: tuple[str, ...]  # values of the core of stage 3, by row, that `deferred` needs: sums over blocks, per step
    summed: tuple[str, ...]  # values of the core of stage 3 without rows: sums over rows, steps and blocks
    lanes: frozenset[str] = frozenset()  # captured tensors with a row for each lane, the same at every step
    by_lane: Mapping[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)
    # of gradients in dcaptured that are sums of products by row: what `deferred` gives in their place, the factors
    by_operations: Callable[[], SplitStep] | None = field(default=None, repr=False)

    @cached_property
    def dtype(self) -> torch.dtype:
        """That of the carry: of its first tensor of real numbers, if it has one."""
        kinds = [self.values[name].dtype for name in self.carry]
        return next((dtype for dtype in kinds if dtype.is_floating_point), kinds[0])

    @cached_property
    def for_operations(self) -> SplitStep:
        """The same for kernels that call one operation after another: whatever can wait is computed for all rows."""
        return self if self.by_operations is None else self.by_operations()

    @cached_property
    def own(self) -> frozenset[str]:
        """Values of `deferred` that lie in memory that no other value, and no input, is a part of."""
        given = self.deferred.graph.output_node().args[0]
        assert isinstance(given, tuple)
        found = set()
        for name, node in zip(self.deferred.outputs, given, strict=True):
            while len(node.users) == 1 and node.target in _ALIASES:
                node = node.args[0]
            if len(node.users) == 1 and node.target in _FRESH:
                found.add(name)
        return frozenset(found)

    def over_time(self, name: str, values: Mapping[str, Tensor]) -> Tensor:
        """The sum over all steps of a gradient of a captured tensor with a row for each lane, `[B, ...]`."""
        if name not in self.by_lane:
            return values[name].sum(0)
        terms = []
        for left, right in self.by_lane[name]:
            a, b = values[left], values[right]  # [T, B, i, k] and [T, B, k, j]
            terms.append(torch.bmm(a.permute(1, 2, 0, 3).flatten(2), b.transpose(0, 1).flatten(1, 2)))
        return sum(terms[1:], terms[0])

    def row_bytes(self, names: Iterable[str]) -> int:
        """The bytes that some values have for each lane of a step."""
        kinds = [self.values[n] for n in names]
        return sum(k.rows * prod(k.shape) * k.dtype.itemsize for k in kinds)
