"""The backward pass of a scan: steps run again from their carries, and a policy's blocks are swept over them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..engine import Asked, Grads, Saved, Tensors, own_precision
from ..kernels import Blocks
from ..policies import Policy, Reach
from .arguments import Arguments
from .eager import kept_eager
from .forward import ForwardPass
from .graph import policy_graph
from .pytrees import differentiable, fresh
from .replay import Replay
from .segments import KeptCarries, ScanCall, StepReplays
from .surroundings import not_in_inference_mode, random_kept
from .sweep import EXHAUSTED, MISFITS, CoupledRows, MergedRows, PerLeaf, RowsDiffer, independent

__all__ = ["Rows", "ScanPullback", "edge_factors", "obstacle_to_merging"]

Rows = Literal["auto", "independent", "coupled"]


@dataclass(frozen=True, eq=False)
class ScanPullback:
    """The backward pass of one call of `scan`, whose inputs are the tensors of carry and xs, and the captured tensors.

    counts: the numbers of tensors of carry and xs. reach: of the policy. kept: which carries are on the tape. reads:
    the number of outputs, all of which a replay must give again.
    """

    name: ClassVar[str] = "scan"

    counts: tuple[int, int]
    replay: Replay
    reach: Reach
    edge_factors: Tensor | None
    resets: Tensor | None
    rows: Rows
    kept: KeptCarries
    reads: int

    @property
    def held(self) -> Tensors:
        """The tensors that it keeps alive, besides those that the step captures."""
        return self.resets, self.edge_factors

    def holding(self, tensors: Tensors) -> ScanPullback:
        """The same pullback with these tensors in the place of `held`."""
        resets, edge_factors = tensors
        return replace(self, resets=resets, edge_factors=edge_factors)

    @kept_eager("bptt.scan runs its step again")
    def backward(self, saved: Saved, asked: Asked) -> Grads:
        tensors, outputs, tape = saved
        (n, m), factors = self.counts, self.edge_factors
        given = [t for t in tensors if t is not None]
        captured = given[n + m :]
        if tape is not None:
            with not_in_inference_mode():
                captured = [fresh(w, True) for w in captured]
        call = ScanCall(self.replay, given[:n], given[n : n + m], captured, outputs[:n], outputs[n:], self.resets)
        dcarry, dys = asked.cotangents[:n], asked.cotangents[n:]
        columns = Blocks(self.reach, None, call.T, 1)
        grads: PerLeaf | None
        surroundings, own = self.replay.surroundings, own_precision(given[0].device)
        with random_kept(self.replay.states), surroundings.on_default_device(), own, not_in_inference_mode():
            if tape is None:
                blocks = self.reach.blocks(call.T)
                graph = policy_graph(call, blocks, factors)
                of_block = CoupledRows(
                    [(0, call.T)], factors, dys, lambda t: lambda block: graph[block][t - blocks[block][0]], m
                )
                grads = of_block.grads(columns, dcarry)
            else:
                replaying = partial(StepReplays.of, call, asked.needs[n:], self.kept, tape)
                grads = self._merged(columns, replaying, dcarry, dys)
                if grads is None:
                    replays = replaying()
                    shared = CoupledRows(replays.each_segment(), factors, dys, replays.shared, m)
                    grads = shared.grads(columns, dcarry)
        return Grads(tuple(grad if need else None for grad, need in zip(grads, asked.needs, strict=True)))

    def _merged(
        self, columns: Blocks, replaying: Callable[[], StepReplays], dcarry: Tensors, dys: Tensors
    ) -> PerLeaf | None:
        """The gradient from merged rows, or None where rows are coupled."""
        if self.rows == "coupled" or len(columns.within(0, columns.T).start) == 1:
            return None
        replays, tested = replaying(), self.rows == "auto"
        if tested and not independent(replays):
            return None
        # Each visit is compared with the forward: a step may branch on values of the whole batch.
        rounding = 0.0 if tested else self.replay.rounding
        merged = MergedRows(replays.each_segment(), self.edge_factors, dys, replays, rounding)
        try:
            return merged.grads(columns, dcarry)
        except EXHAUSTED:
            raise
        except RowsDiffer:
            if tested:
                return None
        except MISFITS as error:
            if tested:
                raise
            raise ValueError(
                "rows='independent' does not hold: the step fails on the rows of several blocks at once"
            ) from error
        replays = replaying()
        for a, b in replays.each_segment():
            for t in reversed(range(a, b)):
                replays.visit(t)  # raises where the step differs on its own rows too
        raise ValueError(
            "rows='independent' does not hold: on the rows of several blocks at once the step gives another result"
        )


def obstacle_to_merging(replay: Replay, computed: ForwardPass, xs: list[Tensor]) -> str | None:
    """Why several steps cannot be run as one with more rows, or None."""
    if replay.carry[0].values:
        return "the carry holds Python values"
    if any(state is not None for state in replay.states):
        return "the step draws random numbers"
    leaves = [*computed.kept, *xs, *computed.ys]
    sizes = {t.shape[1] if t.dim() > 1 else None for t in leaves}
    if len(sizes) != 1 or sizes <= {None, 0}:
        return f"carry, x and y do not share one first dimension: got {[list(t.shape[1:]) for t in leaves]}"
    return None


def edge_factors(policy: Policy, given: Arguments) -> Tensor | None:
    """The edge factors of the adjoint from step t to t-1, `[T, B]` or `[T, 1]`: xi, and 0 at a reset; None is 1."""
    resets = given.resets
    if resets is None and not policy.draws_factors:
        return None
    floats = [c for c in given.carry if differentiable(c)]
    if not floats:
        return None
    with torch.device("cpu"):  # as a policy's factors are, whatever the default device is
        xi = policy.draw(given.T, given.lanes)
    if xi is None and resets is None:
        return None
    dtype = reduce(torch.promote_types, (c.dtype for c in floats))
    xi = torch.ones(given.T, 1, device="cpu") if xi is None else xi
    factors = xi.to(floats[0].device, dtype)
    return factors if resets is None else factors * ~resets
