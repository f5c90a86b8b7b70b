"""Two traces of a step with different numbers of rows, as one graph for any number of rows."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Graph, Node

from .branches import Branches
from .canonical import OF_NUMBERS, solved_again
from .draws import Draw
from .known import known_before
from .merged_rows import rows_ahead
from .parts import Part, Value
from .recorder import NotTraceable
from .rows import at_line, check_rows, kind_of, row_dim
from .rows_first import rows_first
from .simplify import simplified

__all__ = ["Recorded", "TracedStep", "check_same_again", "merged"]

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class TracedStep:
    """A step and its vector-Jacobian product as one graph.

    graph: placeholders "R", carry, x, captured, adjoints, dys. Names of leaves, in order: see `SplitStep`. captured:
    the tensors; lanes: those of them that have a row for each lane. constants: those that the step makes of Python
    values alone. opaque: it hands captured tensors to calls that cannot be looked into. draws: the random numbers that
    it is given: the last leaves of x, in this order. probabilities: of x and captured tensors, of these draws.
    counted: which captured tensors have to be the numbers of the rows, from 0 on. checked: its code checks values.
    asks: its code asks whether tensors have a gradient, and was told that all of the carry have. asked: the operations
    that the step and its gradient ask torch for, one after the other; a view counts half. writes: it writes to what it
    is given.
    """

    graph: Graph
    values: dict[str, Value]
    carry: tuple[str, ...]
    x: tuple[str, ...]
    captured: tuple[str, ...]
    adjoints: tuple[str | None, ...]
    dys: tuple[str | None, ...]
    next: tuple[str, ...]
    y: tuple[str, ...]
    back: tuple[str | None, ...]
    dx: tuple[str | None, ...]
    dcaptured: tuple[str | None, ...]
    tensors: tuple[Tensor, ...]
    lanes: tuple[bool, ...]
    constants: tuple[bool, ...]
    opaque: bool
    draws: tuple[Draw, ...] = ()
    probabilities: Part | None = None
    branches: Branches | None = None
    counted: tuple[bool, ...] = ()
    checked: bool = False
    asks: bool = False
    asked: tuple[float, float] = (0.0, 0.0)
    writes: bool = False

    @cached_property
    def solves(self) -> bool:
        """Whether it solves linear systems, which the step itself raises an error for where a matrix is singular, or
        has a Cholesky factor, for which that is not positive definite.
        """
        return any(n.target in _SOLVERS for n in self.graph.nodes)

    @cached_property
    def rounding(self) -> float:
        """The relative rounding error of the least precise type that it computes in."""
        types = {value.dtype for value in self.values.values()}
        return max((torch.finfo(dtype).eps for dtype in types if dtype.is_floating_point), default=0.0)

    @property
    def tells_by_nan(self) -> bool:
        """Whether a result is not finite where the step itself would do something else, raise an error above all."""
        return self.checked


_SOLVERS = {aten._linalg_solve_ex.default, aten.linalg_inv_ex.default,
            aten.linalg_cholesky_ex.default}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Recorded:
    """A trace with a number of rows. What its graph puts out: see `trace`; None stands where there is no gradient."""

    R: int
    graph: Graph
    adjoints: list[str | None]
    dys: list[str | None]
    captured: list[tuple[Tensor, str]]
    constants: list[bool]
    opaque: bool
    decided: tuple[tuple[str, bool], ...] = ()
    checked: bool = False
    asks: bool = False
    asked: tuple[float, float] = (0.0, 0.0)
    writes: bool = False

    def operations(self) -> list[tuple[str, str]]:
        """Each operation with its arguments, in words, and where it stands."""
        made = [(t.tolist(), name) for (t, name), own in zip(self.captured, self.constants, strict=True) if own]
        nodes = [(f"{n.target}{n.args}{n.kwargs}", at_line(n)) for n in self.graph.nodes]
        return [*nodes, *((f"{name} {values}", "") for values, name in made)]


def check_same_again(before: list[tuple[str, str]], now: list[tuple[str, str]]) -> None:
    """Raise NotTraceable where a second trace with the same number of rows has other operations than the first."""
    pairs = zip_longest(before, now, fillvalue=("", ""))
    where = next((one[1] or other[1] for one, other in pairs if one[0] != other[0]), None)
    if where is not None:
        error = NotTraceable(
            f"it does something else when it is called again with the same carry and x{where}: by a state of Python's, "
            "the time or the like",
            whatever_rows=True,
        )
        error.changing = True
        raise error


def merged(a: Recorded, b: Recorded, lanes: frozenset[int]) -> TracedStep:
    """One graph for any number of rows, from the traces with two numbers."""
    rows_ahead(a.graph, a.R, b.graph, b.R)
    for recorded in (a, b):
        solved_again(recorded.graph)
        simplified(recorded.graph)
    _make_constants(a, b)
    nodes_a, nodes_b = list(a.graph.nodes), list(b.graph.nodes)
    _check_made_outside(a, b)
    if [n.target for n in nodes_a] != [n.target for n in nodes_b] or not _same_captured(a, b) or a.decided != b.decided:
        raise NotTraceable("it does other operations for another number of rows")
    graph, made = Graph(), dict[Node, Node]()
    rows, counted = graph.placeholder("R"), {n.name for n in nodes_a if n.meta.get("counted")}
    multiples = {1: rows}

    def count(k: int) -> Node:
        if k not in multiples:
            with graph.inserting_after(rows):
                multiples[k] = graph.call_function(operator.mul, (rows, k))
        return multiples[k]

    def merge(x: Any, y: Any, node: Node) -> Any:
        if isinstance(x, Node):
            if not isinstance(y, Node) or made[x] is not made[y]:
                raise NotTraceable("it does other operations for another number of rows")
            return made[x]
        if isinstance(x, (tuple, list)):
            if len(x) != len(y):
                raise NotTraceable("it does other operations for another number of rows")
            return type(x)([merge(i, j, node) for i, j in zip(x, y, strict=True)])
        if x == y or (x != x and y != y):
            return x
        counts = node.target in _SIZED and type(x) is int and type(y) is int
        if counts and x % a.R == 0 and x * b.R == y * a.R:
            return count(x // a.R)
        raise NotTraceable(f"the number of rows enters its values{at_line(node)} ({x} for {a.R} rows, {y} for {b.R})")

    dims: dict[str, tuple[tuple[int, bool], ...]] = {}
    for n, m in zip(nodes_a, nodes_b, strict=True):
        if n.op == "output":
            continue
        if n.op == "placeholder":
            new = graph.placeholder(n.target)
            if (n.meta.get("filling"), n.meta.get("order")) != (m.meta.get("filling"), m.meta.get("order")):
                raise NotTraceable("the number of rows decides what random numbers it draws")
        else:
            new = graph.call_function(n.target, merge(n.args, m.args, n), _merged_kwargs(merge, n, m))
        new.meta["line"] = n.meta.get("line")
        if "tensor" in n.meta:
            new.meta["dims"] = dims[new.name] = _dims(n, m, a.R, b.R)
            new.meta["dtype"] = n.meta["tensor"][1]
        made[n] = made[m] = new if "filling" not in n.meta else _rows_where_they_were(graph, new)
    final: list[list[Node | None]] = [
        [None if n is None else made[n] for n in part]
        for part in cast("list[list[Node | None]]", a.graph.output_node().args[0])
    ]
    end = graph.output(final)
    check_rows(graph)
    rows_first(graph)
    final = [list(part) for part in cast("list[list[Node | None]]", end.args[0])]
    branches, probabilities = final.pop(), final.pop()
    end.args = (final,)
    values = {n.name: kind_of(n) for n in graph.nodes if "dims" in n.meta}
    drawn = [n for n in nodes_a if "filling" in n.meta]
    draws = tuple(_draw(n, dims[n.name], by) for n, by in zip(drawn, probabilities, strict=True))
    next_, y, back, dx, dcaptured = ([None if n is None else n.name for n in part] for part in final)
    return TracedStep(
        graph,
        values,
        tuple(n.name for n in graph.nodes if n.op == "placeholder" and n.name.startswith("carry_")),
        (*(n.name for n in graph.nodes if n.op == "placeholder" and n.name.startswith("x_")), *(n.name for n in drawn)),
        tuple(name for _, name in a.captured),
        tuple(a.adjoints),
        tuple(a.dys),
        tuple(map(str, next_)),
        tuple(map(str, y)),
        tuple(back),
        tuple(dx),
        tuple(dcaptured),
        tuple(t for t, _ in a.captured),
        tuple(id(t) in lanes for t, _ in a.captured),
        tuple(a.constants),
        a.opaque,
        draws,
        known_before(graph, [n for n in probabilities if n is not None]),
        Branches.of(graph, [n for n in branches if n is not None], a.decided),
        tuple(name in counted for _, name in a.captured),
        a.checked,
        a.asks,
        a.asked,
        a.writes,
    )


def _rows_where_they_were(graph: Graph, drawn: Node) -> Node:
    """What is drawn, as the step has it: it is given with its rows first."""
    at, dims = row_dim(drawn), drawn.meta["dims"]
    if not at:
        return drawn
    drawn.meta["dims"] = dims[at], *dims[:at], *dims[at + 1 :]
    made = graph.call_function(aten.permute.default, (drawn, [*range(1, at + 1), 0, *range(at + 1, len(dims))]))
    made.meta |= {"line": drawn.meta["line"], "dims": dims, "dtype": drawn.meta["dtype"]}
    return made


def _draw(node: Node, dims: tuple[tuple[int, bool], ...], by: Node | None) -> Draw:
    """What fills a node with random numbers: some for each row."""
    found = [i for i, (_, rows) in enumerate(dims) if rows]
    if len(found) != 1 or (by is not None and found != [0]):
        raise NotTraceable(f"it draws random numbers that are the same for all rows{at_line(node)}")
    at, name = found[0], None if by is None else by.name
    shape = tuple(s for s, rows in dims if not rows)
    kind, device = node.meta["tensor"][1], node.meta["device"]
    return Draw(node.meta["filling"], dims[at][0], shape, kind, device, name, at, node.meta["order"])


def _make_constants(a: Recorded, b: Recorded) -> None:
    """Tensors that the step makes of the same numbers in both traces become captured ones."""
    if len(a.graph.nodes) != len(b.graph.nodes):
        return
    for n, m in list(zip(a.graph.nodes, b.graph.nodes, strict=True)):
        if n.target in OF_NUMBERS and (n.target, n.args, n.kwargs) == (m.target, m.args, m.kwargs):
            tensor = n.target(*n.args, **n.kwargs)
            for recorded, node in ((a, n), (b, m)):
                with recorded.graph.inserting_before(next(iter(recorded.graph.nodes))):
                    made = recorded.graph.placeholder(f"constant_{len(recorded.captured)}")
                made.meta |= {"constant": True, "tensor": node.meta["tensor"], "line": node.meta.get("line")}
                recorded.captured.append((tensor, made.name))
                recorded.constants.append(True)
                node.replace_all_uses_with(made)
                recorded.graph.erase_node(node)
                end = recorded.graph.output_node()
                *others, dcaptured, probabilities, branches = cast("Any", end.args[0])
                end.args = ([*others, [*dcaptured, None], probabilities, branches],)


def _check_made_outside(a: Recorded, b: Recorded) -> None:
    """Raise NotTraceable for a tensor that is another in each trace, though no operation of torch made it."""
    for (s, name), (t, other) in zip(a.captured, b.captured, strict=False):
        if s is not t and name == other and name.startswith("captured_") and s.shape == t.shape:
            node = next(n for n in a.graph.nodes if n.name == name)
            raise NotTraceable(
                f"it makes a tensor {list(s.shape)} by other means than torch's operations, of a NumPy array or a "
                f"buffer perhaps{at_line(node)}",
                whatever_rows=True,
            )


def _same_captured(a: Recorded, b: Recorded) -> bool:
    """Whether two traces read the same tensors from outside; those made of Python values are compared by these."""
    if a.constants != b.constants:
        return False
    pairs = zip(a.captured, b.captured, a.constants, strict=True)
    return all(s is t or (made and s.dtype == t.dtype and torch.equal(s, t)) for (s, _), (t, _), made in pairs)


_SIZED = {aten.view.default, aten.expand.default, aten.full.default}
"""Operations that are given sizes, which may count rows."""


def _merged_kwargs(merge: Callable[[Any, Any, Node], Any], n: Node, m: Node) -> dict[str, Any]:
    return {key: merge(value, m.kwargs[key], n) for key, value in n.kwargs.items()}


def _dims(n: Node, m: Node, a: int, b: int) -> tuple[tuple[int, bool], ...]:
    """Of each dimension its size, or how many rows it has for each row, and whether it is one of rows."""
    first, second = n.meta["tensor"][0], m.meta["tensor"][0]
    if len(first) != len(second):
        raise NotTraceable("it does other operations for another number of rows")
    dims = []
    for s, t in zip(first, second, strict=True):
        if s == t:
            dims.append((int(s), False))
        elif s % a == 0 and s * b == t * a:
            dims.append((s // a, True))
        else:
            raise NotTraceable(f"it takes some of the rows alone{at_line(n)}")
    return tuple(dims)
