"""Parts of a traced step in one: a core with what it takes that is made of captured tensors alone, or some in a row."""

from __future__ import annotations

from collections.abc import Container, Sequence
from math import prod
from typing import Any

import torch
from torch.fx import Graph, Node

from ..steps import Part, SplitStep
from .graph_values import packet

__all__ = ["in_one", "with_constants"]

aten = torch.ops.aten

VIEWS = {aten.view, aten.permute, aten.expand, aten.slice, aten.select, aten.squeeze, aten.unsqueeze}


MOST_VALUES = 1024
"""Of a value without rows that a program computes itself, once a call, with all its threads waiting for it."""


def with_constants(step: SplitStep, core: Part, computes: Container[Any] = ()) -> Part:
    """A core that takes captured tensors where it took views of them, as the transpose of a weight.

    A program's operands have strides, so that views cost nothing there; outside they would have to be made in each
    call, and copied to be dense. computes: operations that it does itself too, where they give few values: in less time
    than they would take to be called.
    """
    graph, made, inputs = Graph(), dict[str, Node](), list[str]()
    last = rows = graph.placeholder("R")

    def inside(node: Node, known: dict[Node, Node]) -> bool:
        few = node.name in step.values and prod(step.values[node.name].shape) <= MOST_VALUES
        return _is_view(node, known) or (
            few and packet(node) in computes and all(n in known for n in node.all_input_nodes)
        )

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
            elif node.op == "placeholder" or (part is step.constants and not inside(node, own)):
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


def in_one(parts: Sequence[Part], outputs: Sequence[str]) -> Part:
    """Parts that are computed one after the other as one, as far as these of their outputs need it."""
    graph, made = Graph(), dict[str, Node]()
    rows = graph.placeholder("R")
    computed = {name for part in parts for name in part.outputs if name not in part.inputs}
    for part in parts:
        for node in list(part.graph.nodes)[1:]:
            if node.op == "placeholder" and node.name not in computed and node.name not in made:
                made[node.name] = graph.placeholder(node.name)
                made[node.name].meta = dict(node.meta)
    for part in parts:
        own: dict[Node, Node] = {}
        for node in part.graph.nodes:
            if node.op == "output":
                made |= {name: own[n] for name, n in zip(part.outputs, node.args[0], strict=True)}
            elif node.op == "placeholder":
                own[node] = made[node.name] if own else rows
            elif node.name in made:
                own[node] = made[node.name]
            else:
                own[node] = made[node.name] = copied = graph.node_copy(node, own.__getitem__)
                copied.name = node.name
    graph.output(tuple(made[name] for name in outputs))
    graph.eliminate_dead_code()
    inputs = []
    for node in list(graph.nodes)[1:]:
        if node.op != "placeholder":
            break
        if node.users:
            inputs.append(node.name)
        else:
            graph.erase_node(node)
    return Part(graph, tuple(inputs), tuple(outputs))
