"""Convolutions taken apart by channels, so that less of them has to wait for the carry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, cast

import torch
from torch.fx import Graph, Node

__all__ = ["by_channels", "narrowed_channels"]

aten = torch.ops.aten


def narrowed_channels(graph: Graph, node: Node) -> None:
    """Of a convolution without a bias, only the channels that a slice takes."""
    convolution, dim, start, end, step = cast("Any", node.args)
    if not _is_plain(convolution) or dim != 1 or step != 1 or convolution.args[2] is not None:
        return
    if any(user.target is not aten.slice.Tensor for user in convolution.users):
        return
    x, weight, *others = convolution.args
    with graph.inserting_before(node):
        part = _sliced(graph, weight, 1 if convolution.args[6] else 0, start, end)
        made = graph.call_function(aten.convolution.default, (x, part, *others))
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    graph.erase_node(node)


def by_channels(graph: Graph, node: Node, waits: Callable[[Node], bool]) -> None:
    """A convolution of images of which some channels wait and others do not, as a sum of convolutions."""
    x, weight, bias, *others = cast("Any", node.args)
    if not _is_plain(node) or x.target is not aten.cat.default or x.args[1] != 1 or others[3]:
        return
    groups = [(late, list(own)) for late, own in groupby(x.args[0], waits)]
    if len(groups) < 2:
        return
    total: Node | None = None
    start = 0
    with graph.inserting_before(node):
        for late, own in groups:
            channels = sum(piece.meta["dims"][1][0] for piece in own)
            image = own[0]
            if len(own) > 1:
                image = graph.call_function(aten.cat.default, (own, 1))
                image.meta = x.meta | {"dims": (*x.meta["dims"][:1], (channels, False), *x.meta["dims"][2:])}
            part = _sliced(graph, weight, 1, start, start + channels)
            made = graph.call_function(aten.convolution.default, (image, part, None if late else bias, *others))
            made.meta = dict(node.meta)
            start, bias = start + channels, bias if late else None
            if total is not None:
                made = graph.call_function(aten.add.Tensor, (total, made))
                made.meta = dict(node.meta)
            total = made
    assert total is not None
    node.replace_all_uses_with(total)
    graph.erase_node(node)


def _is_plain(node: Any) -> bool:
    """Whether a node is a convolution in one group whose weights are the same for all rows."""
    if not isinstance(node, Node) or node.target is not aten.convolution.default or node.args[8] != 1:
        return False
    return not any(rows for _, rows in cast("Node", node.args[1]).meta["dims"])


def _sliced(graph: Graph, weight: Node, dim: int, start: int, end: int) -> Node:
    dims: Sequence[tuple[int, bool]] = weight.meta["dims"]
    made = graph.call_function(aten.slice.Tensor, (weight, dim, start, end, 1))
    made.meta = weight.meta | {"dims": (*dims[:dim], (end - start, False), *dims[dim + 1 :])}
    return made
