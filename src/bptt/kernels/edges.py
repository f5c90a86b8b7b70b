"""The adjoint on its way over a time edge."""

from __future__ import annotations

from torch import Tensor

__all__ = ["scaled"]


def scaled(adjoint: Tensor, factor: Tensor) -> Tensor:
    """The adjoint after an edge with this factor, which broadcasts. Nothing crosses one of factor 0, not even a NaN."""
    return (adjoint * factor).masked_fill(factor == 0, 0)
