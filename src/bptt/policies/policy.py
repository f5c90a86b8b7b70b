"""The interface of a gradient policy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from .reach import Reach

if TYPE_CHECKING:
    import torch

__all__ = ["Policy"]


class Policy(ABC):
    """An immutable gradient policy. Equal policies compare equal; `str(policy)` is the text form, for configurations.

    `torch.load` reads policies with `weights_only=True`.
    """

    @abstractmethod
    def reach(self, T: int) -> Reach:
        """The window and blocks for sequences of at most T steps."""

    def reach_of_any(self) -> Reach | None:
        """The reach whose `within(T)` equals `reach(T)` for every T; None where `reach` depends on T in another way."""
        return None

    @property
    def draws_factors(self) -> bool:
        """Whether `draw` may give factors other than 1."""
        return type(self).draw is not Policy.draw

    def draw(self, T: int, B: int) -> torch.Tensor | None:
        """The edge factors xi `[T, B]` (float64, CPU) of this call, or None where they are all 1.

        xi[t] multiplies the adjoint on its way from step t to step t-1. xi[0] is 1: the edge from the initial
        state belongs to the caller.
        """
        return None

    @abstractmethod
    def __str__(self) -> str: ...

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)
