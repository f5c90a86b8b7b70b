"""A step whose carry restarts from a given state where it is reset."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

__all__ = ["restarting"]

Step = Callable[[Any, Any], tuple[Any, Any]]


def restarting(step: Step) -> Step:
    """A step of (carry, (x, mask, state)): where mask `[B]` (or `[]`) is true, its carry is the state.

    The state has the carry's structure, with None in the places of what is not a tensor. It is written here, in a room
    whose code a guard reads, because it calls a step of a user's.
    """

    def restarted(carry: Any, x: tuple[Any, Tensor, Any]) -> tuple[Any, Any]:
        x, mask, state = x
        return step(tree_map(lambda c, s: c if s is None else torch.where(_beside(mask, c), s, c), carry, state), x)

    return restarted


def _beside(mask: Tensor, c: Tensor) -> Tensor:
    return mask.reshape(mask.shape + (1,) * (c.dim() - mask.dim()))
