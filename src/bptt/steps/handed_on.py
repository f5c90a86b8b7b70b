"""What the walk back hands on: the fewest values by row from which the gradients that can wait follow."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any, NamedTuple, cast

import torch
from torch.fx import Node

from .kinds import ELEMENTWISE, VIEWS
from .rows import row_dim

__all__ = ["HandedOn", "by_lane", "cheapest_to_send"]

aten = torch.ops.aten

LEAST_GAIN = 0.8
"""Of what it costs to have everything wait: a cut that costs no less than so much of it is not worth its operations."""

LATER = 2
"""What a value costs that is computed after the walk, for all rows: so many times reading it from far away."""


class HandedOn(NamedTuple):
    """What the walk back hands on: values by row, and sums over rows, steps and blocks."""

    sent: list[Node]
    summed: list[Node]


def cheapest_to_send(
    core: Collection[Node],
    deferred: Collection[Node],
    ends: Collection[Node],
    linear: Callable[[Node], bool],
    order: Callable[[Node], int],
) -> HandedOn | None:
    """What the walk back hands on, by a minimum cut; None where what is used after it is as good.

    core: what the walk computes anyway, adjoints among it. deferred: what can wait. ends: gradients that are asked
    for. A value that can wait is computed in the walk, where it lies near, if that makes what is handed on and what is
    computed after the walk cheaper: it has to be linear, so that sums over blocks are the same.
    """
    movable, sums = set[Node](), set[Node]()
    for n in sorted(deferred, key=order):
        if linear(n) and all(i in movable for i in n.all_input_nodes if i in deferred):
            if _by_row(n):
                movable.add(n)
            elif _sums_rows(n):
                sums.add(n)
    used = {n for n in core if n in ends or any(u in deferred for u in n.users)}
    if not used or any(row_dim(n) != 0 for n in used):
        return None
    import networkx  # loaded where a step is split only

    region, flow = movable | sums | used, networkx.DiGraph()
    for n in region:
        size = 1 if n in sums else _row_bytes(n)
        flow.add_edge((n, 0), (n, 1), capacity=size)
        if n in used:
            flow.add_edge("source", (n, 0))
        else:
            if not _is_view(n):
                flow.add_edge("source", (n, 0), capacity=LATER * size)
            for i in filter(region.__contains__, n.all_input_nodes):
                flow.add_edge((i, 1), (n, 0))
                flow.add_edge((n, 0), (i, 0))  # what the walk computes, it computes from what it has
        if n in ends or any(u in deferred and u not in region for u in n.users):
            flow.add_edge((n, 1), "sink")
    if "sink" not in flow:
        return None
    try:
        cost, (first, _) = networkx.minimum_cut(flow, "source", "sink")
    except networkx.NetworkXUnbounded:
        return None
    waiting = sum(_row_bytes(n) for n in movable if not _is_view(n))
    if cost > LEAST_GAIN * (sum(map(_row_bytes, used)) + LATER * waiting):
        return None
    cut = sorted((n for n in region if (n, 0) in first and (n, 1) not in first), key=order)
    return HandedOn([n for n in cut if n not in sums], [n for n in cut if n in sums])


def _is_view(n: Node) -> bool:
    return n.target in VIEWS and n.target is not aten.cat.default


def _sums_rows(n: Node) -> bool:
    return n.target is aten.sum.dim_IntList and row_dim(n) is None and row_dim(n.args[0]) == 0


def _by_row(n: Node) -> bool:
    """Whether a value can be computed in the walk, for each row by itself and without shared weights."""
    if n.meta.get("mixed") or row_dim(n) != 0:
        return False
    if n.target is aten.bmm.default:
        return all(row_dim(i) == 0 for i in n.all_input_nodes)
    return n.target in ELEMENTWISE | VIEWS or n.target is aten.sum.dim_IntList


def _row_bytes(n: Node) -> int:
    return max(1, math.prod(s for s, _ in n.meta["dims"])) * cast("int", n.meta["dtype"].itemsize)


def by_lane(node: Node, later: Callable[[Node], bool]) -> tuple[tuple[Node, Node], ...]:
    """The factors of the products that a gradient by row is the sum of: none where it is no such sum.

    Summed over steps, as that of a captured tensor with a row for each lane, it is one product for each lane. later:
    whether a value is computed after the walk.
    """
    if not later(node):
        return ()
    if node.target is aten.add.Tensor and all(isinstance(a, Node) for a in node.args):
        terms = [by_lane(a, later) for a in cast("Any", node.args)]
        return tuple(pair for term in terms for pair in term) if all(terms) else ()
    if node.target is not aten.bmm.default:
        return ()
    left, right = cast("Any", node.args)
    alike = all(row_dim(n) == 0 and n.meta["dims"][0][0] == 1 for n in (node, left, right))
    return ((left, right),) if alike else ()
