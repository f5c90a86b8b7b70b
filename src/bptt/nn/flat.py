"""Sequences of several lengths, one after the other in one tensor: flat with offsets, or a jagged nested tensor.

They run as a PackedSequence does, whose rows are the same in another order.

Legend: N sequences, S the sum of their lengths, I input features, L layers, D directions, P size of h, H of c.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn.utils.rnn import PackedSequence

from ..cells import CELLS
from ..engine import recorder, refuse_mapped, refuse_recording, refuse_tracing_values
from .call import Hidden, Layer, bare

__all__ = ["Flat", "flat_call", "is_flat"]


def is_flat(input: Any, cu_seqlens: Any) -> bool:
    """Whether a call is one on sequences that lie one after the other."""
    return cu_seqlens is not None or (isinstance(input, Tensor) and input.is_nested)


def flat_call(
    layer: Layer, input: Any, hx: Hidden | None, *, resets: Any, reset_state: Any, lengths: Any, cu_seqlens: Any
) -> tuple[Tensor, Hidden]:
    """The result of a layer's call on such sequences; outside of a compiler's graph, which knows no numbers."""
    name = type(layer).__name__
    if lengths is not None:
        raise ValueError(f"{name}: lengths must be None for sequences one after the other, which have their own")
    if torch.compiler.is_exporting():
        raise NotImplementedError(
            f"{name}: torch.export cannot hold cu_seqlens and nested tensors, whose numbers are the sizes of what is "
            "computed: pad the sequences, and pass lengths="
        )
    if recorder() is not None:
        refuse_recording("cu_seqlens and nested tensors, whose numbers are the sizes of what is computed")
    call = torch.compiler.disable(_called) if is_dynamo_compiling() else _called
    result: tuple[Tensor, Hidden] = call(layer, input, hx, resets, reset_state, cu_seqlens)
    return result


def _called(
    layer: Layer, input: Any, hx: Hidden | None, resets: Any, reset_state: Any, cu_seqlens: Any
) -> tuple[Tensor, Hidden]:
    flat = Flat.of(type(layer).__name__, input, cu_seqlens)
    states, restarts = flat.states("hx", hx), flat.states("reset_state", reset_state)
    if flat.packed is None:
        D = 2 if layer.bidirectional else 1
        rows = flat.values.new_zeros(0, D * (layer.proj_size or layer.hidden_size)) + flat.values.sum()  # as ever in
        return flat.as_given(rows), bare(_first_states(layer, flat, hx))  # the graph of its input
    packed: Any = flat.packed
    y, final = layer._own_forward(packed, states, resets=flat.resets(resets, layer.batch_first), reset_state=restarts)
    if flat.present is not None:  # sequences without a step keep their first state
        finals = (final,) if isinstance(final, Tensor) else final
        firsts = _first_states(layer, flat, hx)
        final = bare(tuple(flat.among_all(own, first) for own, first in zip(finals, firsts, strict=True)))
    return flat.restored(y), final


def _first_states(layer: Layer, flat: Flat, hx: Hidden | None) -> tuple[Tensor, ...]:
    """The first states of all sequences."""
    if hx is not None:
        return (hx,) if isinstance(hx, Tensor) else tuple(hx)
    K = layer.num_layers * (2 if layer.bidirectional else 1)
    sizes = (layer.proj_size or layer.hidden_size, layer.hidden_size)[: CELLS[layer.mode].states]
    return tuple(flat.values.new_zeros(K, flat.count, size) for size in sizes)


@dataclass(eq=False, slots=True)
class Flat:
    """The sequences of one call, as a PackedSequence of those that have a step, and the way back.

    jagged: the nested tensor that the caller gave, if it was one. present: the numbers `[M]` of the sequences that have
    a step; None where all have. order: the row `[S]` of the flat input that each packed row is.
    """

    name: str  # of the layer, for messages
    values: Tensor  # [S, ...]
    jagged: Tensor | None
    count: int
    packed: PackedSequence | None  # None where no sequence has a step
    present: Tensor | None
    order: Tensor
    steps: tuple[Tensor, Tensor]  # of each row of the flat input: its step, and its lane among the present

    @classmethod
    def of(cls, name: str, input: Any, cu_seqlens: Any, any_features: bool = False) -> Flat:
        """The sequences of a flat input, or of a jagged one. Raises TypeError and ValueError for what does not fit.

        any_features: whether a step may be any tensor, or a token, and not `[I]` alone.
        """
        values, offsets, jagged = _flattened(name, input, cu_seqlens, any_features)
        ends = _checked(name, offsets, values)
        lengths, device = ends.diff(), values.device
        there = lengths > 0
        whole = bool(there.all())
        present = None if whole else there.nonzero()[:, 0]
        own = lengths if present is None else lengths[present]
        lane = torch.repeat_interleave(torch.arange(len(own), device="cpu"), own)
        first = own.cumsum(0) - own
        t = torch.arange(len(values), device="cpu") - first[lane]
        longest_first = own.argsort(descending=True, stable=True)
        rank = longest_first.argsort()
        order = (t * max(len(own), 1) + rank[lane]).argsort()
        lane, t, order, to = lane.to(device), t.to(device), order.to(device), longest_first.to(device)
        packed = None
        if len(own):
            sizes = torch.bincount(t.cpu())
            packed = PackedSequence(values.index_select(0, order), sizes, to, rank.to(device))
        present = None if present is None else present.to(device)
        return cls(name, values, jagged, len(lengths), packed, present, order, (t, lane))

    def states(self, name: str, given: Hidden | None) -> Hidden | None:
        """The states `[L*D, N, .]` of the sequences that have a step."""
        if given is None:
            return None
        states = (given,) if isinstance(given, Tensor) else given
        for state in states if isinstance(states, tuple | list) else ():
            if isinstance(state, Tensor) and (state.dim() != 3 or state.shape[1] != self.count):
                raise ValueError(
                    f"{self.name}: {name} must hold a state for each of {self.count} sequences, "
                    f"[L*D, {self.count}, .]: got shape {tuple(state.shape)}"
                )
        if self.present is None or not isinstance(states, tuple | list):
            return given
        return bare(tuple(self.among_present(state) if isinstance(state, Tensor) else state for state in states))

    def among_present(self, state: Tensor, dim: int = 1) -> Tensor:
        """The entries, along a dimension of N, of the sequences that have a step."""
        return state if self.present is None else state.index_select(dim, self.present)

    def among_all(self, state: Tensor, others: Tensor, dim: int = 1) -> Tensor:
        """The entries of all sequences: those of the others, which have no step, are taken from `others`."""
        if self.present is None:
            return state
        return others.to(state.dtype).index_copy(dim, self.present, state)

    def resets(self, given: Tensor | None, batch_first: bool) -> Tensor | None:
        """The resets, one for each row, as a layer takes them for the sequences that have a step."""
        if given is None or self.packed is None:
            return None
        if not isinstance(given, Tensor) or given.dtype != torch.bool or given.shape != self.values.shape[:1]:
            got = f"{given.dtype} of {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
            raise ValueError(
                f"{self.name}: resets must be a bool tensor of shape ({len(self.values)},), one for each row: got {got}"
            )
        t, lane = self.steps
        padded = given.new_zeros(len(self.packed.batch_sizes), int(self.packed.batch_sizes[0]))
        padded[t, lane] = given
        return padded.t() if batch_first else padded

    def restored(self, y: PackedSequence) -> Tensor:
        """The rows of all sequences in the form of the input."""
        return self.as_given(y.data.index_select(0, self.order.argsort()))

    def like_packed(self, name: str, rows: Any) -> PackedSequence | None:
        """Rows in the form of the input as a PackedSequence; None for None, and where no sequence has a step."""
        if rows is None:
            return None
        if not isinstance(rows, Tensor) or rows.is_nested != (self.jagged is not None):
            form = (
                "jagged nested tensor, as the input is" if self.jagged is not None else "tensor, one row for each step"
            )
            got = "one that is nested" if isinstance(rows, Tensor) and rows.is_nested else type(rows).__name__
            raise TypeError(f"{self.name}: {name} must be a {form}: got {got}")
        values = rows
        if self.jagged is not None:
            values, offsets, _ = _flattened(self.name, rows, None, True)
            given: Any = self.jagged
            if not torch.equal(offsets, given.offsets()):
                raise ValueError(f"{self.name}: {name} must have the offsets of the input: got {offsets}")
        if values.dim() < 2 or len(values) != len(self.values):
            raise ValueError(
                f"{self.name}: {name} must have shape [{len(self.values)}, D*P], one row for each step: "
                f"got {list(values.shape)}"
            )
        return None if self.packed is None else self.packed._replace(data=values.index_select(0, self.order))

    def as_given(self, rows: Tensor) -> Tensor:
        """Rows `[S, D*P]` in the form of the input."""
        if self.jagged is None:
            return rows
        given: Any = self.jagged
        jagged: Tensor = torch.nested.nested_tensor_from_jagged(rows, offsets=given.offsets())
        return jagged


def _flattened(name: str, input: Any, cu_seqlens: Any, any_features: bool) -> tuple[Tensor, Any, Tensor | None]:
    """(the rows of all sequences, their offsets, the nested tensor if it is one)."""
    if isinstance(input, Tensor) and input.is_nested:
        if cu_seqlens is not None:
            raise ValueError(f"{name}: cu_seqlens must be None for a nested tensor, which has its own offsets")
        if input.layout is not torch.jagged:
            raise ValueError(
                f"{name}: a nested input must have layout=torch.jagged: got {input.layout}, which "
                "torch.nested.as_nested_tensor(list(input.unbind()), layout=torch.jagged) turns into it"
            )
        given: Any = input
        if (given.dim() != 3 and not any_features) or getattr(given, "_ragged_idx", 1) != 1:
            shape = "[N, j, ...]" if any_features else "[N, j, I]"
            raise ValueError(f"{name}: a jagged input must have shape {shape}, ragged in j: got {tuple(given.shape)}")
        if given.lengths() is not None:
            raise ValueError(
                f"{name}: a jagged input must have no holes between its sequences: call contiguous() on it"
            )
        return given.values(), given.offsets(), input
    if isinstance(input, PackedSequence):
        raise ValueError(f"{name}: cu_seqlens must be None for a PackedSequence, which has its own lengths")
    if not isinstance(input, Tensor):
        raise TypeError(f"{name}: input must be a Tensor [S, I] beside cu_seqlens: got {type(input).__name__}")
    if input.dim() != 2 and not any_features:
        raise ValueError(
            f"{name}: input must have shape [S, I] beside cu_seqlens, the steps of all sequences one after the other: "
            f"got {tuple(input.shape)}"
        )
    return input, cu_seqlens, None


def _checked(name: str, offsets: Any, values: Tensor) -> Tensor:
    """The offsets `[N + 1]` as int64 on the CPU."""
    if not isinstance(offsets, Tensor):
        raise TypeError(f"{name}: cu_seqlens must be a tensor of whole numbers: got {type(offsets).__name__}")
    if offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: cu_seqlens must be int32 or int64: got {offsets.dtype}")
    if offsets.dim() != 1 or not len(offsets):
        raise ValueError(f"{name}: cu_seqlens must have shape [N + 1] for N sequences: got {tuple(offsets.shape)}")
    refuse_mapped(f"{name}: cu_seqlens", offsets)
    refuse_tracing_values(name, "the lengths of sequences")
    found = offsets.detach().to("cpu", torch.int64)
    if int(found[0]) != 0 or int(found[-1]) != len(values) or bool((found.diff() < 0).any()):
        raise ValueError(
            f"{name}: cu_seqlens must rise from 0 to input's {len(values)} rows, the ends of the sequences after the "
            f"start of the first: got {found}"
        )
    return found
