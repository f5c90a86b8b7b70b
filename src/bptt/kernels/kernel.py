"""What a kernel is.

A kernel computes the walks: stage 1 forward through time and stage 3 back through it. The products over all steps
(input projection, parameter gradients) are the engine's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..cells import Cell, Weights
from .frames import Frames

__all__ = ["Kernel", "Request", "Swept", "Tape", "Walked", "Wanted"]


class Request(NamedTuple):
    """What a kernel is asked to run on."""

    cell: Cell
    device: torch.device
    dtype: torch.dtype


@dataclass(eq=False)
class Tape:
    """What stage 1 kept of one layer and direction, in that direction's own time. States are (h,) or (h, c)."""

    states: tuple[Tensor, ...]  # h [T+1, B, P], c [T+1, B, H]: the initial state, then the state after each step
    resets: Tensor | None  # bool [T, B, 1], where the state was replaced before the step; None is nowhere
    gates: Tensor | None  # [T, B, F]; None for a cell whose state is its tape
    reset_state: tuple[Tensor, ...] = ()  # by what: h [B, P] or [T, B, P], c [B, H] or [T, B, H]; () is by zero

    @property
    def state(self) -> tuple[Tensor, ...]:
        """The states after each step: h `[T, B, P]`, c `[T, B, H]`."""
        return tuple(s[1:] for s in self.states)

    @cached_property
    def prev(self) -> tuple[Tensor, ...]:
        """The states before each step, resets applied: h `[T, B, P]`, c `[T, B, H]`."""
        resets = self.resets
        if resets is not None and self.reset_state:
            return tuple(torch.where(resets, r, s[:-1]) for r, s in zip(self.reset_state, self.states, strict=True))
        return tuple(s[:-1] if resets is None else s[:-1].masked_fill(resets, 0) for s in self.states)


class Swept(NamedTuple):
    """What one sweep brings back, by position and column."""

    da: Tensor  # [R, N, G*H] dL/d(pre-activation)
    adjoint: Tensor | None  # [R, N, P] lambda of h, where asked for
    initial: tuple[Tensor, ...]  # h [N, P], c [N, H]: what leaves position 0 for the state before it, where asked for
    adjoint_c: Tensor | None = None  # [R, N, H] lambda of c, for a state (h, c), where asked for


class Wanted(NamedTuple):
    """What is asked of a walk: da always; a bias or a product over all steps only where the kernel does them anyway."""

    adjoint: bool  # lambda of h
    initial: bool  # the gradient of the initial state
    bias: bool = False  # those of the biases
    weights: bool = False  # those of w.ih and w.hh
    x: bool = False  # that of x
    adjoint_c: bool = False  # lambda of c


class Walked(NamedTuple):
    """What the sweeps of all columns bring back, summed over columns at every step and lane."""

    da: Tensor  # [T, B, G*H] dL/d(pre-activation)
    adjoint: Tensor | None  # [T, B, P] lambda of h, where asked for
    initial: tuple[Tensor, ...]  # dL/d(initial state): h [B, P], c [B, H], where asked for
    bias: Tensor | None = None  # [2, G*H] the gradients of b_ih and b_hh, where the kernel has them
    ih: Tensor | None = None  # [G*H, I], [G*H, P] the gradients of w.ih and w.hh, where the kernel has them
    hh: Tensor | None = None
    dx: Tensor | None = None  # [T, B, I], where the kernel has it
    leaving: tuple[Tensor, ...] = ()  # h [N, P], c [N, H] what leaves each column at its first step, with `initial`
    inner: Tensor | None = None  # [T, B, H] da of `Cell.inner` as W_hh h sees it, (4.10), where the kernel has it
    adjoint_c: Tensor | None = None  # [T, B, H] lambda of c, for a state (h, c), where asked for

    def plus(self, other: Walked) -> Walked:
        """The sums over the columns of both."""
        adjoint = None if self.adjoint is None or other.adjoint is None else self.adjoint + other.adjoint
        adjoint_c = None if self.adjoint_c is None or other.adjoint_c is None else self.adjoint_c + other.adjoint_c
        initial = tuple(a + b for a, b in zip(self.initial, other.initial, strict=True))
        return Walked(self.da + other.da, adjoint, initial, adjoint_c=adjoint_c)


class Kernel(Protocol):
    """Computes the walks for the cells, devices and dtypes it supports. Outputs are fresh tensors."""

    name: str
    variant: str | None  # the instruction set it was compiled for, if it was

    def __hash__(self) -> int: ...

    def refuses(self, request: Request) -> str | None:
        """Why this kernel cannot take the request, or None."""
        ...

    def forward(
        self,
        cell: Cell,
        x: Tensor,
        initial: tuple[Tensor, ...],
        resets: Tensor | None,
        w: Weights,
        tape_gates: bool,
        lengths: Tensor | None,
        reset_state: tuple[Tensor, ...] = (),
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """The states of `Tape`, h `[T+1, B, P]` (and c `[T+1, B, H]`), and the gates `[T, B, F]` if tape_gates.

        x: `[T, B, I]`. initial: h `[B, P]`, c `[B, H]`. resets: bool `[T, B, 1]`, where the state is replaced
        before the step, by reset_state as in `Tape`; None is nowhere. lengths: `[B]` on the CPU, where lanes end
        before T; what is returned for steps after the end is any finite number.
        """
        ...

    def infer(self, cell: Cell, x: Tensor, hx: tuple[Tensor, ...], w: Weights) -> tuple[Tensor, ...] | None:
        """y `[T, B, P]` and the final state, h `[1, B, P]` (and c `[1, B, H]`), of one layer without resets or lengths.

        x: `[T, B, I]`. hx: the initial state, shaped like the final one. Nothing is kept: for a call that is not
        differentiated, in which a step may take less time than its bookkeeping. None: `forward` is the only way.
        """
        ...

    def walk(
        self,
        cell: Cell,
        x: Tensor,
        w: Weights,
        tape: Tape,
        frames: Frames,
        error: Tensor | None,
        final: tuple[Tensor | None, ...],
        edges: Tensor | None,
        wanted: Wanted,
    ) -> Walked:
        """The block sweep of one layer and direction over all columns of `frames`, summed by step and lane.

        x: `[T, B, I]`, the layer's input. error: dL/dy `[T, B, P]`, of which each column takes its own losses. final:
        the cotangents of the final state, h `[B, P]` and c `[B, H]`. edges: `[T, B, 1]`, the factor on the adjoint from
        step t to step t-1; None is all 1. Where it is 0 nothing passes, not even a NaN. Zero past the end.
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
        wanted: Wanted,
    ) -> Swept:
        """The same by position and column, for a stack whose blocks overlap.

        errors: of h `[R, N, P]` and of c `[R, N, H]`, None for none; zero where a column has no error.
        """
        ...
