"""What of a traced step is known before it runs: values of x and captured tensors alone, as a part of their own."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Graph, Node

from .parts import Part
from .recorder import NotTraceable

__all__ = ["known_before"]


def known_before(graph: Graph, outputs: Sequence[Node], of_carry: bool = False) -> Part | None:
    """The part of a graph that computes some values; None where there are none.

    Raises NotTraceable where one depends on the carry, unless of_carry says that it may, or on random numbers.
    """
    if not outputs:
        return None
    inside, todo = set[Node](), list(outputs)
    while todo:
        node = todo.pop()
        if node not in inside:
            inside.add(node)
            todo.extend(node.all_input_nodes)
    rows = next(iter(graph.nodes))
    own, made = Graph(), dict[Node, Node]()
    made[rows] = own.placeholder("R")
    given = [n for n in graph.nodes if n in inside and n.op == "placeholder" and n is not rows]
    for n in given:
        if n.name.startswith("draw_") or (n.name.startswith("carry_") and not of_carry):
            what = "the carry" if n.name.startswith("carry_") else "other random numbers"
            raise NotTraceable(f"it draws random numbers by probabilities that depend on {what}", whatever_rows=True)
        made[n] = own.placeholder(n.name)
        made[n].meta = dict(n.meta)
    for n in graph.nodes:
        if n in inside and n.op == "call_function":
            made[n] = own.node_copy(n, lambda i: made[i])
            made[n].name = n.name
    own.output(tuple(made[n] for n in outputs))
    return Part(own, tuple(n.name for n in given), tuple(n.name for n in outputs))
