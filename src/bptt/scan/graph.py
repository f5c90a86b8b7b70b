"""The policy as a graph that autograd records: the derivatives of a gradient are derivatives of this graph.

Every time edge is the identity forward and multiplies by the edge's factor backward; 0 is a `detach`. A block that
overlaps others has a copy of its window. So the graph is one chain of steps per block of losses. A chain starts from
the detached carry that enters its first step; at step 0 this is the caller's carry, not detached.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .pytrees import alias, beside, differentiable, reset
from .replay import Visit
from .segments import ScanCall

__all__ = ["Block", "policy_graph", "scaled"]

Block = tuple[int, int, int]
"""The earliest step that the block reaches, its first loss, its last loss."""


def scaled(adjoint: Tensor, factor: Tensor) -> Tensor:
    """The adjoint after a time edge with this factor. Nothing crosses an edge of factor 0, not even a NaN."""
    factor = beside(factor, adjoint).to(adjoint.dtype)
    return torch.where(factor == 0, torch.zeros_like(adjoint), adjoint * factor)


class _TimeEdge(torch.autograd.Function):
    """The identity forward; backward, the adjoint times the edge's factor."""

    @staticmethod
    def forward(ctx: Any, carry: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return carry.view_as(carry)

    @staticmethod
    def backward(ctx: Any, adjoint: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        return scaled(adjoint, factor), None


def policy_graph(call: ScanCall, blocks: Sequence[Block], edge_factors: Tensor | None) -> dict[Block, list[Visit]]:
    """The visits of each block, from its earliest step to its last loss. edge_factors: as in `SegmentSweep`.

    Each step receives views of its own: a vector-Jacobian product with respect to them covers this step alone, while
    its own derivative goes on through the states to everything that they depend on.
    """
    # Before these steps every row is cut: a derivative of the zeros that would go on could be NaN.
    cuts = set() if edge_factors is None else set((edge_factors == 0).all(1).nonzero()[:, 0].tolist())
    chains: dict[Block, list[Visit]] = {}
    entering: list[Sequence[Tensor]] = []  # the carries of the block before, from its earliest step on
    start = 0
    for block in blocks:
        earliest, _, last = block
        # Blocks follow one another: where this one starts, the one before has been, or has just arrived.
        carry = call.carry if earliest == 0 else [c.detach() for c in entering[earliest - start]]
        start, entering, chains[block] = earliest, [carry], []
        for t in range(earliest, last + 1):
            if t > 0 and t in cuts:
                carry = [c.detach() for c in carry]
            elif edge_factors is not None and (t > earliest or t == 0):
                carry = [_TimeEdge.apply(c, edge_factors[t]) if differentiable(c) else c for c in carry]
            received = *reset(carry, call.resets, t), *(x[t] for x in call.xs), *call.captured
            visit = call.replay.visit(t, list(map(alias, received)))
            if t == earliest:
                call.replay.check(visit)
            call.check(visit, t, None)
            carry = visit.outputs[: len(carry)]
            chains[block].append(visit)
            entering.append(carry)
    return chains
