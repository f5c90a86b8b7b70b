"""The arguments and the results of a backward call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

__all__ = ["Asked", "Grads", "Saved", "Tensors", "given"]

Tensors = tuple[Tensor | None, ...]


class Saved(NamedTuple):
    """The tensors that a forward call saves for its backward call."""

    inputs: Tensors
    outputs: tuple[Tensor, ...]
    """At least those that the program reads."""
    tape: tuple[Tensor, ...] | None
    """What `forward` kept; or None where the gradient itself must be differentiable (double backward): then grad mode
    is on, and the tape is to be built again from the inputs by operations that autograd can record."""


class Asked(NamedTuple):
    """The request of a backward call: cotangents, and the gradients that are needed."""

    cotangents: Tensors
    """The cotangents of the outputs; None where nothing arrived."""
    needs: tuple[bool, ...]
    """Whether each input needs a gradient."""
    adjoints: bool = False
    """Whether lambda_t is wanted too, of every layer and direction."""
    lane_groups: int | None = None
    """Into how many groups of equal size the lanes are divided, in their order, where each weight's gradient is wanted
    apart for every group `[groups, ...]`; None is the sum over all lanes."""


class Grads(NamedTuple):
    """The results of a backward call."""

    inputs: Tensors
    """The gradient of every input that needs one; of others None, or what came along."""
    adjoints: Sequence[Tensor] = ()
    """lambda_t of h `[T, B, P]`, of every layer and direction in the direction's own time, at least where asked for."""


def given(tensor: Tensor | None) -> Tensor:
    """A tensor that is never None by the program's contract."""
    assert tensor is not None
    return tensor
