"""A layer of any cell on sequences of several lengths that lie one after the other.

Legend: N sequences, M of them with a step, S the sum of their lengths, K cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_map, tree_map_only

from ._layered import split_hidden, stack_hidden
from ._sequences import Sequences
from .flat import Flat

__all__ = ["FlatCall", "flat_recurrent"]


def flat_recurrent(
    layer: Any, input: Any, hx: Any, lengths: Any, cu_seqlens: Any, resets: Any, reset_state: Any
) -> tuple[Tensor, Any]:
    """(y in the form of the input, final state of all N sequences) of a call of a `Recurrent`.

    Raises ValueError for a sequence without a step whose first state only its cell knows.
    """
    call = FlatCall(layer, input, hx, lengths, cu_seqlens)
    if call.flat.packed is None:
        return _without_steps(layer, call.flat, call.given)
    packed, own_hx, own_resets, restart = call.as_packed(resets, reset_state)
    return call.of_all(*layer._own_forward(packed, own_hx, resets=own_resets, reset_state=restart))


class FlatCall:
    """A call of a `Recurrent` as one on a PackedSequence of the M sequences that have a step, and the way back."""

    def __init__(self, layer: Any, input: Any, hx: Any, lengths: Any, cu_seqlens: Any) -> None:
        name = type(layer).__name__
        if lengths is not None:
            raise ValueError(f"{name}: lengths must be None for sequences one after the other, which have their own")
        self.layer, self.hx, self.K = layer, hx, len(layer.cells)
        self.flat = Flat.of(name, input, cu_seqlens, any_features=True)
        self.given = None if hx is None else split_hidden(hx, self.K, self.flat.count, True)

    def as_packed(self, resets: Any = None, reset_state: Any = None) -> tuple[PackedSequence, Any, Tensor | None, Any]:
        """(input, hx, resets, reset_state) of the call on the PackedSequence.

        Raises ValueError where no sequence has a step.
        """
        packed = self.flat.packed
        if packed is None:
            raise ValueError(
                f"{self.flat.name}: a scan must have at least one step: got {self.flat.count} sequences without any, "
                "which a call of the layer itself takes"
            )
        own_resets = self.flat.resets(resets, self.layer.batch_first)
        return packed, self._present(self.hx), own_resets, self._present(reset_state)

    def _present(self, state: Any) -> Any:
        """A state of the N sequences as one of those that have a step."""
        flat = self.flat
        if state is None or flat.present is None:
            return state
        own = tree_map_only(Tensor, lambda t: flat.among_present(t, 0), split_hidden(state, self.K, flat.count, True))
        return stack_hidden(own, len(flat.present), True)

    def of_all(self, y: Any, final: Any) -> tuple[Tensor, Any]:
        """(y in the form of the input, final state of all N sequences) from the results of the PackedSequence."""
        flat, layer, N = self.flat, self.layer, self.flat.count
        if flat.present is None:
            return flat.restored(y), final
        sequences = Sequences.of(self.as_packed()[0], None, None, layer.batch_first)
        firsts = _first_states(layer, sequences, self.given, N)
        finals = [
            tree_map(lambda t, other: flat.among_all(t, other, 0) if isinstance(t, Tensor) else t, own, first)
            for own, first in zip(split_hidden(final, self.K, len(flat.present), True), firsts, strict=True)
        ]
        return flat.restored(y), stack_hidden(finals, N, True)


def _without_steps(layer: Any, flat: Flat, given: Sequence[Any] | None) -> tuple[Tensor, Any]:
    """The result of a call in which no sequence has a step."""
    one = Sequences.of(flat.values.new_zeros(1, 1, *flat.values.shape[1:]), None, None, False)
    D = 2 if layer.bidirectional else 1
    outputs = [call.output[:0] for call in layer._calls(one, given)[-D:]]
    rows = torch.cat(outputs, 1) if D == 2 else outputs[0]
    if flat.values.is_floating_point() or flat.values.is_complex():
        rows = rows + flat.values.sum()  # in the graph of its input, as ever
    return flat.as_given(rows), stack_hidden(_first_states(layer, one, given, flat.count), flat.count, True)


def _first_states(layer: Any, sequences: Sequences, given: Sequence[Any] | None, N: int) -> list[Any]:
    """The first states of K cells for N lanes, in the form that the cells return."""
    calls = layer._calls(sequences, given)
    states = given or [layer._start(k, call, N) for k, call in enumerate(calls)]
    if any(state is None for state in states):
        raise ValueError(
            f"{type(layer).__name__}: cu_seqlens must give every sequence a step where the cell makes its first state "
            "itself: pass hx, or give the cell an initial_state(batch_size)"
        )
    return [call.whole(state, N) for call, state in zip(calls, states, strict=True)]
