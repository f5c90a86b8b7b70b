"""Tensors that leave a step in other ways than carry and y: they have no gradient, and raise when asked for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import swap_tensors

__all__ = ["refuse_gradients"]

_WORDS = (
    "a tensor made inside the step of bptt.scan has no gradient: return it in y, and compute what depends on it from "
    "the ys that scan returns (scan runs the steps again in backward, and knows nothing of tensors that leave a step "
    "in another way, such as losses appended to a list)"
)


class _NoGradient(torch.autograd.Function):
    """A function whose values depend on its inputs in a way that is not known."""

    @staticmethod
    def forward(ctx: Any, values: Sequence[Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        raise RuntimeError(_WORDS)


def refuse_gradients(leaked: list[Tensor], inputs: Sequence[Tensor]) -> None:
    """Make tensors that steps made raise RuntimeError where their gradient in one of the inputs is asked for.

    An error, not a warning: whether a value that outlives its step is used in a loss (an auxiliary loss) or not (a
    record of activations, a cycle that waits for the garbage collector) cannot be known before, and is certain then.
    Its owner finds what a plain loop gives: a tensor that requires grad, if an input does. leaked: is emptied here.
    """
    needed = any(t.requires_grad for t in inputs)
    # The views at the end, which come first: a tensor cannot be exchanged while there are views of it.
    leaked.sort(key=lambda t: t._is_view())
    replaced = [t.detach() for t in leaked]
    if needed and leaked:
        with torch.enable_grad():
            replaced = list(_NoGradient.apply(replaced, *inputs))
    while leaked:
        t, other = leaked.pop(), replaced.pop()
        other.__dict__.update(t.__dict__)  # a name that its owner gave it, say
        try:
            swap_tensors(t, other)
        except (RuntimeError, TypeError):  # held by more than Python, as by a view that is still there
            if needed:
                t.requires_grad_().register_hook(_refuse)


def _refuse(_: Tensor) -> Tensor:
    raise RuntimeError(_WORDS)
