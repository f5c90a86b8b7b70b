"""Whole passes over one layer in one direction by torch's own layer, where its call is differentiated as a whole."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _walks
from .kernel import Edges, Tensors, WholeRequest
from .torch_layers import CALLS, can_record, keeps_graph

__all__ = ["WholeTorch"]


class WholeTorch:
    """torch's own layer for calls of the same sizes on the CPU: see `WholePasses`. Holds no tensor of a call.

    Its tape is what autograd recorded of the call: the outputs, then the tensors as leaves.
    by_autograd: whether calls are not taped, but `infer` is recorded where it is called.
    """

    own_tape = True
    pulls = True

    def __init__(self, request: WholeRequest, by_autograd: bool = False) -> None:
        self.by_autograd = by_autograd
        cell, self.dtype, T, B, I, H, self.biased, *_ = request
        GH, state, biases = cell.gates_per_unit * H, (1, B, H), 2 * request.biased
        self.mode, self.states = cell.mode, cell.states
        self.shapes = (T, B, I), *(state,) * cell.states, (GH, I), (GH, H), *((GH,),) * biases

    def places(self, tensors: tuple[Tensor, ...]) -> tuple[int, ...] | None:
        if _walks.places(tensors, self.shapes, self.dtype) is None and not self._fit(tensors):
            return None
        return () if self.by_autograd or not torch.is_grad_enabled() or can_record() else None

    def _fit(self, tensors: tuple[Tensor, ...]) -> bool:
        """Whether they are as they should be, contiguous or not."""
        for t, shape in zip(tensors, self.shapes, strict=True):
            if t.shape != shape or t.dtype != self.dtype or not t.is_cpu or t.layout is not torch.strided:
                return False
        return True

    def infer(
        self, tensors: tuple[Tensor, ...], places: tuple[int, ...], edges: Sequence[Edges] = ()
    ) -> tuple[Tensor, ...]:
        outputs = self._call(tensors, train=False)
        if torch.is_grad_enabled():
            return outputs
        # A view made without grad mode may not be written to with it.
        return tuple([output.data if output._is_view() else output for output in outputs])

    def taped(
        self, tensors: tuple[Tensor, ...], places: tuple[int, ...], edges: Sequence[Edges] = ()
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        leaves = tuple([t.detach().requires_grad_(t.requires_grad) for t in tensors])
        with torch.enable_grad():
            roots = self._call(leaves, train=True)
        # What the layer's gradient reads of its outputs is y; the final state has memory of its own.
        return (roots[0].detach().clone(), *(root.data for root in roots[1:])), (*roots, *leaves)

    def _call(self, tensors: tuple[Tensor, ...], train: bool) -> tuple[Tensor, ...]:
        x, weights = tensors[0], tensors[1 + self.states :]
        hx = tensors[1] if self.states == 1 else tensors[1:3]
        return CALLS[self.mode](x, hx, weights, self.biased, 1, 0.0, train, False, False)

    def pulled(
        self,
        tensors: tuple[Tensor, ...],
        tape: tuple[Tensor, ...],
        cotangents: Tensors,
        needs: tuple[bool, ...],
        edges: Sequence[Edges] = (),
    ) -> Tensors | None:
        reached = [(root, c) for root, c in zip(tape, cotangents, strict=False) if c is not None]
        asked = [leaf for leaf, needed in zip(tape[1 + self.states :], needs, strict=True) if needed]
        if not reached or not asked:
            return None
        roots, given = zip(*reached, strict=True)
        found = iter(torch.autograd.grad(roots, asked, given, retain_graph=keeps_graph(), allow_unused=True))
        return tuple([next(found) if needed else None for needed in needs])
