"""The leaves of the graph that autograd has of a value."""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ["leaves_of"]


def leaves_of(value: Tensor) -> tuple[Tensor, ...]:
    """The leaves of a graph that require a gradient, in the order of a walk through it."""
    if value.grad_fn is None:
        return (value,) if value.requires_grad else ()
    seen: set[Any] = set()
    waiting: list[Any] = [value.grad_fn]
    leaves: list[Tensor] = []
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "AccumulateGrad":
            leaves.append(node.variable)
        waiting += [before for before, _ in reversed(node.next_functions)]
    return tuple(leaves)
