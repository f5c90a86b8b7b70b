"""Stage 4: one product per weight over all steps and lanes, (6.4), of factors that the cell names; and the gradient
of the state that a sequence restarts from at a reset.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..cells import AllSteps, Cell, Weights
from ..kernels import SweepResult, Tape, summed_product
from .net import States
from .records import given

__all__ = ["parameter_gradients", "restart_gradients", "steps_of"]


def parameter_gradients(
    cell: Cell,
    w: Weights,
    x: Tensor,
    tape: Tape,
    result: SweepResult,
    needs: Sequence[bool],
    present: Tensor | None,
) -> list[Tensor | None]:
    """The gradient of each weight of one layer and direction that needs one, in torch.nn's order.

    result: the sums over all sweeps. needs: for each weight that there is. present: the rows of `[T * B]` that are
    steps of a sequence; None is all.
    """
    asked, found, grads, steps = iter(needs), result.weights, list[Tensor | None](), None
    for i, weight in enumerate(w):
        if weight is None:
            continue
        grad = found[i] if i < len(found) else None
        if not next(asked):
            grad = None
        elif grad is None:
            steps = steps or AllSteps(x, tape, given(result.da), result.recurrent, result.adjoints)
            grad = _summed(cell, w._fields[i], steps, present)
        grads.append(grad)
    return grads


def _summed(cell: Cell, weight: str, steps: AllSteps, present: Tensor | None) -> Tensor:
    """The gradient of one weight."""
    errors, inputs = cell.factors(weight, steps)
    rows = None if inputs is None else steps_of(inputs, present)
    parts = [
        steps_of(e, present).sum(0) if rows is None else summed_product(steps_of(e, present), rows) for e in errors
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def restart_gradients(cell: Cell, w: Weights, tape: Tape, adjoints: States, present: Tensor | None) -> States:
    """The gradient of `tape.reset_state` of one layer and direction, of its shapes, in the direction's own time.

    At a reset the adjoint of the step leaves for the given state instead of the state before: one pull of the cell over
    the rows of all resets, from the sums over columns, in which it is linear. No edge factor is on that way. It is what
    the initial state would get, were the reset the first step. adjoints: of h and c. present: the rows of `[T * B]`
    that are steps of a sequence; None is all.
    """
    B = adjoints[0].shape[1]
    resets = given(tape.resets).flatten()
    rows = resets.nonzero()[:, 0] if present is None else present[resets[present]]

    def at(x: Tensor) -> Tensor:
        return x.flatten(0, 1).index_select(0, rows)

    prev = tuple(at(r) if r.dim() == 3 else r.index_select(0, rows % B) for r in tape.reset_state)
    gates = None if tape.gates is None else at(tape.gates)
    _, leaving = cell.before(tuple(map(at, adjoints)), gates, prev, tuple(map(at, tape.state)), w)
    grads = []
    for r, left in zip(tape.reset_state, leaving, strict=True):
        zeros = r.new_zeros(r.shape).flatten(0, -2)
        grads.append(zeros.index_add(0, rows if r.dim() == 3 else rows % B, left).view(r.shape))
    return tuple(grads)


def steps_of(x: Tensor, present: Tensor | None) -> Tensor:
    """`[T, B, F]` -> `[rows, F]`: the rows of `[T * B]` that are steps of a sequence; None is all."""
    rows = x.flatten(0, 1)
    return rows if present is None else rows.index_select(0, present)
