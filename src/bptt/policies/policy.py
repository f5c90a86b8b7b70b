"""What a gradient policy is."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from .reach import Reach

__all__ = ["Policy"]


class Policy(ABC):
    """A gradient policy. Immutable; equal policies compare equal; `str(policy)` is its text form, for configurations.

    `torch.load` reads policies with `weights_only=True`.
    """

    @abstractmethod
    def reach(self, T: int) -> Reach:
        """Window and blocks for sequences of at most T steps."""

    def reach_of_any(self) -> Reach | None:
        """What `reach` is within T steps, for every T; None where it depends on T in another way."""
        return None

    @property
    def draws_factors(self) -> bool:
        """Whether `draw` may give factors other than 1."""
        return type(self).draw is not Policy.draw

    def draw(self, T: int, B: int) -> torch.Tensor | None:
        """The factors xi `[T, B]` (float64, CPU) of this call, or None where they are all 1.

        xi[t] multiplies the adjoint on its way from step t to step t-1. xi[0] is 1: the edge from the initial
        state belongs to the caller.
        """
        return None

    @abstractmethod
    def __str__(self) -> str: ...

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)
