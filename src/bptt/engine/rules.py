"""What torch.func's transforms and forward mode need to know of each kind of program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from ..policies import Reach
from .records import Saved, Tensors

__all__ = ["AS_ROWS", "RULES", "AsRows", "Rules", "reaches_all"]


class Rules(Protocol):
    """What the transforms need to know of a kind of program."""

    def weights(self, program: Any) -> Sequence[int]:
        """The inputs that are weights. All other tensors have lanes, in the last dimension but one or the only one."""
        ...

    def of_lanes(self, program: Any, times: int) -> Any:
        """The same program of so many times the lanes."""
        ...

    def tapes(self, program: Any) -> bool:
        """Whether what `forward` keeps is tensors with lanes, which a backward call elsewhere may use."""
        ...

    def visible(self, program: Any) -> Any:
        """The same program by operations of torch alone, which a tracer can see."""
        ...

    def sums_by_group(self, program: Any) -> bool:
        """Whether its backward call knows `Asked.lane_groups`."""
        ...

    def is_uncut(self, program: Any, x: Tensor) -> bool:
        """Whether the gradient is the full one, so that it is the transpose of the tangent."""
        ...

    def by_tangents(self, program: Any, x: Tensor) -> bool:
        """Whether gradients of its gradients are those of tangents, which `push` has faster than a recorded one."""
        ...

    def push(self, program: Any, inputs: Tensors, tangents: Tensors) -> tuple[Tensor, ...]:
        """The tangents of the outputs from those of the inputs, None for zero, by operations that torch can record."""
        ...


RULES: dict[type, Rules] = {}
"""The rules of each kind of program that can be transformed."""


class AsRows(NamedTuple):
    """A call of a program as one of another that has rules. arriving: its cotangents of the call's, which are all that
    transforms map over. leaving: the call's gradients of its.
    """

    program: Any
    saved: Saved
    arriving: Callable[[Tensors], Tensors]
    leaving: Callable[[Tensors], Tensors]


AS_ROWS: dict[type, Callable[[Any, Saved], AsRows]] = {}
"""Of programs without rules what makes a call of theirs one that can be mapped."""


def reaches_all(reach: Reach, T: int) -> bool:
    """Whether every loss of T steps reaches all steps before it."""
    one_block = reach.every is None or reach.every >= T
    reaches = reach.window is None or reach.window >= T
    return reaches and (one_block or not reach.stops_at_start)
