"""The recurrent layers of one call as data, which every program of the net and every pass over it reads.

Legend: T steps, B lanes, I input features, H hidden units, P size of h, G gates, L layers, D directions. k = layer * D
+ direction numbers the layers and directions, as torch.nn orders their parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor

from ..cells import Cell, Weights
from ..kernels import Kernel, TwoWayKernel
from ..policies import EVERYTHING, Reach
from .records import Tensors, given

__all__ = ["Net", "States"]

States = tuple[Tensor, ...]
"""h, and for a state (h, c) c."""


@dataclass(frozen=True, eq=False)
class Net:
    """The recurrent layers of one call: cell, kernel, sizes, the policy's reach, and what was drawn for the call.

    Inputs of its programs, in order: x `[T, B, I]`, h_0 `[L*D, B, P]`, for an LSTM c_0 `[L*D, B, H]`, then the weights
    of each layer and direction as torch.nn orders them; last, where resets do not zero it, the state that they put in
    its place, like h_0 (and c_0) for all resets or `[T, L*D, B, .]`. Outputs: y `[T, B, D*P]`, h_n, for an LSTM c_n.

    Everything random (dropout masks, xi) is drawn before and held here, so that a forward pass that runs again repeats
    it.
    """

    cell: Cell
    kernel: Kernel
    layers: int
    directions: int
    per_layer: int  # weights per layer and direction
    biased: bool
    reach: Reach
    lengths: Tensor | None = None  # [B] int64, on the CPU, where sequences end before T
    masks: tuple[Tensor, ...] = ()  # [T, B, D*P] for every layer but the last, scaled; empty without dropout
    xi: tuple[Tensor, ...] = ()  # [T, B, 1] for every layer and direction, in the direction's time; empty for 1
    resets: tuple[Tensor, ...] = ()  # [T, B, 1] bool for every direction, in its time; empty for none
    reverse: bool = False  # whether the one direction that there is goes from the last step to the first
    turns: bool = False  # whether time is turned round for such a direction, though its kernel can walk either way

    @property
    def inputs(self) -> int:
        """How many inputs there are before the state of resets."""
        return 1 + self.cell.states + self.layers * self.directions * self.per_layer

    @property
    def outputs(self) -> int:
        """How many outputs there are."""
        return 1 + self.cell.states

    @property
    def held(self) -> Tensors:
        """Masks, xi, resets and lengths, if there are any."""
        if self.lengths is None and not (self.masks or self.xi or self.resets):
            return ()
        return (*self.masks, *self.xi, *self.resets, self.lengths)

    def holding(self, tensors: Tensors) -> Net:
        """The same with these in the place of `held`."""
        if not tensors:
            return self
        *found, lengths = cast("tuple[Tensor, ...]", tensors)  # None only where they are given later
        xi, resets = len(self.masks), len(self.masks) + len(self.xi)
        parts = tuple(found[:xi]), tuple(found[xi:resets]), tuple(found[resets:])
        return replace(self, masks=parts[0], xi=parts[1], resets=parts[2], lengths=lengths)

    def blocks(self, T: int, B: int) -> Reach:
        """The reach for a call on so many steps and lanes: see `Reach.where_whole`."""
        return self.reach.where_whole(T, self.lengths) if B else EVERYTHING  # no lane, no block

    def by_block(self, reach: Reach) -> bool:
        """Whether adjoints go down to the layer below per block, and are summed over blocks only at the end: a window
        counts steps of the whole network, (7.3) and (7.4).
        """
        return self.layers > 1 and reach.overlaps

    def tape_bytes(self, inputs: Tensors) -> int:
        """Bytes of the whole tape, gates included."""
        x = given(inputs[0])
        values = sum(sum(self.cell.state_sizes(w)) + self.cell.taped(w) for w in self.weights(inputs))
        return x.shape[0] * x.shape[1] * values * x.element_size()

    def rows(self, inputs: Tensors, a: int, b: int) -> int:
        """The steps of all sequences between a and b-1."""
        if self.lengths is None:
            return (b - a) * given(inputs[0]).shape[1]
        return int((self.lengths.clamp(a, b) - a).sum())

    # What both directions in time share ------------------------------------------------------------------------------

    def with_resets(self, resets: Tensor) -> Net:
        """The same with the state replaced before the steps where resets `[T, B]` (bool) is True, and in padding.

        A reset at t closes the edge between t-1 and t; a reverse layer crosses it on its way to step t-1. What a state
        would become after its sequence has ended is nobody's, but it must not overflow.
        """
        own = [self.at_resets(resets[..., None], d) for d in range(self.directions)]
        if self.lengths is not None:
            ended = torch.arange(resets.shape[0], device=resets.device)[:, None] >= self.lengths.to(resets.device)
            own = [r | ended[..., None] for r in own]
        return replace(self, resets=tuple(own))

    def at_resets(self, x: Tensor, d: int) -> Tensor:
        """What belongs to a reset at t `[T, B, F]`, where direction d starts anew after it, in its time."""
        if d == 0:
            return x
        turned = self.turn(x, 1)
        # No part of T - 1 steps, of which a graph for any T would ask whether it is one step.
        return torch.cat([torch.zeros_like(turned[:1]), turned])[:-1]

    def from_resets(self, x: Tensor, d: int) -> Tensor:
        """The inverse of `at_resets`, zero where no step of the direction starts anew."""
        return x if d == 0 else self.turn(torch.cat([x[1:], torch.zeros_like(x[:1])]), 1)

    def reset_state(self, tensors: Tensors, k: int) -> tuple[Tensor, ...]:
        """What resets put in the place of the state of layer and direction k, in its time: see `Tape`."""
        states = tensors[self.inputs :]
        if not states:
            return ()
        own = [given(state).select(-3, k) for state in states]
        return tuple([self.at_resets(s, k % self.directions) if s.dim() == 3 else s for s in own])

    def join(self, per_k: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Values of every layer and direction, in own time, as one `[T, B, D*F]` per layer in forward time."""
        turned = [self.turn(value, k % self.directions) for k, value in enumerate(per_k)]
        return tuple(torch.cat(turned[i : i + self.directions], -1) for i in range(0, len(turned), self.directions))

    def initial(self, tensors: Tensors) -> list[tuple[Tensor, ...]]:
        """The initial states of every layer and direction."""
        return list(zip(*[given(s).unbind(0) for s in tensors[1 : 1 + self.cell.states]], strict=True))

    def weights(self, tensors: Tensors) -> list[Weights]:
        """The weights of every layer and direction."""
        step, flat = self.per_layer, tensors[1 + self.cell.states : self.inputs]
        if len(flat) == step:
            return [Weights.of(flat, self.biased)]
        return [Weights.of(flat[i : i + step], self.biased) for i in range(0, len(flat), step)]

    def masked(self, below: Tensor, layer: int) -> Tensor:
        """The input of a layer: dropout on what the layer below puts out."""
        return below * self.masks[layer - 1] if self.masks and layer > 0 else below

    @property
    def as_given(self) -> bool:
        """Whether the walks of reverse directions go over values as they lie in forward time."""
        if self.directions == 1 and not self.reverse:
            return False
        return not self.turns and self.lengths is None and _walks_either_way(self.kernel)

    @property
    def two_way_kernel(self) -> TwoWayKernel:
        """The kernel, where `as_given`."""
        return cast("TwoWayKernel", self.kernel)

    def is_reverse(self, d: int) -> bool:
        """Whether a direction goes from the last step to the first."""
        return d == 1 or self.reverse

    def turn(self, x: Tensor, d: int) -> Tensor:
        """Time `[T, B, F]` turned round within each sequence for the reverse direction; its own inverse."""
        return (
            x if d == 0 and not self.reverse else x.flip(0) if self.lengths is None else x[self._back(x, 0, x.shape[0])]
        )

    def for_walk(self, x: Tensor, d: int) -> Tensor:
        """Values of steps `[T, B, F]` in forward time as a walk has them, which is its own time or, where it goes over
        values as they lie, forward time; and back.
        """
        return x if (d == 0 and not self.reverse) or self.as_given else self.turn(x, d)

    def own(self, x: Tensor, d: int) -> Tensor:
        """Values of steps as a walk has them in the direction's own time, and back."""
        return self.turn(x, d) if self.as_given else x

    def walk_resets(self, d: int) -> Tensor | None:
        """`resets_of` as a walk has them."""
        resets = self.resets_of(d)
        return None if resets is None else self.own(resets, d)

    def walk_edge_factors(self, k: int, dtype: torch.dtype) -> Tensor | None:
        """`edge_factors` as a walk has them."""
        factors = self.edge_factors(k, dtype)
        return None if factors is None else self.own(factors, k % self.directions)

    def walk_reset_state(self, tensors: Tensors, k: int) -> tuple[Tensor, ...]:
        """`reset_state` as a walk has it."""
        states = self.reset_state(tensors, k)
        return tuple([self.own(s, k % self.directions) if s.dim() == 3 else s for s in states])

    def states_end_first(self, d: int) -> bool:
        """Whether the states of all steps `[T+1, B, F]`, as a walk has them, end with the initial one."""
        return (d == 1 or self.reverse) and self.as_given

    def output(self, h: Tensor, d: int) -> Tensor:
        """The output of a direction `[T, B, P]` in forward time, from h as a walk has it, with the initial one."""
        return h[:-1] if self.states_end_first(d) else self.for_walk(h[1:], d)

    def turned(self, x: Tensor, a: int, b: int) -> Tensor:
        """The steps a to b-1 of the reverse direction's time `[b-a, B, F]`, where lanes have lengths."""
        return x[self._back(x, a, b)]

    def add_turned(self, x: Tensor, a: int, b: int, value: Tensor) -> None:
        """Add to the steps a to b-1 of the reverse direction's time, in place, where lanes have lengths."""
        x[self._back(x, a, b)] += value

    def _back(self, x: Tensor, a: int, b: int) -> tuple[Tensor, Tensor]:
        """(steps `[b-a, B]` in forward time, lanes `[B]`) of the steps a to b-1 of the reverse direction's time."""
        assert self.lengths is not None
        t = torch.arange(a, b, device=x.device)[:, None]
        lengths = self.lengths.to(x.device)
        return torch.where(t < lengths, lengths - 1 - t, t), torch.arange(x.shape[1], device=x.device)

    def half(self, x: Tensor, d: int) -> Tensor:
        """Direction d's part of `[..., D*P]`."""
        return x if self.directions == 1 else x.chunk(2, -1)[d]

    def edge_factors(self, k: int, dtype: torch.dtype) -> Tensor | None:
        """The factor on each time edge `[T, B, 1]` of layer and direction k, None for 1."""
        resets, xi = self.resets_of(k % self.directions), self.xi[k] if self.xi else None
        if resets is None:
            return xi
        open_edges = ~resets if xi is None else xi.masked_fill(resets, 0)
        return open_edges.to(dtype)

    def resets_of(self, d: int) -> Tensor | None:
        """Where direction d's state is replaced before the step `[T, B, 1]`, in its time; None for nowhere."""
        return self.resets[d] if self.resets else None

    def present(self, x: Tensor) -> Tensor | None:
        """The rows of `[T * B]`, in any direction's own time, that are steps of a sequence; None for all."""
        if self.lengths is None:
            return None
        t = torch.arange(x.shape[0], device=self.lengths.device)
        return (t[:, None] < self.lengths).flatten().nonzero()[:, 0].to(x.device)

    def last(self, states: tuple[Tensor, ...]) -> Tensor:
        """The state after each sequence's last step `[L*D, B, F]`, from `[T+1, B, F]` of every layer and direction."""
        if self.lengths is not None:
            lanes = torch.arange(len(self.lengths), device=states[0].device)
            lengths = self.lengths.to(states[0].device)
            return torch.stack([s[lengths.clamp(max=len(s) - 1), lanes] for s in states])
        return states[0][-1:].clone() if len(states) == 1 else torch.stack([s[-1] for s in states])


@lru_cache(maxsize=64)
def _walks_either_way(kernel: Kernel) -> bool:
    """Kept, since to ask for a protocol takes as long as a short walk."""
    return isinstance(kernel, TwoWayKernel)
