"""What reaches the state that a sequence restarts from at a reset."""

from __future__ import annotations

from torch import Tensor

from ..cells import Cell, Weights
from ..kernels import Tape
from .net import States
from .records import given

__all__ = ["restart_gradients"]


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
