"""The short way of a call of a layer of any cell whose kind was met before: what the earlier one has found out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..scan.pytrees import Step
from ._forms import CellCall
from ._layered import stack_hidden
from ._sequences import Sequences

__all__ = ["MOST_KNOWN", "kind_of", "remember"]

MOST_KNOWN = 16
"""Steps and calls that a layer knows, for each of its cells."""


def kind_of(layer: Any, input: Any, others: Sequence[Any]) -> tuple[Any, ...] | None:
    """What a call of a `Recurrent` on input alone has in common with those that are alike but for values; None where
    each is to be looked at anew. others: the other arguments.
    """
    if type(input) is not Tensor or input.is_nested or any(given is not None for given in others):
        return None
    if layer.reverse or layer.bidirectional or layer._learned or (layer.dropout and layer.training):
        return None
    device = input.device
    autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
    cells = layer._modules["cells"]._modules.values()
    return (input.shape, input.dtype, device, autocast, layer.batch_first, layer.form, *map(id, cells))


def remember(
    layer: Any, kind: tuple[Any, ...] | None, sequences: Sequences, calls: Sequence[CellCall], states: Sequence[Any]
) -> None:
    """Keep what a call has found out, if the next one of its kind may go the short way."""
    if kind is None or not sequences.batched or any(state is None for state in states):
        return
    step = layer._arguments(sequences, range(len(calls)), (sequences.x,), calls, states, 0)[0]
    if len(layer._steps) >= MOST_KNOWN * len(calls):
        layer._steps.clear()
    layer._steps[kind] = _KnownCall(step, calls)


@dataclass(frozen=True, eq=False, slots=True)
class _KnownCall:
    """What a call has in common with the next of its kind: on whole sequences, from states that the cells name.

    step: of the scan, which holds the cells. calls: of each cell, which names a first state.
    """

    step: Step
    calls: Sequence[CellCall]

    def __call__(self, layer: Any, input: Tensor) -> tuple[Tensor, Any]:
        """(y, final state)."""
        x = input.transpose(0, 1) if layer.batch_first else input
        B = x.shape[1]
        carry = tuple([call.whole(call.start(B), B) for call in self.calls])  # type: ignore[misc]  # each has one
        final, (y, _) = layer._scan(self.step, carry, (x,), None, None, None)
        return y.transpose(0, 1) if layer.batch_first else y, stack_hidden(final, B, True)
