"""A traced step, split by when each value can be computed.

Hoisted: products of x and captured tensors, once for all T * B rows, before the walk. Core: what lies on the carry's
path, step by step. Deferred: what of the gradient does not feed the carry, once for all rows, after the walk back.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch.fx import Graph, Node

from .algebra import reassociated
from .handed_on import HandedOn, by_lane, cheapest_to_send
from .kinds import ELEMENTWISE, VIEWS
from .linear import linear
from .parts import Part, SplitStep
from .recorder import NotTraceable
from .rows import kind_of, mixes_rows, row_dim
from .traced import TracedStep

__all__ = ["split"]

aten = torch.ops.aten

_PRODUCTS = {aten.mm.default, aten.bmm.default, aten.convolution.default, aten.convolution_backward.default}

_GATHERS = {aten.index_select.default, aten.gather.default, aten.scatter.value}

_ELEMENTARY = (
    "exp expm1 log log1p log2 tanh sigmoid sqrt rsqrt sin cos erf erfc atan asin acos sinh cosh tan asinh acosh atanh "
    "atan2 exp2 lgamma digamma logaddexp hypot"
)

_COSTLY = {getattr(aten, name).default for name in _ELEMENTARY.split()}
_COSTLY |= {aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.pow.Scalar}


def split(traced: TracedStep) -> SplitStep:
    """The parts of a traced step, for kernels that walk through whole cores (see `SplitStep.for_operations`)."""
    names = {n.name: n for n in traced.graph.nodes}
    waited_for = [names[n] for n in (*traced.carry, *filter(None, (*traced.adjoints, *traced.dys)))]
    rows = [n for n in names.values() if n.op == "placeholder" and (row_dim(n) is not None or n.name == "r")]
    reassociated(traced.graph, lambda: _reached(waited_for), lambda: set(traced.graph.nodes) - _reached(rows))
    bare = replace(traced, tensors=())  # so that no graph of a call is kept alive
    return replace(_Splitter(bare, True).parts(), by_operations=lambda: _Splitter(bare, False).parts())


def _reached(start: Iterable[Node]) -> set[Node]:
    """All that depends on some nodes, and these."""
    found, todo = set[Node](), list(start)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo.extend(node.users)
    return found


def _ancestors(ends: Iterable[Node], stop: Callable[[Node], bool] = lambda _: False) -> set[Node]:
    """All that some nodes depend on, and these, as far as nodes that stop it (which are not followed)."""
    found, todo = set[Node](), list(ends)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            if not stop(node):
                todo.extend(node.all_input_nodes)
    return found


@dataclass(eq=False)
class _Splitter:
    """The sets of nodes that parts are made of.

    in_walk: whether operations on rows cost next to nothing in a walk, where values lie near.
    """

    traced: TracedStep
    in_walk: bool

    def __post_init__(self) -> None:
        traced, graph = self.traced, self.traced.graph
        self.order = {n: i for i, n in enumerate(graph.nodes)}
        self.rows_node = next(iter(graph.nodes))
        final = cast("list[Any]", graph.output_node().args[0])
        self.next, self.y = (cast("list[Node]", list(part)) for part in final[:2])
        self.back, self.dx, self.dcaptured = (cast("list[Node | None]", list(part)) for part in final[2:])
        by_name = {n.name: n for n in graph.nodes}
        self.carry = [by_name[n] for n in traced.carry]
        self.x = [by_name[n] for n in traced.x]
        self.captured = [by_name[n] for n in traced.captured]
        self.adjoints = [by_name[n] for n in traced.adjoints if n]
        self.dys = [by_name[n] for n in traced.dys if n]
        lanes = [n for n, of_lane in zip(self.captured, traced.lanes, strict=True) if of_lane]
        self.given = {*self.x, *lanes}
        of_carry = _reached(self.carry)
        self.on_adjoint, self.on_dy = _reached(self.adjoints), _reached(self.dys)
        self.dual = self.on_adjoint | self.on_dy
        on_given = _reached(self.given)
        counts = {self.rows_node, *(n for n in self.rows_node.users if n.target is operator.mul)}
        inside = [n for n in graph.nodes if n.op in ("call_function", "placeholder") and n not in counts]
        self.free = {n for n in inside if n.op == "call_function"} - _reached(
            n for n in inside if n.op == "placeholder"
        )
        known = set(inside) - of_carry - self.dual - self.free
        self.constant = {n for n in known - on_given if row_dim(n) is None}
        self.early = known - self.constant  # of x, or of captured rows
        self.on_carry = of_carry - self.dual
        self._check()

    def _check(self) -> None:
        for node in (*self.next, *self.y, *filter(None, (*self.back, *self.dx))):
            if mixes_rows(node):
                raise NotTraceable("its rows depend on one another: a sum over rows goes into carry or y")
            if row_dim(node) != 0:
                raise NotTraceable("a leaf of carry or y is the same for all rows")

    # Sets -------------------------------------------------------------------------------------------------------------

    @cached_property
    def hoisted(self) -> set[Node]:
        """Early products and gathers, what they are made of, and sums of them with what is early or constant."""
        products = [n for n in self.early if self._at_once(n) or (n.target in _GATHERS and row_dim(n) == 0)]
        found = _ancestors(products) & self.early
        for n in sorted(self.early - found, key=self.order.__getitem__):
            inputs = n.all_input_nodes
            sums = n.target in (aten.add.Tensor, aten.sub.Tensor)
            known = all(i in found or i in self.constant or i in self.free for i in inputs)
            if sums and known and any(i in found and i.op != "placeholder" for i in inputs):
                found.add(n)
        return {n for n in found if n.op == "call_function"}

    @cached_property
    def _late_y(self) -> set[Node]:
        """What only ys need, where there is a product in it: computed for all steps at once, after the walk."""
        core = _ancestors(self.next)
        own = {n for n in _ancestors(self.y) if n.op == "call_function"} & self.on_carry - core
        products = {n for n in own if self._at_once(n)}
        return {n for n in own if n in _reached(products) or _reached([n]) & products} if products else set()

    @cached_property
    def errors(self) -> set[Node]:
        """Products of dys alone, and what of the dual they are made of."""
        alone = self.on_dy - self.on_adjoint
        products = [n for n in alone if self._at_once(n) and row_dim(n) == 0 and not mixes_rows(n)]
        return {n for n in _ancestors(products) & alone if n.op == "call_function"}

    @cached_property
    def adjoint_core(self) -> set[Node]:
        """What of the dual the walk back computes: what goes on to the step before, and what is not linear."""
        ends = {n for n in filter(None, self.back) if n in self.dual}
        bent = [n for n in self._wanted & self.on_adjoint if not self._linear(n)]
        if any(row_dim(n) != 0 for n in bent):
            raise NotTraceable("its gradient is not linear in what arrives, in a sum over rows")
        return {n for n in _ancestors([*ends, *bent]) & self.dual - self.errors if n.op == "call_function"}

    @cached_property
    def _wanted(self) -> set[Node]:
        return _ancestors(filter(None, (*self.dx, *self.dcaptured))) & self.dual

    def _linear(self, n: Node) -> bool:
        return linear(n, self.dual)

    @cached_property
    def summed(self) -> list[Node]:
        """Sums over rows of values that need no product and nothing else needs: added up in the walk, where operations
        cost next to nothing there.
        """
        if not self.in_walk:
            return []
        sums = [n for n in self._wanted if n.target is aten.sum.dim_IntList
                and (row_dim(n.args[0]), row_dim(n)) == (0, None)
                and n in self.on_adjoint - self.adjoint_core]  # fmt: skip
        sent_anyway = {i for n in self._wanted - self.adjoint_core if n not in sums for i in n.all_input_nodes}
        found = []
        for n in sorted(sums, key=self.order.__getitem__):
            own = _ancestors([n.args[0]], lambda i: i in self.adjoint_core) & self._wanted - self.adjoint_core  # type: ignore[list-item]  # a view is of a node
            plain = all(i.op == "placeholder" or i.target in ELEMENTWISE | VIEWS or i.target is aten.sum.dim_IntList
                        for i in own)  # fmt: skip
            if plain and not own & self.errors and n.args[0] not in sent_anyway:
                found.append(n)
        return found

    @cached_property
    def _summed_set(self) -> set[Node]:
        return {n for n in _ancestors(self.summed) & self.dual - self.errors if n.op == "call_function"}

    @cached_property
    def by_lane(self) -> dict[Node, tuple[tuple[Node, Node], ...]]:
        """The factors of gradients that are sums of products, of captured tensors with a row for each lane."""
        known = self.adjoint_core | self.errors
        lanes = {n for n, lane in zip(self.dcaptured, self.traced.lanes, strict=True) if lane and n is not None}
        found = {n: by_lane(n, lambda i: i in self.dual and i not in known) for n in lanes}
        return {n: pairs for n, pairs in found.items() if pairs}

    @cached_property
    def _later(self) -> list[Node]:
        """The gradients that are asked for, or the factors of which they are made."""
        factors = [n for pairs in self.by_lane.values() for pair in pairs for n in pair]
        return [*(n for n in (*self.dx, *self.dcaptured) if n is not None and n not in self.by_lane), *factors]

    @cached_property
    def deferred(self) -> set[Node]:
        outside = self.adjoint_core | self.errors | set(self.summed)
        ends = [n for n in self._later if n in self.dual]
        found = _ancestors(ends, lambda n: n in outside or n not in self.dual)
        return {n for n in found & self.dual - outside if n.op == "call_function"}

    @cached_property
    def needed(self) -> set[Node]:
        """Values of the forward pass that the backward pass mentions."""
        used = self.adjoint_core | self.errors | self._summed_set | self.deferred
        mentioned = {i for n in used for i in n.all_input_nodes} | set(self._later)
        return {n for n in mentioned if n in self.on_carry or n in self.early}

    @cached_property
    def kept(self) -> list[Node]:
        """The cheapest values from which those that are needed follow: a minimum cut."""
        known = {*self.carry, *self.next, *self.given}
        needed = {n for n in self.needed if n not in known}
        if not needed:
            return []
        import networkx  # loaded where a step is split only

        flow = networkx.DiGraph()
        region = _ancestors(needed, lambda n: n in known) & (self.on_carry | self.early)
        for n in region:
            if n in known:
                flow.add_edge("source", (n, 0))
                flow.add_edge((n, 0), (n, 1))
                continue
            flow.add_edge((n, 0), (n, 1), **({"capacity": self._size(n)} if row_dim(n) == 0 else {}))
            if n.target in _PRODUCTS or n.target in _COSTLY or n.target not in ELEMENTWISE | VIEWS:
                flow.add_edge("source", (n, 0))
            for i in n.all_input_nodes:
                if i in region:
                    flow.add_edge((i, 1), (n, 0))
        for n in needed:
            flow.add_edge((n, 1), "sink")
        if "source" not in flow:
            return []
        # Known values cost nothing: the cut goes through them first.
        for n in region & known:
            flow[(n, 0)][(n, 1)]["capacity"] = 0
        try:
            _, (first, _) = networkx.minimum_cut(flow, "source", "sink")
        except networkx.NetworkXUnbounded:
            raise NotTraceable(
                "its gradient needs a value whose rows do not come first, which cannot be kept"
            ) from None
        cut = [n for n in region - known if (n, 0) in first and (n, 1) not in first]
        return sorted(cut, key=self.order.__getitem__)

    def _size(self, n: Node) -> int:
        return max(1, math.prod(s for s, _ in n.meta["dims"])) * n.meta["dtype"].itemsize

    # Parts ------------------------------------------------------------------------------------------------------------

    def parts(self) -> SplitStep:
        late_y, carry, given = self._late_y, set(self.carry), self.given
        kept, nexts = self.kept, set(self.next)
        made_once = [n for n in self._sorted(self.constant) if self._used_outside(n, self.constant)]
        constants = {n for n in made_once if n.op == "call_function"}
        stop_constant = constants | {n for n in self.captured if n in self.constant}
        hoisted = {
            n for n in self.hoisted if self._used_outside(n, self.hoisted) or n in nexts or n in self.y or n in kept
        }
        hoisted = {n for n in map(_rows_first, hoisted) if n.op == "call_function"}
        known = carry | given | hoisted | stop_constant
        late_needs = {i for n in late_y for i in n.all_input_nodes if i in self.on_carry and i not in late_y}
        late_needs = set(map(_rows_first, late_needs)) - carry
        core_kept = [n for n in kept if n not in late_y and n not in hoisted and n not in given]
        core_y = [n for n in self.y if n not in late_y]
        forward_out = _unique([*self.next, *core_kept, *core_y, *self._sorted(late_needs)])
        late_kept = [n for n in kept if n in late_y]
        outputs_out = _unique([*(n for n in self.y if n in late_y), *late_kept])
        had = carry | nexts | given | set(kept) | stop_constant
        own_back = [n for n in self.back if n is not None]
        sent, summed = self.handed_on
        handed_on = {_rows_first(n) for n in self.errors if self._used_outside(n, self.errors)}
        errors_out = [n for n in self._sorted(handed_on) if n.op == "call_function"]
        adjoint_out = _unique([*own_back, *sent, *summed])
        back_stop = had | set(errors_out) | set(self.adjoints) | set(self.dys)
        deferred_out = _unique([n for n in self._later if n not in summed])
        deferred_stop = back_stop | set(sent) | set(summed)
        adjoint = self._part(adjoint_out, back_stop)
        values = {n.name: kind_of(n) for n in self.traced.graph.nodes if "dims" in n.meta}
        names = {n.name for n in (*self.dys, *errors_out)}
        t = self.traced
        return SplitStep(
            values,
            t.carry, t.x, t.captured, _names(self.next), _names(self.y), t.adjoints, t.dys,
            _wanted_names(self.back), _wanted_names(self.dx), _wanted_names(self.dcaptured),
            constants=self._part(self._sorted(constants), set(self.captured)),
            hoisted=self._part(self._sorted(hoisted), given | stop_constant),
            forward=self._part(forward_out, known),
            outputs=self._part(outputs_out, known | late_needs | nexts),
            errors=self._part(errors_out, had | set(self.dys)),
            adjoint=adjoint,
            deferred=self._part(deferred_out, deferred_stop),
            kept=_names(kept),
            owned=frozenset(names & set(adjoint.inputs)),
            sent=_names(sent),
            summed=_names(summed),
            lanes=frozenset(name for name, own in zip(t.captured, t.lanes, strict=True) if own),
            by_lane={n.name: tuple((a.name, b.name) for a, b in pairs) for n, pairs in self.by_lane.items()},
        )  # fmt: skip

    @cached_property
    def handed_on(self) -> HandedOn:
        """What the walk back hands on to what comes after it."""
        core = self.adjoint_core | {n for n in self.adjoints if n in self.dual}
        ends = {n for n in self._later if n in self.dual and n not in self.summed}
        order = self.order.__getitem__
        cheapest = cheapest_to_send(core, self.deferred, ends, self._linear, order) if self.in_walk else None
        if cheapest is not None:
            return HandedOn(cheapest.sent, [*self.summed, *cheapest.summed])
        used = {i for n in self.deferred for i in n.all_input_nodes if i in core}
        sent = self._sorted(n for n in map(_rows_first, ends & core | used) if n in core)
        return HandedOn(sent, self.summed)

    def _at_once(self, n: Node) -> bool:
        """Whether a value is a product that is had for many rows together in less time than for each."""
        if self.in_walk and n.target is aten.bmm.default:
            return any(row_dim(i) is None for i in n.all_input_nodes)
        return n.target in _PRODUCTS

    def _used_outside(self, n: Node, own: set[Node]) -> bool:
        return any(u not in own for u in n.users)

    def _sorted(self, nodes: Iterable[Node]) -> list[Node]:
        return sorted(nodes, key=self.order.__getitem__)

    def _part(self, outputs: Sequence[Node], stop: set[Node]) -> Part:
        """The graph from nodes that are known to outputs."""
        if not all("dims" in n.meta and row_dim(n) in (0, None) for n in outputs):
            raise NotTraceable("a value whose rows do not come first would have to be handed on")
        inside = _ancestors(outputs, lambda n: n in stop)
        graph, made = Graph(), dict[Node, Node]()
        made[self.rows_node] = graph.placeholder("R")
        inputs = [n for n in self._sorted(inside) if n in stop]
        for n in inputs:
            made[n] = graph.placeholder(n.name)
            made[n].meta = dict(n.meta)
        for n in self._sorted(inside - stop - {self.rows_node}):
            if n.op == "placeholder":
                raise AssertionError(f"{n.name} is not known where {_names(outputs)} are computed")
            made[n] = graph.node_copy(n, lambda i: made[i])
            made[n].name = n.name
        graph.output(tuple(made[n] for n in outputs))
        return Part(graph, _names(inputs), _names(outputs))


def _rows_first(node: Node) -> Node:
    """The value that a view whose rows do not come first is made of: what can be handed on in its place."""
    while row_dim(node) not in (0, None) and node.target in VIEWS and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node


def _names(nodes: Iterable[Node]) -> tuple[str, ...]:
    return tuple(n.name for n in nodes)


def _wanted_names(nodes: Iterable[Node | None]) -> tuple[str | None, ...]:
    return tuple(None if n is None else n.name for n in nodes)


def _unique(nodes: Sequence[Node]) -> list[Node]:
    return list(dict.fromkeys(nodes))
