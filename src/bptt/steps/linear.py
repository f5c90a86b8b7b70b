"""Whether operations are linear in adjoints: those of several blocks, steps and rows add up before them as after."""

from __future__ import annotations

import operator
from collections.abc import Container
from typing import Any

import torch
from torch.fx import Node

from .kinds import VIEWS

__all__ = ["linear"]

aten = torch.ops.aten

_LINEAR = {aten.add.Tensor, aten.sub.Tensor, aten.neg.default, aten.sum.dim_IntList, aten._to_copy.default,
           aten.cumsum.default, aten.flip.default, aten.roll.default, aten.slice_scatter.default,
           aten.view_as_real.default, aten.view_as_complex.default, aten._conj.default, aten.complex.default,
           aten._fft_r2c.default, aten._fft_c2r.default, aten._fft_c2c.default, operator.getitem} | VIEWS  # fmt: skip
"""Operations that are linear in all of their arguments together."""

_LINEAR_IN_ONE = {aten.mul.Tensor, aten.mm.default, aten.bmm.default}

_LINEAR_IN_FIRST = {aten.div.Tensor, aten.tanh_backward.default, aten.sigmoid_backward.default, aten.mul.Scalar,
                    aten.div.Scalar, aten.gather.default, aten.convolution_backward.default,
                    aten.convolution.default, aten.index_select.default, aten.tril.default,
                    aten.triu.default}  # fmt: skip

_ADDED_TO_ZEROS = {aten.index_add.default, aten.scatter_add.default}  # linear in what they add to zeros


def linear(n: Node, dual: Container[Node]) -> bool:
    """Whether an operation is linear in what of its arguments depends on adjoints. dual: all nodes that do."""
    if n.op == "placeholder" or n.target in _LINEAR:
        return True
    places = [i for i, a in enumerate(n.args) if isinstance(a, Node) and a in dual]
    if n.target in _LINEAR_IN_ONE:
        return len(places) == 1
    if n.target in _ADDED_TO_ZEROS:
        return places == [3] and _zero(n.args[0])
    if n.target in (aten._linalg_solve_ex.default, aten.linalg_solve_triangular.default):
        return places == [1]
    if n.target is aten.linalg_matrix_exp.default:
        return _exponential_of_pair(n.args[0], dual)
    if n.target is aten.where.self:
        return 0 not in places and all(a in dual or _zero(a) for a in n.args[1:])
    return n.target in _LINEAR_IN_FIRST and places == [0]


def _exponential_of_pair(n: Any, dual: Container[Node]) -> bool:
    """Whether a matrix is (A, G; 0, A) with an A that is known: of its exponential the one block that G enters,
    which is the derivative of exp(A) in the direction of G, is linear in it (Al-Mohy and Higham 2009, theorem 3.1).
    """
    rows = n.args[0] if n.target is aten.cat.default else ()
    if len(rows) != 2 or any(i.target is not aten.cat.default or len(i.args[0]) != 2 for i in rows):
        return False
    (a, g), (zero, b) = (i.args[0] for i in rows)
    return a is b and g in dual and a not in dual and zero not in dual


def _zero(node: object) -> bool:
    return isinstance(node, Node) and node.target is aten.full.default and bool(node.args[1] == 0)
