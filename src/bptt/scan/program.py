"""The gradient of a scan: steps run again from their carries, and the sweep of a policy's blocks over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..engine import Tensors
from ..policies import Policy
from .arguments import Arguments
from .eager import kept_eager
from .forward import ForwardPass
from .graph import Block, PolicyGraph
from .leaves import differentiable, fresh, reset
from .replay import Replay
from .replays import ForwardValues, Segment, StepReplays
from .segments import KeptCarries, RecomputedCarries
from .surroundings import random_kept
from .sweep import MISFITS, Grads, Sweep, exhausted, independent
from .visit import Visit

__all__ = ["Rows", "ScanPullback", "edge_factors", "obstacle_to_merging"]

Rows = Literal["auto", "independent", "coupled"]


@dataclass(frozen=True, eq=False)
class ScanPullback:
    """The way back through one call of `scan`: its inputs are the tensors of carry and xs, and the captured ones.

    counts: how many tensors carry has, and xs. obstacle: why steps cannot be merged, or None. kept: which carries are
    on the tape. reads: how many outputs there are: a replay must give all of them again.
    """

    name: ClassVar[str] = "scan"

    counts: tuple[int, int]
    replay: Replay
    sweep: Sweep
    resets: Tensor | None
    rows: Rows
    obstacle: str | None
    kept: KeptCarries
    reads: int

    @property
    def held(self) -> Tensors:
        """Beside these, it keeps no tensor alive but those that the step captures."""
        return self.resets, self.sweep.edge_factors

    def holding(self, tensors: Tensors) -> ScanPullback:
        """The same with these in the place of `held`."""
        resets, factors = tensors
        return replace(self, resets=resets, sweep=replace(self.sweep, edge_factors=factors))

    @kept_eager("bptt.scan runs its step again")
    def backward(
        self,
        tensors: Tensors,
        outputs: tuple[Tensor, ...],
        tape: tuple[Tensor, ...] | None,
        cotangents: Tensors,
        needs: tuple[bool, ...],
    ) -> Tensors:
        n, m = self.counts
        T = len(self.replay.carry)
        given = [t for t in tensors if t is not None]
        carry, xs, captured = given[:n], given[n : n + m], given[n + m :]
        dcarry, dys = cotangents[:n], cotangents[n:]
        values = ForwardValues(T, outputs[:n], outputs[n:], self.resets)
        with random_kept(self.replay.states), self.replay.surroundings.on_default_device():
            if tape is None:
                graph = PolicyGraph(self.replay, values, carry, xs, captured, self.sweep.edge_factors)
                chains = graph.chains(self.sweep.blocks)

                def recorded_for(t: int) -> Callable[[Block], Visit]:
                    return lambda block: chains[block][t - block[0]]

                grads = self.sweep.one_by_one(recorded_for, T, m, dcarry, dys)
            else:
                held = [fresh(w, True) for w in captured]

                def replays() -> StepReplays:
                    segments = self._segments(tape, carry, xs, held)
                    return StepReplays(self.replay, values, xs, held, needs[n:], next(segments), segments)

                grads = self._side_by_side(replays, dcarry, dys) or self._one_by_one(replays(), m, dcarry, dys)
        return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))

    def _segments(
        self, tape: tuple[Tensor, ...], carry: list[Tensor], xs: list[Tensor], captured: list[Tensor]
    ) -> Iterator[Segment]:
        """The carries of all steps, from the last to the first: those on the tape, or run again from them."""
        starts, schedule = self.kept.starts, self.kept.schedule
        if schedule is None:
            return iter([Segment(0, starts[-1], tape)])
        first = [c.detach() for c in reset(carry, self.resets, 0)]
        stored = {segment: [c[i] for c in tape] for i, segment in enumerate(schedule.stored_forward)}
        return RecomputedCarries(self.replay, starts, schedule, first, stored, xs, captured, self.resets).segments()

    def _side_by_side(self, replaying: Callable[[], StepReplays], dcarry: Tensors, dys: Tensors) -> Grads | None:
        """The gradient from blocks walked side by side, or None where they are not to be."""
        if self.rows == "coupled" or len(self.sweep.blocks) == 1 or self.obstacle is not None:
            return None
        # Each visit is compared with the forward: a step may branch on values of the whole batch.
        replays = replaying()
        if self.rows == "auto":
            return self.sweep.merged(replays, dcarry, dys, replays.fits) if independent(replays) else None
        try:
            grads = self.sweep.merged(replays, dcarry, dys, partial(replays.fits, rounding=self.replay.rounding))
        except MISFITS as error:
            if exhausted(error):
                raise
            raise ValueError(
                "rows='independent' does not hold: the step fails on the rows of several blocks at once"
            ) from error
        if grads is None:
            replays = replaying()
            for t in reversed(range(replays.T)):
                replays.visit(t)  # raises where the step differs on its own rows too
            raise ValueError(
                "rows='independent' does not hold: on the rows of several blocks at once the step gives another result"
            )
        return grads

    def _one_by_one(self, replays: StepReplays, m: int, dcarry: Tensors, dys: Tensors) -> Grads:
        """The gradient from one step after the other, each run again once for all blocks that walk over it."""

        def shared(t: int) -> Callable[[Block], Visit]:
            visit = replays.visit(t)
            return lambda block: visit

        return self.sweep.one_by_one(shared, replays.T, m, dcarry, dys)


def obstacle_to_merging(replay: Replay, computed: ForwardPass, xs: list[Tensor]) -> str | None:
    """Why several steps cannot be run as one with more rows, or None."""
    if not (replay.carry[0].tensors_only and replay.x.tensors_only):
        return "the carry holds Python values"
    if any(state is not None for state in replay.states):
        return "the step draws random numbers"
    leaves = [*computed.kept, *xs, *computed.ys]
    sizes = {t.shape[1] if t.dim() > 1 else None for t in leaves}
    if len(sizes) != 1 or sizes <= {None, 0}:
        return f"carry, x and y do not share one first dimension: got {[list(t.shape[1:]) for t in leaves]}"
    return None


def edge_factors(policy: Policy, given: Arguments) -> Tensor | None:
    """What multiplies the adjoint from step t to step t-1, `[T, B]` or `[T, 1]`: xi, and 0 at a reset; None is 1."""
    floats, resets = [c for c in given.carry if differentiable(c)], given.resets
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
