"""Truths on which a step's Python code may branch: `torch.all` or `any` of them."""

from __future__ import annotations

import torch
from torch.fx import Node

__all__ = ["truths"]

aten = torch.ops.aten

_KINDS = {aten.all.default: "all", aten.any.default: "any", aten._is_all_true.default: "all",
          aten._is_any_true.default: "any"}  # fmt: skip


def truths(node: Node) -> tuple[Node, str, bool] | None:
    """(the truths, "all" or "any", whether whole numbers of the carry alone decide them) of which a node says whether
    they hold.
    """
    (given, *_), todo, of_carry = node.args or (None,), [node], False
    if node.target not in _KINDS or not isinstance(given, Node):
        return None
    while todo:
        one = todo.pop()
        if one.op == "placeholder":
            _, dtype = one.meta["tensor"]
            if not one.name.startswith("carry_") or dtype.is_floating_point or dtype.is_complex:
                return given, _KINDS[node.target], False
            of_carry = True
        todo += one.all_input_nodes
    return given, _KINDS[node.target], of_carry
