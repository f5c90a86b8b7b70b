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

from ..kernels import scaled
from .pytrees import alias, beside, differentiable, reset
from .replay import Visit
from .segments import ScanCall

__all__ = ["Block", "EdgeFactors", "TimeEdge", "after_edge", "all_rows", "policy_graph"]

Block = tuple[int, int, int]
"""The earliest step that the block reaches, its first loss, its last loss."""


def after_edge(adjoint: Tensor, factor: Tensor) -> Tensor:
    """The adjoint of a leaf of the carry after a time edge. factor: `[B]` or `[1]`, of several blocks `[blocks, B]`."""
    return scaled(adjoint, beside(factor, adjoint).to(adjoint.dtype))


def all_rows(mask: Tensor) -> frozenset[int]:
    """The rows that are True in all columns."""
    return frozenset(mask.all(1).nonzero()[:, 0].tolist())


class EdgeFactors:
    """The factors of time edges `[T, B]` or `[T, 1]`, None for 1, which may be drawn after the steps have drawn.

    cuts: where all of a row is 0.
    """

    factors: Tensor | None = None
    cuts: frozenset[int] = frozenset()

    def know(self, factors: Tensor | None) -> EdgeFactors:
        """The same object, with these factors."""
        if factors is not None:
            self.factors, self.cuts = factors, all_rows(factors == 0)
        return self


class TimeEdge(torch.autograd.Function):
    """The identity forward; backward, the adjoint times the edge's factor, which is known by then."""

    @staticmethod
    def forward(ctx: Any, carry: Tensor, edge_factors: EdgeFactors, t: int) -> Tensor:
        ctx.edge_factors, ctx.t = edge_factors, t
        ctx.set_materialize_grads(False)
        return carry.view_as(carry)

    @staticmethod
    def backward(ctx: Any, adjoint: Tensor | None) -> tuple[Tensor | None, None, None]:
        known: EdgeFactors = ctx.edge_factors
        if known.factors is None or adjoint is None:
            return adjoint, None, None
        # A derivative of the zeros that would go on could be NaN.
        return (None if ctx.t in known.cuts else after_edge(adjoint, known.factors[ctx.t])), None, None


def policy_graph(call: ScanCall, blocks: Sequence[Block], edge_factors: Tensor | None) -> list[list[Visit]]:
    """The visits of each block, from its earliest step to its last loss. edge_factors: as in `ReplayedSweep`.

    Each step receives views of its own: a vector-Jacobian product with respect to them covers this step alone, while
    its own derivative goes on through the states to everything that they depend on.
    """
    known = EdgeFactors().know(edge_factors)
    chains: list[list[Visit]] = []
    entering: list[Sequence[Tensor]] = []  # the carries of the block before, from its earliest step on
    start = 0
    for block in blocks:
        earliest, _, last = block
        # Blocks follow one another: where this one starts, the one before has been, or has just arrived.
        carry = call.carry if earliest == 0 else [c.detach() for c in entering[earliest - start]]
        start, entering = earliest, [carry]
        chains.append([])
        for t in range(earliest, last + 1):
            if t > 0 and t in known.cuts:
                carry = [c.detach() for c in carry]
            elif edge_factors is not None and (t > earliest or t == 0):
                carry = [TimeEdge.apply(c, known, t) if differentiable(c) else c for c in carry]
            received = *reset(carry, call.resets, t), *(x[t] for x in call.xs), *call.captured
            visit = call.replay.visit(t, list(map(alias, received)))
            if t == earliest:
                call.replay.check(visit)
            call.check(visit, t, None)
            carry = visit.outputs[: len(carry)]
            chains[-1].append(visit)
            entering.append(carry)
    return chains
