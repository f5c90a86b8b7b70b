"""A core of a traced step together with what it takes that is made of captured tensors alone."""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from ..steps import Part, SplitStep
from .graph_values import packet

__all__ = ["with_constants"]

aten = torch.ops.aten

VIEWS = {aten.view, aten.permute, aten.expand, aten.slice, aten.select, aten.squeeze, aten.unsqueeze}


def with_constants(step: SplitStep, core: Part) -> Part:
    """A core that takes captured tensors where it took views of them, as the transpose of a weight.

    A program's operands have strides, so that views cost nothing there; outside they would have to be made in each
    call, and copied to be dense.
    """
    graph, made, inputs = Graph(), dict[str, Node](), list[str]()
    last = rows = graph.placeholder("R")
    outputs: tuple[Node, ...] = ()
    for part in (step.constants, core):
        own: dict[Node, Node] = {}
        for node in part.graph.nodes:
            if node.op == "output":
                outputs = tuple(own[n] for n in node.args[0])
            elif node.op == "placeholder" and not own:
                own[node] = rows
            elif node.name in made:
                own[node] = made[node.name]
            elif node.op == "placeholder" or (part is step.constants and not _is_view(node, own)):
                if node.op != "placeholder" and node.name not in part.outputs:
                    continue  # nobody computes it by itself: views of it are taken as they are given
                with graph.inserting_after(last):
                    last = own[node] = made[node.name] = graph.placeholder(node.name)
                last.meta = dict(node.meta)
                inputs.append(node.name)
            else:
                own[node] = made[node.name] = copied = graph.node_copy(node, own.__getitem__)
                copied.name = node.name
    graph.output(outputs)
    return Part(graph, tuple(inputs), core.outputs)


def _is_view(node: Node, known: dict[Node, Node]) -> bool:
    """Whether it is a view of something that the core is given."""
    return packet(node) in VIEWS and all(n in known for n in node.all_input_nodes)
