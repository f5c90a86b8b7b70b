"""Stage 4: the parameters. One product per weight over all steps and lanes, (6.4), of factors that the cell names."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..cells import AllSteps, Cell, Weights
from ..kernels import summed_product

__all__ = ["parameter_gradients", "steps_of"]


def parameter_gradients(
    cell: Cell,
    w: Weights,
    steps: AllSteps,
    found: Sequence[Tensor | None],
    needs: Sequence[bool],
    present: Tensor | None,
) -> list[Tensor | None]:
    """The gradient of each weight of one layer and direction that needs one, in torch.nn's order.

    found: those that the kernel has, by the fields of `Weights`. needs: for each weight that there is. present: the
    rows of `[T * B]` that are steps of a sequence; None is all.
    """
    given, grads = iter(needs), list[Tensor | None]()
    for name, w_i, grad in zip(w._fields, w, (*found, *(None,) * (len(w) - len(found))), strict=True):
        if w_i is not None:
            needed = next(given)
            grads.append(None if not needed else grad if grad is not None else _summed(cell, name, steps, present))
    return grads


def _summed(cell: Cell, weight: str, steps: AllSteps, present: Tensor | None) -> Tensor:
    """The gradient of one weight."""
    errors, inputs = cell.factors(weight, steps)
    rows = None if inputs is None else steps_of(inputs, present)
    parts = [
        steps_of(e, present).sum(0) if rows is None else summed_product(steps_of(e, present), rows) for e in errors
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def steps_of(x: Tensor, present: Tensor | None) -> Tensor:
    """`[T, B, F]` -> `[rows, F]`: the rows of `[T * B]` that are steps of a sequence; None is all."""
    rows = x.flatten(0, 1)
    return rows if present is None else rows.index_select(0, present)
