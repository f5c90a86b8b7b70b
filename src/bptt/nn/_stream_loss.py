"""The loss of a sequence that is read in segments: its value, its local errors, and the gradients of what it uses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..engine import refuse_tangents

__all__ = ["StreamLoss", "checked_tensors"]


class StreamLoss:
    """A loss that is a sum over segments, with what it has given so far.

    loss: a function of the slice of a segment's steps and its y. wrt: tensors that it may use. total: the sum so far;
    grads: of each of wrt.
    """

    def __init__(self, loss: Callable[[slice, Any], Tensor | None], wrt: Sequence[Tensor]) -> None:
        if not callable(loss):
            raise TypeError(f"loss must be a function of (steps, y): got {type(loss).__name__}")
        self.loss, self.wrt = loss, wrt
        self.grads = [torch.zeros_like(w) for w in wrt]
        self.total = 0.0

    def errors(
        self, steps: slice, ys: Sequence[Tensor], joined: Callable[[list[Tensor]], Any]
    ) -> Sequence[Tensor | None]:
        """dL/dy of each tensor of a segment's y `[n, ...]`; None where there is none.

        joined: the y that the loss is given. Raises TypeError where the loss gives no scalar.
        """
        with torch.enable_grad():
            leaves = [y.detach().requires_grad_(y.is_floating_point() or y.is_complex()) for y in ys]
            value = self.loss(steps, joined(leaves))
            if value is None:
                return [None] * len(leaves)
            if not isinstance(value, Tensor) or value.numel() != 1:
                got = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"loss must give a scalar tensor or None: got {got}")
            refuse_tangents("stream_gradients", (value,))  # of tensors that the loss captures
            self.total += float(value.detach())
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            if not value.requires_grad or not (wanted or self.wrt):
                return [None] * len(leaves)
            # What the loss uses may have a history that other segments go through too.
            inputs = (*wanted, *self.wrt)
            found = torch.autograd.grad(value.reshape(()), inputs, retain_graph=True, allow_unused=True)
        self.add(found[len(wanted) :])
        errors = iter(found[: len(wanted)])
        return [next(errors) if leaf.requires_grad else None for leaf in leaves]

    def add(self, grads: Iterable[Tensor | None]) -> None:
        """Add gradients of wrt, None where there is none."""
        for whole, grad in zip(self.grads, grads, strict=True):
            if grad is not None:
                whole += grad


def checked_tensors(wrt: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """The tensors whose gradients are asked for. Raises TypeError and ValueError for what can have none."""
    if isinstance(wrt, Tensor):
        raise TypeError("wrt must be an iterable of tensors: got a Tensor")
    found = tuple(wrt)
    for i, tensor in enumerate(found):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"wrt[{i}] must be a tensor: got {type(tensor).__name__}")
        if not tensor.requires_grad:
            raise ValueError(f"wrt[{i}] must require a gradient: got a tensor {list(tensor.shape)} that does not")
    refuse_tangents("stream_gradients", found)
    return found
