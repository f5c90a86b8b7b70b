"""The leaves of autograd's graph behind a value."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

__all__ = ["leaves_of"]


def leaves_of(value: Tensor) -> tuple[Tensor, ...]:
    """The leaves of a graph that require a gradient, in the order of a walk through it."""
    return tuple(_leaves(value))


def _leaves(value: Tensor) -> Iterator[Tensor]:
    """The leaves of a graph that require a gradient, in the order of a walk through it."""
    if value.grad_fn is None:
        if value.requires_grad:
            yield value
        return
    seen: set[Any] = set()
    waiting: list[Any] = [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "AccumulateGrad":
            yield node.variable
        waiting += [before for before, _ in reversed(node.next_functions)]
