"""Truths on which a step's Python code may branch: `torch.all` or `any` of what whole numbers of the carry decide."""

from __future__ import annotations

import torch
from torch.fx import Node

__all__ = ["truths"]

aten = torch.ops.aten

_KINDS = {aten.all.default: "all", aten.any.default: "any"}


def truths(node: Node) -> tuple[Node, str] | None:
    """(the truths, "all" or "any") of which a node says whether they hold, of the carry's whole numbers alone."""
    (given, *_), todo = node.args or (None,), [node]
    if node.target not in _KINDS or not isinstance(given, Node):
        return None
    while todo:
        one = todo.pop()
        if one.op == "placeholder":
            _, dtype = one.meta["tensor"]
            if not one.name.startswith("carry_") or dtype.is_floating_point or dtype.is_complex:
                return None
        todo += one.all_input_nodes
    return given, _KINDS[node.target]
