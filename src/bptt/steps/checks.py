"""What a step's Python code checks of its values, as of a distribution's parameters: NaN in a result where it fails."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch.fx import Graph, Node

from .recorder import NotTraceable

__all__ = ["nan_where_failed"]

aten = torch.ops.aten


def nan_where_failed(graph: Graph, checks: Sequence[tuple[Node, bool]], R: int, ys: list[Node | None]) -> None:
    """Put NaN in a y, in rows for which a check fails: `scan` then runs the step itself, which acts on it.

    In a y, of which a call gives those of all steps: what is in a carry may be lost with the next one.

    checks: truths, and which value all of them have to have. ys: one of them changes.
    """
    if not checks:
        return
    holds = [_by_row(graph, truths, value, R) for truths, value in checks]
    valid = reduce(
        lambda a, b: _made(graph, aten.logical_and.default, max(_shape(a), _shape(b)), torch.bool, a, b), holds
    )
    for i, node in reversed(list(enumerate(ys))):
        if node is None or not node.meta["tensor"][1].is_floating_point:
            continue
        (shape, dtype), here = node.meta["tensor"], valid
        if _shape(valid):
            sizes = [R, *[1] * (len(shape) - 1)]
            here = _made(graph, aten.view.default, sizes, torch.bool, valid, sizes)
        nan = _made(graph, aten.full.default, [], dtype, [], math.nan, dtype=dtype, device=node.meta.get("device"))
        ys[i] = _made(graph, aten.where.self, shape, dtype, here, node, nan)
        return
    raise NotTraceable("its code checks values, or solves linear systems, and no y is a floating point number")


def _by_row(graph: Graph, truths: Node, value: bool, R: int) -> Node:
    """Whether truths all have a value: of each row `[R]`, or `[]` where they have no rows."""
    shape, made = _shape(truths), truths
    if truths.meta["tensor"][1] != torch.bool:
        made = _made(graph, aten.ne.Scalar, shape, torch.bool, made, 0)
    if not value:
        made = _made(graph, aten.logical_not.default, shape, torch.bool, made)
    if shape and shape[0] > R and shape[0] % R == 0:
        shape = (R, shape[0] // R, *shape[1:])
        made = _made(graph, aten.view.default, shape, torch.bool, made, list(shape))
    rows = shape[:1] == (R,)
    if any(s % R == 0 and s for s in shape[rows:]):
        raise NotTraceable("its Python code reads a value of a tensor whose rows do not come first")
    dims = list(range(rows, len(shape)))
    return made if not dims else _made(graph, aten.all.dims, shape[:rows], torch.bool, made, dims)


def _shape(node: Node) -> tuple[int, ...]:
    return tuple(node.meta["tensor"][0])


def _made(graph: Graph, target: Any, shape: Sequence[int], kind: torch.dtype, *args: Any, **kwargs: Any) -> Node:
    node = graph.call_function(target, args, kwargs)
    node.meta |= {"tensor": (torch.Size(shape), kind), "line": None}
    return node
