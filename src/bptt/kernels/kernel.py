"""What a kernel is.

A kernel computes the walks: stage 1 forward through time and stage 3 back through it. The products over all steps
(input projection, parameter gradients) are the engine's.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..cells import Cell, Weights
from .frames import Frames

__all__ = ["Kernel", "Request", "Swept", "Tape"]


class Request(NamedTuple):
    """What a kernel is asked to run on."""

    cell: Cell
    device: torch.device
    dtype: torch.dtype


class Tape(NamedTuple):
    """What stage 1 kept of one layer and direction, in that direction's own time. States are (h,) or (h, c)."""

    state: tuple[Tensor, ...]  # h [T, B, P], c [T, B, H]: after each step
    prev: tuple[Tensor, ...]  # the same, before each step, resets applied
    gates: Tensor  # [T, B, F]; F is 0 for a cell whose state is its tape


class Swept(NamedTuple):
    """What one sweep brings back."""

    da: Tensor  # [R, N, G*H] dL/d(pre-activation)
    adjoints: tuple[Tensor, ...]  # h [R, N, P], c [R, N, H]: lambda at every position
    initial: tuple[Tensor, ...]  # h [N, P], c [N, H]: what leaves position 0 for the state before it


class Kernel(Protocol):
    """Computes the walks for the cells, devices and dtypes it supports. Outputs are fresh tensors."""

    name: str

    def refuses(self, request: Request) -> str | None:
        """Why this kernel cannot take the request, or None."""
        ...

    def forward(
        self, cell: Cell, gx: Tensor, initial: tuple[Tensor, ...], resets: Tensor | None, w: Weights, tape_gates: bool
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """States of all steps, h `[T, B, P]` (and c `[T, B, H]`), and the gates `[T, B, F]` if tape_gates, else None.

        gx: `[T, B, G*H]`, the input product. initial: h `[B, P]`, c `[B, H]`. resets: bool `[T, B, 1]`, where the
        state is replaced by zero before the step; None is nowhere.
        """
        ...

    def sweep(
        self,
        cell: Cell,
        w: Weights,
        tape: Tape,
        frames: Frames,
        errors: tuple[Tensor | None, ...],
        edges: Tensor | None,
    ) -> Swept:
        """The block sweep of one layer and direction over the columns of `frames`.

        errors: the local error of h `[R, N, P]` and of c `[R, N, H]`, None for none; zero where a column has no error.
        edges: `[T, B, 1]`, the factor on the adjoint from step t to step t-1; None is all 1. Where it is 0
        nothing passes, not even a NaN.
        """
        ...
