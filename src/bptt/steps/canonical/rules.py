"""The rules of the canonical set by operation, and what they are written with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["RULES", "cast", "dim_of", "full", "rule", "times"]

aten = torch.ops.aten

Rule = Callable[..., Any]

RULES: dict[Any, Rule] = {}
"""The rule of an operation; it may answer NotImplemented, and the operation is recorded as it is."""


def rule(*operations: Any) -> Callable[[Rule], Rule]:
    """A decorator that makes a function the rule of operations."""

    def register(function: Rule) -> Rule:
        for operation in operations:
            RULES[operation] = function
        return function

    return register


def dim_of(dim: int, of: Tensor, more: int = 0) -> int:
    """A dimension of a tensor (or of one with more dimensions) counted from the first one."""
    return dim + of.dim() + more if dim < 0 else dim


def times(a: Tensor, b: Any) -> Tensor:
    """A product; none where b is the number 1."""
    return a if not isinstance(b, Tensor) and b == 1 else aten.mul.Tensor(a, b)


def cast(a: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor in another dtype, if one is asked for."""
    return a if dtype is None or a.dtype == dtype else aten._to_copy.default(a, dtype=dtype)


def full(like: Tensor, shape: Sequence[int], value: Any, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor with the same value everywhere, of another tensor's device, and its dtype if no other is asked for."""
    return aten.full.default(list(shape), value, dtype=dtype or like.dtype, device=like.device)
