"""What torch.func's transforms and forward mode need to know of each kind of program."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from .records import Tensors

__all__ = ["RULES", "Rules"]


class Rules(Protocol):
    """What the transforms need to know of a kind of program."""

    def weights(self, program: Any) -> range:
        """The inputs that are weights. All other tensors have lanes, in the last dimension but one or the only one."""
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

    def push(self, program: Any, inputs: Tensors, tangents: Tensors) -> tuple[Tensor, ...]:
        """The tangents of the outputs from those of the inputs, None for zero, by operations that torch can record."""
        ...


RULES: dict[type, Rules] = {}
"""The rules of each kind of program that can be transformed."""
