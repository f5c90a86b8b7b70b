"""Solved linear systems in the canonical set.

torch looks at what the solver says about each matrix and raises where one is singular, or not positive definite. A
recorded step has that among its checks: a result is NaN where one fails, and `scan` runs the step itself.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Graph, Node

from .rules import full, rule

__all__ = ["solved", "solved_again"]

aten = torch.ops.aten


@rule(aten._linalg_check_errors.default)
def _check_errors(info: Tensor, name: str, *, is_matrix: bool) -> Any:
    return (
        None
        if name.removeprefix("torch.") in ("linalg.solve", "linalg.inv", "linalg.cholesky", "cholesky")
        else NotImplemented
    )


@rule(aten.diagonal.default)
def _diagonal(a: Tensor, offset: int = 0, first: int = 0, second: int = 1) -> Any:
    dims, size = (first % a.dim(), second % a.dim()), a.shape[-1]
    if offset or sorted(dims) != [a.dim() - 2, a.dim() - 1] or a.shape[-2] != size:
        return NotImplemented
    flat = aten.view.default(aten.clone.default(a, memory_format=torch.contiguous_format), [*a.shape[:-2], size * size])
    return aten.slice.Tensor(flat, a.dim() - 2, 0, size * size, size + 1)


@rule(aten.diag_embed.default)
def _diag_embed(a: Tensor, offset: int = 0, first: int = -2, second: int = -1) -> Any:
    rank = a.dim() + 1
    if offset or (first % rank, second % rank) != (rank - 2, rank - 1):
        return NotImplemented
    return _embedded(a)


@rule(aten.diagonal_backward.default)
def _diagonal_backward(grad: Tensor, sizes: Sequence[int], offset: int, first: int, second: int) -> Any:
    rank, dims = len(sizes), (first % len(sizes), second % len(sizes))
    if offset or dims != (rank - 2, rank - 1) or sizes[-1] != sizes[-2]:
        return NotImplemented
    return _embedded(grad)


def _embedded(a: Tensor) -> Tensor:
    """Values as the diagonals of matrices: each with a row of zeros after it, which ends before the last row."""
    outer, size = list(a.shape[:-1]), a.shape[-1]
    column = aten.unsqueeze.default(a, a.dim())
    rows = aten.cat.default([column, full(a, [*outer, size, size], 0)], a.dim())
    flat = aten.slice.Tensor(aten.view.default(rows, [*outer, size * (size + 1)]), a.dim() - 1, 0, size * size, 1)
    return aten.view.default(flat, [*outer, size, size])


def solved_again(graph: Graph) -> None:
    """Rewrite a graph in place: solve the adjoint system from the matrix, not from what the solver left of it.

    So neither factors nor pivots, whole numbers, have to be kept for the walk back; small matrices are as soon factored
    anew as read.
    """
    for node in list(graph.nodes):
        if node.target is not aten.linalg_lu_solve.default:
            continue
        factors, pivots, right, *rest = cast("tuple[Any, ...]", node.args)
        left, adjoint = (*rest, *(node.kwargs.get("left", True), node.kwargs.get("adjoint", False))[len(rest) :])
        solver = factors.args[0] if factors.target is operator.getitem else None
        if not left or solver is None or solver.target is not aten._linalg_solve_ex.default:
            continue
        if pivots.target is not operator.getitem or pivots.args[0] is not solver:
            continue
        matrix, line = solver.args[0], node.meta.get("line")
        with graph.inserting_before(node):
            if adjoint:
                shape, dtype = matrix.meta["tensor"]
                turned = graph.call_function(aten.permute.default, (matrix, _last_two_exchanged(range(len(shape)))))
                turned.meta |= {"tensor": (torch.Size(_last_two_exchanged(shape)), dtype), "line": line}
                matrix = turned
            solved = graph.call_function(aten._linalg_solve_ex.default, (matrix, right))
            solved.meta["line"] = line
            result = graph.call_function(operator.getitem, (solved, 0))
            result.meta |= {"tensor": node.meta["tensor"], "line": line}
        node.replace_all_uses_with(result)
        graph.erase_node(node)


def _last_two_exchanged(values: Sequence[int]) -> list[int]:
    return [*values[:-2], values[-1], values[-2]]


def solved(graph: Graph, info: Node) -> tuple[Node, bool]:
    """(truths, the value that all of them have) where a solver has done its work. info: what it says of each matrix.

    Of a solved system its solution tells: it is not finite where a matrix is singular, whoever solves it.
    """
    solver: Any = info.args[0]
    if solver.target is not aten._linalg_solve_ex.default:
        return info, False
    found = next(n for n in solver.users if n.args[1] == 0)
    shape, dtype = found.meta["tensor"]
    size = graph.call_function(aten.abs.default, (found,))
    finite = graph.call_function(aten.lt.Scalar, (size, math.inf))
    for node, kind in ((size, dtype), (finite, torch.bool)):
        node.meta |= {"tensor": (shape, kind), "line": info.meta.get("line")}
    return finite, True
