"""The input of one call of a layer of any cell, time first, and the way back to the caller's layout.

Legend: T steps, B lanes. A direction's own time runs from its first step: for the reverse one, from the last step of
each sequence. Nothing but the steps of a sequence gets a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence

from ..engine import refuse_mapped, refuse_tracing_values
from ..policies import Reach
from .packing import packed_rows, padded

__all__ = ["Sequences", "checked_lengths", "checked_resets"]


@dataclass(frozen=True)
class Sequences:
    """The sequences of one call.

    x: `[T, B, ...]`, T the length of the longest one. lengths: `[B]` on the CPU; None where all are T. resets:
    `[T, B]`. padded: the steps of the caller's input, of which T may be fewer.
    """

    x: Tensor
    lengths: Tensor | None
    resets: Tensor | None
    packed: PackedSequence | None
    batched: bool
    batch_first: bool
    padded: int

    @classmethod
    def of(
        cls,
        input: Tensor | PackedSequence,
        lengths: Tensor | Sequence[int] | None,
        resets: Tensor | None,
        batch_first: bool,
    ) -> Sequences:
        """The sequences of an input in the caller's layout. Raises TypeError and ValueError for what does not fit."""
        if isinstance(input, PackedSequence) or lengths is not None:
            refuse_tracing_values("Recurrent", "the lengths of sequences")
        if isinstance(input, PackedSequence):
            if lengths is not None:
                raise ValueError("lengths must be None for a PackedSequence, which has its own")
            ends: Tensor | None
            x, ends = padded(input)
            packed, batched = input, True
        else:
            if not isinstance(input, Tensor):
                raise TypeError(f"input must be a Tensor or a PackedSequence: got {type(input).__name__}")
            if input.layout is not torch.strided or input.is_nested:
                instead = ""
                if input.is_nested:  # which calls of the layer itself take where it is jagged
                    instead = " (torch.nested.to_padded_tensor(input, 0.0) with lengths= are the same sequences)"
                raise TypeError(f"input must be a dense tensor: got one that is {_kind(input)}{instead}")
            least = 1 if not (input.is_floating_point() or input.is_complex()) else 2  # tokens, or features
            if input.dim() < least:
                raise ValueError(f"input must have at least {least} dimensions: got {list(input.shape)}")
            packed, batched = None, input.dim() > least
            x = input.transpose(0, 1) if batched and batch_first else input if batched else input.unsqueeze(1)
            ends = checked_lengths(lengths, x)
        if len(x) == 0:
            raise ValueError(f"input must have at least one step: got shape {list(x.shape)}, time first")
        given = len(x)
        if resets is not None:
            resets = checked_resets(resets, x, batched, batch_first)
        if ends is not None and x.shape[1]:
            longest = int(ends.max())
            x, resets = x[:longest], None if resets is None else resets[:longest]
        uneven = ends is not None and bool((ends != len(x)).any())
        return cls(x, ends if uneven else None, resets, packed, batched, batch_first, given)

    @property
    def T(self) -> int:
        """The steps of the longest sequence."""
        return self.x.shape[0]

    @property
    def B(self) -> int:
        """The number of sequences."""
        return self.x.shape[1]

    def blocks_differ(self, reach: Reach) -> bool:
        """Whether a sequence alone has another last block than among longer ones, which then reaches back less far."""
        if self.lengths is None or not reach.overlaps:
            return False
        assert reach.every is not None
        return bool(((self.lengths % reach.every != 0) & (self.lengths < self.T)).any())

    def blocks_overlap(self, reach: Reach) -> bool:
        """Whether blocks of a policy overlap on these sequences: see `Reach.where_whole`."""
        return reach.where_whole(self.T, self.lengths).overlaps

    def ended(self) -> Tensor | None:
        """Whether a sequence has ended before a step of any direction's own time `[T, B]`; None for nowhere."""
        if self.lengths is None:
            return None
        return torch.arange(self.T, device=self.x.device)[:, None] >= self.lengths.to(self.x.device)

    def own_time(self, value: Tensor, d: int) -> Tensor:
        """`[T, B, ...]` in direction d's own time, in which the steps after a sequence's end repeat its last one.

        The cell may compute nonsense there, from a state of zeros, but from values that it could be given.
        """
        if self.lengths is None:
            return value.flip(0) if d else value
        t, last = torch.arange(self.T, device=value.device)[:, None], self.lengths.to(value.device) - 1
        rows = (last - t).clamp(min=0) if d else torch.minimum(t, last)
        return value[rows, torch.arange(self.B, device=value.device)]

    def forward_time(self, value: Tensor, d: int) -> Tensor:
        """`[T, B, ...]` of direction d's own time in forward time, zero after the end of each sequence."""
        ended = self.ended()
        if ended is None:
            return value.flip(0) if d else value
        value = self.own_time(value, d) if d else value
        return value.masked_fill(ended.reshape(ended.shape + (1,) * (value.dim() - 2)), 0)

    def own_resets(self, d: int) -> Tensor | None:
        """The resets in direction d's own time: a reset at t closes the edge between t-1 and t in both directions."""
        resets = None if self.resets is None else self._at_edges(self.resets, d)
        ended = self.ended()
        return resets if ended is None else ended if resets is None else resets | ended

    def own_restarts(self, states: Tensor, d: int) -> Tensor:
        """The states `[T, B, ...]` that resets restart from, in direction d's own time; zero after a sequence's end."""
        assert self.resets is not None
        states, ended = self._at_edges(states, d), self.ended()
        if ended is None:
            return states
        none = ended | ~self._at_edges(self.resets, d)
        return states.masked_fill(none.reshape(none.shape + (1,) * (states.dim() - 2)), 0)

    def _at_edges(self, value: Tensor, d: int) -> Tensor:
        """What belongs to the edge between t-1 and t, in direction d's own time."""
        if not d:
            return value
        turned = self.own_time(value, 1)
        return torch.cat([torch.zeros_like(turned[:1]), turned[:-1]])

    def last(self, states: Tensor) -> Tensor:
        """The state after each sequence's last step `[B, ...]`, from those after every step `[T, B, ...]`."""
        assert self.lengths is not None
        return states[self.lengths.to(states.device) - 1, torch.arange(self.B, device=states.device)]

    def dropout_mask(self, output: Tensor, p: float, D: int) -> Tensor:
        """The dropout mask `[T, B, D*F, ...]` on the outputs `[.., F, ...]` of a layer: torch.nn's random numbers."""
        features = output.shape[1:] if D == 1 else (D * output.shape[1], *output.shape[2:])
        if self.packed is None:
            return functional.dropout(output.new_ones(self.padded, self.B, *features), p)[: self.T]
        data = functional.dropout(output.new_ones(len(self.packed.data), *features), p)
        return padded(self.packed._replace(data=data))[0]

    def restore(self, y: Tensor) -> Tensor | PackedSequence:
        """The output `[T, B, ...]` in the caller's layout."""
        if self.packed is not None:
            return self.packed._replace(data=packed_rows(y, self.packed, self.lengths))
        if self.padded > self.T:
            y = torch.cat([y, y.new_zeros(self.padded - self.T, *y.shape[1:])])
        if not self.batched:
            return y.squeeze(1)
        return y.transpose(0, 1) if self.batch_first else y


