"""A call of `scan` as one of a single lane, which is all of its batch: for steps that treat no row by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map, tree_map_only

from ..policies import Policy
from .arguments import Arguments
from .pytrees import Step

__all__ = ["as_one_lane", "lanes_differ", "without_lane"]


def lanes_differ(given: Arguments, policy: Policy) -> bool:
    """Whether resets or a policy's edge factors may be other ones for each lane."""
    differ = given.resets is not None and given.resets.shape[1] > 1
    return differ or (policy.draws_factors and given.lanes > 1)


def as_one_lane(given: Arguments) -> Arguments:
    """The same call with carry `[1, ...]` and xs `[T, 1, ...]`, and a step of these."""
    carry, xs = [c[None] for c in given.carry], [x[:, None] for x in given.xs]
    return replace(given, step=_Lane(given.step), carry=carry, xs=xs)


def without_lane(final: Sequence[Tensor], ys: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The results of such a call as those of the call itself."""
    return [c[0] for c in final], [y[:, 0] for y in ys]


@dataclass(frozen=True)
class _Lane:
    """A step as one of carry and x `[1, ...]`."""

    step: Step

    def __call__(self, carry: Any, x: Any) -> tuple[Any, Any]:
        carry, x = tree_map_only(Tensor, lambda t: t[0], (carry, x))
        return tree_map(_lifted, self.step(carry, x))


def _lifted(value: Any) -> Any:
    if isinstance(value, (bool, int, float, complex)):
        value = torch.as_tensor(value, device="cpu")
    return value[None] if isinstance(value, Tensor) else value
