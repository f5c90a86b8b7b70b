"""Stage 4: one product per weight over all steps and lanes, (6.4), of factors that the cell names; and the gradient
of the state that a sequence restarts from at a reset.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..cells import AllSteps, Cell, TapedSteps, Weights
from ..kernels import Kernel, SummingKernel, SweepResult, Tape, summed_product
from .net import States
from .records import given

__all__ = ["parameter_gradients", "restart_gradients", "steps_of"]


def parameter_gradients(
    cell: Cell,
    w: Weights,
    x: Tensor,
    tape: TapedSteps,
    result: SweepResult,
    needs: Sequence[bool],
    present: Tensor | None,
    kernel: Kernel | None = None,
    lane_groups: int | None = None,
) -> list[Tensor | None]:
    """The gradient of each weight of one layer and direction that needs one, in torch.nn's order.

    result: the sums over all sweeps. needs: for each weight that there is. present: the rows of `[T * B]` that are
    steps of a sequence; None is all. kernel: of the sweeps, which may sum over rows too. lane_groups: see `Asked`.
    """
    there = [i for i, weight in enumerate(w) if weight is not None]
    found = dict(zip(w._fields, result.weights, strict=False))
    asked = [w._fields[i] for i, needed in zip(there, needs, strict=True) if needed]
    missing = [name for name in asked if found.get(name) is None]
    if missing:
        steps = AllSteps(x, tape, given(result.da), result.recurrent, result.adjoints)
        if lane_groups is not None:
            found |= _by_group(cell, missing, steps, present, lane_groups)
        elif isinstance(kernel, SummingKernel):
            found |= _by_kernel(kernel, cell, missing, steps, present)
        for name in missing:
            if found.get(name) is None:
                found[name] = _summed(cell, name, steps, present)
    return [found[w._fields[i]] if w._fields[i] in asked else None for i in there]


def _by_kernel(
    kernel: SummingKernel, cell: Cell, weights: Sequence[str], steps: AllSteps, present: Tensor | None
) -> dict[str, Tensor | None]:
    """The gradients of some weights, those that the kernel sums over rows; each error's rows are read once."""
    groups: dict[tuple[int, ...], tuple[States, list[tuple[str, Tensor | None]]]] = {}
    for name in weights:
        errors, inputs = cell.factors(name, steps)
        groups.setdefault(tuple(map(id, errors)), (errors, []))[1].append((name, inputs))
    found: dict[str, Tensor | None] = {}
    for errors, members in groups.values():
        factors = [inputs.flatten(0, 1) for _, inputs in members if inputs is not None]
        alone = len(factors) < len(members)
        parts = [kernel.row_sums(e.flatten(0, 1), factors, present, alone) for e in errors]
        whole = [part for part in parts if part is not None]
        if len(whole) < len(parts):
            continue
        products = iter([_joined([part[0][i] for part in whole]) for i in range(len(factors))])
        sums = [part[1] for part in whole if part[1] is not None]
        for name, inputs in members:
            # Both biases may have the same gradient, but not in the same memory: gradients are added to in place.
            found[name] = torch.cat(sums) if inputs is None else next(products)
    return found


def _joined(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _summed(cell: Cell, weight: str, steps: AllSteps, present: Tensor | None) -> Tensor:
    """The gradient of one weight."""
    errors, inputs = cell.factors(weight, steps)
    rows = None if inputs is None else steps_of(inputs, present)
    parts = [
        steps_of(e, present).sum(0) if rows is None else summed_product(steps_of(e, present), rows) for e in errors
    ]
    return _joined(parts)


def _by_group(
    cell: Cell, weights: Sequence[str], steps: AllSteps, present: Tensor | None, groups: int
) -> dict[str, Tensor | None]:
    """The gradients of some weights for each group of lanes `[groups, ...]`: one batch of products over steps."""
    found: dict[str, Tensor | None] = {}
    sums: dict[tuple[int, ...], Tensor] = {}
    for name in weights:
        errors, inputs = cell.factors(name, steps)
        parts = [_grouped(e, present, groups) for e in errors]  # [T, groups, each, F]
        if inputs is not None:
            rows = _rows(_grouped(inputs, present, groups))
            found[name] = _joined([torch.bmm(_rows(e).transpose(1, 2), rows) for e in parts], 1)
            continue
        known = sums.get(key := tuple(map(id, errors)))
        # Both biases may have the same gradient, but not in the same memory: gradients are added to in place.
        found[name] = _joined([e.sum((0, 2)) for e in parts], 1) if known is None else known.clone()
        sums[key] = given(found[name])
    return found


def _grouped(x: Tensor, present: Tensor | None, groups: int) -> Tensor:
    """`[T, B, F]` -> `[T, groups, B / groups, F]`, zero where no step of a sequence is, which may hold anything."""
    T, B, F = x.shape
    if present is not None:
        rows = x.flatten(0, 1)
        x = rows.new_zeros(T * B, F).index_copy(0, present, rows.index_select(0, present)).view(T, B, F)
    return x.reshape(T, groups, B // groups if groups else 0, F)


def _rows(x: Tensor) -> Tensor:
    """`[T, groups, each, F]` -> `[groups, T * each, F]`."""
    T, groups, each, F = x.shape
    return x.transpose(0, 1).reshape(groups, T * each, F)


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
