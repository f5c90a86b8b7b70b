"""Whether a traced step treats each row by itself: checked operation by operation, along the dimension of rows."""

from __future__ import annotations

import math
import operator
from typing import Any, cast

import torch
from torch.fx import Graph, Node

from .kinds import ALONG, BATCHED, COMPLEX, ELEMENTWISE, FACTORIES, SUMS
from .parts import Value
from .recorder import NotTraceable

__all__ = ["at_line", "check_rows", "kind_of", "mixes_rows", "row_dim"]

aten = torch.ops.aten


def row_dim(node: Any) -> int | None:
    """The dimension of rows of a value; None: it has none."""
    if not isinstance(node, Node) or "dims" not in node.meta:
        return None
    return next((i for i, (_, rows) in enumerate(node.meta["dims"]) if rows), None)


def mixes_rows(node: Node) -> bool:
    """Whether a value has no rows, and sums over them."""
    return bool(node.meta.get("mixed"))


def check_rows(graph: Graph) -> None:
    """Note of every value whether it sums over rows; raise NotTraceable where rows meet in any other way."""
    for node in graph.nodes:
        if node.op != "call_function" or node.target is operator.mul:
            continue
        if sum(rows for _, rows in node.meta.get("dims", ())) > 1:
            raise _mixing(node)
        node.meta["mixed"] = any(map(mixes_rows, node.all_input_nodes)) or _contracts(node)
        if mixes_rows(node) and row_dim(node) is not None:
            raise _mixing(node)


def _contracts(node: Node) -> bool:
    """Whether an operation sums over rows. Raises NotTraceable where it does anything else across them."""
    target, args = node.target, cast("Any", node.args)
    if target is operator.getitem:
        return False
    if target in FACTORIES:
        if target is not aten.full.default and row_dim(node) is not None:
            raise _mixing(node)
        return False
    given = [n for n in node.all_input_nodes if row_dim(n) is not None]
    if not given:
        if row_dim(node) is not None and target is not aten.expand.default:
            raise _mixing(node)
        return False
    out, along = row_dim(node), row_dim(args[0] if isinstance(args[0], Node) else given[0])
    if target in ELEMENTWISE:
        ranks = [len(n.meta["dims"]) - _index(n) for n in given]
        if out is None or any(rank != len(node.meta["dims"]) - out for rank in ranks):
            raise _mixing(node)
        return False
    if target in SUMS:
        dims = args[1] if isinstance(args[1], (tuple, list)) else [args[1]]
        if along in dims and target is not aten.sum.dim_IntList:
            raise _mixing(node)
        return along in dims
    if target is aten.mm.default:
        first, second = row_dim(args[0]), row_dim(args[1])
        if first == 1 and second == 0:
            return True
        if (first, second) in ((0, None), (None, 1)):
            return False
        raise _mixing(node)
    if target in BATCHED:
        if any(_index(n) >= len(n.meta["dims"]) - 2 for n in given):
            if target is aten.bmm.default and row_dim(args[0]) == 2 and row_dim(args[1]) == 1:
                return True
            raise _mixing(node)
        return False
    if target is aten.view.default:
        if out is None or not _kept(args[0], node):
            raise _mixing(node)
        return False
    if target in COMPLEX | {aten.permute.default, aten.expand.default, aten.unsqueeze.default, aten.squeeze.dims}:
        if out is None:
            raise _mixing(node)
        return False
    if target is aten.cat.default:
        if args[1] == out:
            raise _mixing(node)
        return False
    if target is aten.index_select.default:
        table, dim, index = row_dim(args[0]), args[1], row_dim(args[2])
        if out not in ([table] if index is None else [dim] if table is None else []) or table == dim:
            raise _mixing(node)
        return False
    if target is aten.index_add.default:
        table, dim, index, source = row_dim(args[0]), args[1], row_dim(args[2]), row_dim(args[3])
        if index is None and table == source == out != dim:
            return False
        if index is None or table is not None or source != dim:
            raise _mixing(node)
        return True
    if target in ALONG:
        default: Any = -1 if target is aten.sort.stable else None
        named: Any = args[ALONG[target]] if len(args) > ALONG[target] else node.kwargs.get("dim", default)
        named = named if isinstance(named, (tuple, list)) else [named]
        rank = len(args[0].meta["dims"]) if isinstance(args[0], Node) else 0
        if None in named or any((d + rank if d < 0 else d) == along for d in named):
            raise _mixing(node)
        if any(row_dim(n) != along for n in given):
            raise _mixing(node)
        return False
    if target is aten.convolution.default:
        if row_dim(args[0]) == 0 and len(given) == 1:
            return False
        raise _mixing(node)
    if target is aten.convolution_backward.default:
        if any(row_dim(n) != 0 for n in given) or row_dim(args[2]) is not None:
            raise _mixing(node)
        return bool(args[-1][1])
    raise NotTraceable(
        f"it is not known whether {str(target).removesuffix('.default')} treats rows alike{at_line(node)}"
    )


def _index(node: Node) -> int:
    along = row_dim(node)
    assert along is not None
    return along


def _kept(before: Any, after: Node) -> bool:
    """Whether a view keeps the rows in their order, one after the other."""
    first, second = _index(before), _index(after)
    return math.prod(s for s, _ in before.meta["dims"][:first]) == math.prod(s for s, _ in after.meta["dims"][:second])


def _mixing(node: Node) -> NotTraceable:
    return NotTraceable(f"its rows depend on one another: {str(node.target).removesuffix('.default')}{at_line(node)}")


def at_line(node: Node) -> str:
    """Where in the user's code an operation stands, to end a sentence with."""
    line = node.meta.get("line")
    return "" if line is None else f" at {line}"


def kind_of(node: Node) -> Value:
    """The kind of a value, from its dimensions."""
    dims = node.meta["dims"]
    along = [i for i, (_, rows) in enumerate(dims) if rows]
    if not along:
        return Value(0, tuple(s for s, _ in dims), node.meta["dtype"])
    if along == [0]:
        return Value(dims[0][0], tuple(s for s, _ in dims[1:]), node.meta["dtype"])
    return Value(-1, tuple(s for s, _ in dims), node.meta["dtype"])
