"""The gates of all steps that a tape does not hold, from its states, by one product over all steps: no walk."""

from __future__ import annotations

from torch import Tensor

from ..cells import Cell, Weights
from ..kernels import computed_in

__all__ = ["rebuilt_gates"]

REBUILD_VALUES = 2**20
"""The number of gate values that are rebuilt at a time: enough for one product to be large."""


def rebuilt_gates(cell: Cell, w: Weights, x: Tensor, h: Tensor, present: Tensor | None) -> Tensor:
    """The gates `[N, F]` of steps from their input `[N, I]` and the state h before them `[N, P]`, a few at a time to
    bound what that needs besides.

    What a CPU stores as bfloat16 is multiplied as float32, as `kernels.product` does.
    present: the rows that are steps of a sequence, the gates of all others are zero; None is all.
    """
    N, count = len(x), len(x) if present is None else len(present)
    gates = (x.new_empty if present is None else x.new_zeros)(N, cell.taped(w))
    at_once = max(1, REBUILD_VALUES // cell.taped(w))
    dtype = computed_in(x.dtype) if x.is_cpu else x.dtype
    w = w.to(dtype)
    for i in range(0, count, at_once):
        rows: slice | Tensor = slice(i, i + at_once) if present is None else present[i : i + at_once]
        gates[rows] = cell.gates(cell.project(x[rows].to(dtype), w), h[rows].to(dtype), w).to(x.dtype)
    return gates
