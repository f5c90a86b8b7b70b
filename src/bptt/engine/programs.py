"""The programs of a net, by what they keep for the backward call."""

from __future__ import annotations

from ..memory import Checkpoints
from .bidirectional import CheckpointedBidirectional
from .net import Net
from .records import Tensors
from .segments import Checkpointed
from .stack import Stack

__all__ = ["NetPrograms", "with_checkpoints"]

NetPrograms = Stack | Checkpointed | CheckpointedBidirectional


def with_checkpoints(net: Net, memory: Checkpoints, inputs: Tensors) -> NetPrograms:
    """The net with checkpoints for a tape; with a whole tape where that is within the budget."""
    if memory.bytes is not None and net.tape_bytes(inputs) <= memory.bytes:
        return Stack(net, "gates")
    kind = CheckpointedBidirectional if net.directions == 2 else Checkpointed
    return kind.of(net, memory, inputs)
