"""A scan over a sequence that is never in memory as a whole: what is common to `stream_scan` and to a layer of cells.

Legend: T steps; a, b: the first of some steps, and the one after the last; n = b - a.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from .. import policies
from ..engine import refuse_tangents
from ..memory import Checkpoints
from ..scan.arguments import Arguments
from ..scan.pytrees import Step, differentiable, split
from ._pieces import STEPS, Sliceable, as_tensor, on_disk, steps_of
from ._plan_scan import bytes_of_step
from ._segmented_scan import SegmentedScan, StepsOfRun
from ._stream_loss import StreamLoss

__all__ = ["ScanStream", "zeros_for_none"]


class ScanStream(ABC):
    """A scan over xs that are read in segments, or in chunks, with the gradients that it has found so far.

    memory, kernel, resets: as `stream_scan` takes them. first: the step of the whole with which the present chunk
    begins. sent: the gradients of the tensors of the first carry. restarts: states that resets restart from, as the
    tensors of a carry, or `[T, ...]`; their gradients: `of_restarts`.
    """

    step: Step
    carry: Any

    def __init__(self, loss: StreamLoss, memory: Checkpoints, kernel: str, resets: Sliceable | Tensor | None) -> None:
        self.loss, self.memory, self.kernel, self.resets = loss, memory, kernel, resets
        self.first = 0
        self.final: Any = None
        self.sent: list[Tensor | None] = []
        self.leaves: Sequence[Any] = ()  # of the xs that are read at present
        self.sizes: list[tuple[int, ...]] | None = None
        self.restarts: list[Tensor] = []
        self.of_restarts: list[Tensor] = []
        self.each: list[bool] = []
        self.restarted: Callable[[Sequence[Tensor]], Any] = list

    @abstractmethod
    def begin(self, first: list[Tensor], T: int) -> None:
        """Prepare for T steps. first: the leaves of the first one, `[1, ...]`."""

    @abstractmethod
    def joined(self, leaves: list[Tensor], a: int, b: int) -> Any:
        """The xs of some steps of the present chunk, from their leaves `[n, ...]`."""

    def as_computed(self, piece: Any) -> Tensor:
        """A part of xs as a tensor on the device of the computation."""
        found = as_tensor(piece)
        refuse_tangents("stream_scan", (found,))
        return found

    def restart_from(self, state: Any, carry: Any) -> None:
        """Note the states of resets, in the structure of a carry."""
        tensors, form = split(carry)
        states, of_states = split(state, form)
        if of_states.spec != form.spec or len(states) != len(tensors):
            raise ValueError(f"reset_state must have the carry's structure: expected {form.spec}, got {of_states.spec}")
        self.restarts = [s.detach() for s in states]
        self.of_restarts = [torch.zeros_like(s) for s in self.restarts]
        self.each = [s.dim() > c.dim() for s, c in zip(states, tensors, strict=True)]
        self.restarted = of_states.join

    def in_segments(self, leaves: Sequence[Any], T: int, policy: policies.Policy) -> None:
        """Two passes or more over leaves with slices: all segments forward, then all back."""
        self._run(leaves, T, policy)
        self._check_ends(T)

    def in_pieces(self, chunks: Callable[[int], Iterable[list[Tensor]]], policy: policies.Policy) -> None:
        """What comes in pieces: one pass under `Chunked`; else they are written to disk first. chunks: of k steps."""
        if isinstance(policy, policies.Chunked):
            self.in_chunks(chunks(policy.k), policy.k)
            return
        with ExitStack() as stack:
            leaves = on_disk(stack, chunks(STEPS))
            if not leaves:
                raise ValueError("x must have at least 1 step: got 0")
            self.in_segments(leaves, len(leaves[0]), policy)

    def in_chunks(self, chunks: Iterable[list[Tensor]], k: int) -> None:
        """One pass: each chunk of k steps goes forward and back before the next one is read."""
        if self.memory == Checkpoints():
            self.memory = Checkpoints(steps=k)  # a chunk of x is there as a whole
        of_first: list[Tensor | None] = []
        for chunk in chunks:
            T = len(chunk[0])
            self._run(chunk, T, policies.Full())
            if self.first == 0:
                of_first = self.sent
            self.first, self.carry = self.first + T, self.final
        if self.first == 0:
            raise ValueError("x must have at least 1 step: got 0")
        self.sent = of_first
        self._check_ends(self.first)

    def _run(self, leaves: Sequence[Any], T: int, policy: policies.Policy) -> None:
        """The final carry and all gradients of T steps."""
        self.leaves = leaves
        first = self._read(0, 1)
        self.begin(first, T)
        # The sizes of the whole, in the memory of a step.
        xs = self.joined([x.expand(T, *x.shape[1:]) for x in first], 0, T)
        given = Arguments.of(self.step, self.carry, xs, T)
        reach = policy.reach(T).within(T)
        factors = policy.draw(T, given.lanes) if policy.draws_factors else None
        sizes = bytes_of_step(given, self.kernel) if self.memory.steps is None else (1, 1)
        scan = SegmentedScan(
            self.step, self._given, self.loss, given.devices, self.kernel, self._restarting, self.first
        )
        self.final, self.sent = scan.gradients(self.carry, T, reach, factors, self.memory, sizes)

    def _given(self, a: int, b: int) -> StepsOfRun:
        resets = self._resets(a, b)
        if not self.restarts:
            return StepsOfRun(self.joined(self._read(a, b), a, b), resets, None)
        steps = slice(self.first + a, self.first + b)
        own = [s[steps] if each else s for s, each in zip(self.restarts, self.each, strict=True)]
        return StepsOfRun(self.joined(self._read(a, b), a, b), resets, self.restarted(own))

    def _restarting(self, s: int, grads: Sequence[Tensor | None]) -> None:
        for whole, each, grad in zip(self.of_restarts, self.each, grads, strict=False):
            if grad is not None:
                (whole[self.first + s : self.first + s + len(grad)] if each else whole).add_(grad)

    def _read(self, a: int, b: int) -> list[Tensor]:
        """The leaves of the steps a to b-1."""
        found = [self.as_computed(steps_of("x", leaf, a, b)) for leaf in self.leaves]
        sizes = [tuple(x.shape[1:]) for x in found]
        self.sizes = self.sizes or sizes
        for x, size in zip(found, self.sizes, strict=True):
            if tuple(x.shape) != (b - a, *size):
                raise ValueError(f"x[{a}:{b}] must be {[b - a, *size]}: got {list(x.shape)}")
        return found

    def _resets(self, a: int, b: int) -> Tensor | None:
        """The resets of the steps a to b-1 of the present chunk."""
        if self.resets is None:
            return None
        a, b = self.first + a, self.first + b
        found = steps_of("resets", self.resets, a, b)
        if found.dtype != torch.bool:
            raise TypeError(f"resets must be bool [T, B]: got {found.dtype}")
        if len(found) != b - a:
            raise ValueError(f"resets must be [T, B] with x's steps: got {len(found)} of the steps {a} to {b - 1}")
        device = next((t.device for t in tree_flatten(self.carry)[0] if isinstance(t, Tensor)), found.device)
        return found.to(device)

    def _check_ends(self, T: int) -> None:
        """Raise ValueError where resets, or the states that they restart from, do not end with x."""
        if self.resets is not None and hasattr(self.resets, "__len__") and len(self.resets) != T:
            raise ValueError(f"resets must be [T, B] with x's {T} steps: got {len(self.resets)}")
        for state, each in zip(self.restarts, self.each, strict=True):
            if each and len(state) != T:
                raise ValueError(
                    f"reset_state must have the carry's shapes, or x's {T} steps of them: got {len(state)}"
                )


def zeros_for_none(tensors: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients in which nothing but what can have none is None."""
    pairs = zip(tensors, grads, strict=True)
    return [torch.zeros_like(t) if g is None and differentiable(t) else g for t, g in pairs]
