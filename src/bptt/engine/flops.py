"""How many floating-point operations a call takes: those of its matrix products, 2 M N K each, as torch counts.

Legend: as in `stack`; rows: steps of a sequence, over all lanes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch.utils._python_dispatch import _get_current_dispatch_mode_stack as current_modes

from ..cells import Weights
from ..kernels import Columns, Frames, columns_at_once
from .bothways import BothWays, segments
from .boundary import Tensors, given
from .segments import Checkpointed
from .stack import Stack

__all__ = ["announce", "backward_flops", "forward_flops"]

COUNTER = "torch.utils.flop_counter"
"""Not imported here: it imports Triton where there is one."""


def announce(formulas: Mapping[Any, Callable[..., int]]) -> None:
    """Tell torch's counter of these operators, where it is loaded; and those counters that are already at work."""
    counting = sys.modules.get(COUNTER)
    if counting is None:
        return
    for operator, formula in formulas.items():
        if operator not in counting.flop_registry:
            counting.register_flop_formula(operator, get_raw=True)(formula)
    for mode in current_modes():
        counter = getattr(mode, "counter", None)
        if isinstance(counter, counting.FlopCounterMode):
            for operator in formulas:
                counter.flop_registry.setdefault(operator, counting.flop_registry[operator])


def forward_flops(stack: Stack, inputs: Tensors) -> int:
    """Stage 1: the input product, the recurrent product and the projection of every layer and direction."""
    return 2 * _rows(stack, inputs, 0, given(inputs[0]).shape[0]) * sum(map(_values, stack.weights(inputs)))


def backward_flops(program: Stack | Checkpointed | BothWays, inputs: Tensors, needs: Iterable[bool]) -> int:
    """Stages 3 and 4, and what is run again: about twice `forward_flops` where everything is asked for and kept.

    A block sweep takes its recurrent product over the steps of all its blocks: window / every times those of the call.
    """
    stack = program if isinstance(program, Stack) else program.stack
    needs, states, weights = list(needs), stack.cell.states, stack.weights(inputs)
    rows, swept = _rows(stack, inputs, 0, given(inputs[0]).shape[0]), _swept(stack, inputs)
    across = stack.layers > 1 and stack.reach.every is not None and not stack.reach.fenced
    total = 0
    for k, w in enumerate(weights):
        first = 1 + states + k * stack.per_layer
        own = needs[first : first + stack.per_layer]
        total += swept * w.hh.numel() + rows * (own[0] * w.ih.numel() + own[1] * w.hh.numel())
        if w.hr is not None:
            total += (swept + rows * own[-1]) * w.hr.numel()
        if k >= stack.directions:  # what goes down to the layer below: per block where blocks overlap
            total += (swept if across else rows) * w.ih.numel()
        elif needs[0]:
            total += rows * w.ih.numel()
    if isinstance(program, Stack):
        if stack.cell.taped_per_unit > 0 and not stack.tapes_gates(given(inputs[0]), weights):
            total += rows * sum(w.ih.numel() + w.hh.numel() for w in weights)  # the gates, the states known
        return 2 * total
    for d in range(stack.directions):
        again = sum(_rows(stack, inputs, a, b) for a, b in _again(program, inputs, d, across))
        total += again * sum(map(_values, weights[d :: stack.directions]))
    return 2 * total


def _values(w: Weights) -> int:
    return w.ih.numel() + w.hh.numel() + (0 if w.hr is None else w.hr.numel())


def _rows(stack: Stack, inputs: Tensors, a: int, b: int) -> int:
    """The steps of all sequences between a and b-1."""
    if stack.lengths is None:
        return (b - a) * given(inputs[0]).shape[1]
    return int((stack.lengths.clamp(a, b) - a).sum())


def _columns(stack: Stack, inputs: Tensors) -> Columns:
    """The columns of a block sweep through several layers."""
    T, B, _ = given(inputs[0]).shape
    return Columns.of(stack.reach, stack.lengths, T, B, stack.directions)


def _swept(stack: Stack, inputs: Tensors) -> int:
    """The steps that a sweep of one layer and direction walks, over all blocks and lanes."""
    T, B, _ = given(inputs[0]).shape
    reach = stack.reach
    if reach.every is None or B == 0:
        return _rows(stack, inputs, 0, T)
    if stack.layers > 1 and not reach.fenced:
        return int(_columns(stack, inputs).span.sum())
    frames = Frames.of(reach, stack.lengths, T, B)
    return int((frames.top - frames.start + 1).sum())


def _again(program: Checkpointed | BothWays, inputs: Tensors, d: int, across: bool) -> Iterator[tuple[int, int]]:
    """The steps that direction d runs again from its checkpoints, as (first, one behind the last)."""
    schedule, edges = program.schedule, program.edges
    parts = [schedule.backward]
    if isinstance(program, BothWays) and across:
        columns, w = _columns(program.stack, inputs), program.stack.weights(inputs)[0]
        groups = columns.groups(columns_at_once(columns.frames[0], w, sequence_fits=False))
        parts = [schedule.only(*segments(group.frames[d], edges)) for group in groups]
    for action in (action for part in parts for action in part if action.kind in "AR"):
        yield edges[action.first], edges[action.last if action.kind == "A" else action.first + 1]