def _kind(input: Tensor) -> str:
    return "nested" if input.is_nested else str(input.layout).removeprefix("torch.")


def checked_lengths(lengths: Any, x: Tensor) -> Tensor | None:
    """The lengths as int64 on the CPU."""
    if lengths is None:
        return None
    T, B = x.shape[:2]
    if isinstance(lengths, Tensor):
        if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype is torch.bool:
            raise TypeError(f"lengths must be whole numbers: got a tensor of {lengths.dtype}")
        refuse_mapped("lengths", lengths)
        found = lengths.detach().to("cpu", torch.int64)
    else:
        try:
            found = torch.tensor([index(n) for n in lengths], dtype=torch.int64, device="cpu")
        except TypeError:
            raise TypeError(f"lengths must be whole numbers, one for each lane: got {lengths!r}") from None
    if list(found.shape) != [B]:
        raise ValueError(f"lengths must have one entry for each of {B} lanes: got shape {list(found.shape)}")
    if B and not 1 <= int(found.min()) <= int(found.max()) <= T:
        raise ValueError(f"lengths must lie between 1 and input's {T} steps: got {found.tolist()}")
    return found


def checked_resets(resets: Any, x: Tensor, batched: bool, batch_first: bool, caller: str = "") -> Tensor:
    """The resets as `[T, B]`. caller: what errors begin with."""
    T, B = x.shape[:2]
    expected = (T,) if not batched else (B, T) if batch_first else (T, B)
    if not isinstance(resets, Tensor) or resets.dtype != torch.bool:
        got = resets.dtype if isinstance(resets, Tensor) else type(resets).__name__
        raise TypeError(f"{caller}resets must be a bool tensor of shape {expected}: got {got}")
    if tuple(resets.shape) != expected:
        raise ValueError(f"{caller}resets must have shape {expected}: got {tuple(resets.shape)}")
    if resets.device != x.device:
        raise ValueError(f"{caller}resets must be on input's device {x.device}: got {resets.device}")
    return resets[:, None] if not batched else resets.t() if batch_first else resets
