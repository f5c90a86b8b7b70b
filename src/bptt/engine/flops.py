"""How many floating-point operations a call takes: those of its matrix products, 2 M N K each, as torch counts.

Legend: as in `net`; rows: steps of a sequence, over all lanes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch.utils._python_dispatch import _get_current_dispatch_mode_stack as current_modes

from ..kernels import Columns, Frames
from .net import Net
from .programs import NetPrograms
from .records import Tensors, given

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


def forward_flops(net: Net, inputs: Tensors) -> int:
    """Stage 1: the input product, the recurrent product and the projection of every layer and direction."""
    products = sum(sum(net.cell.products(w)) for w in net.weights(inputs))
    return 2 * net.rows(inputs, 0, given(inputs[0]).shape[0]) * products


def backward_flops(program: NetPrograms, inputs: Tensors, needs: Iterable[bool]) -> int:
    """Stages 3 and 4, and what is run again: about twice `forward_flops` where everything is asked for and kept.

    A block sweep takes its recurrent product over the steps of all its blocks: window / every times those of the call.
    """
    net, needs = program.net, list(needs)
    cell, weights = net.cell, net.weights(inputs)
    rows, swept = net.rows(inputs, 0, given(inputs[0]).shape[0]), _swept(net, inputs)
    total = program.rerun_products(inputs)
    for k, w in enumerate(weights):
        first = 1 + cell.states + k * net.per_layer
        own = needs[first : first + net.per_layer]
        total += swept * sum(cell.products(w)[1:])
        total += rows * sum(
            own_w.numel() for (_, own_w), need in zip(w.named, own, strict=True) if need and own_w.dim() == 2
        )
        if k >= net.directions:  # what goes down to the layer below
            total += (swept if net.by_block(net.reach) else rows) * cell.input_weight(w).numel()
        elif needs[0]:
            total += rows * cell.input_weight(w).numel()
    return 2 * total


def _swept(net: Net, inputs: Tensors) -> int:
    """The steps that a sweep of one layer and direction walks, over all blocks and lanes."""
    T, B, _ = given(inputs[0]).shape
    reach = net.reach
    if reach.every is None or B == 0:
        return net.rows(inputs, 0, T)
    if net.by_block(reach):
        return int(Columns.of(reach, net.lengths, T, B, net.directions).span.sum())
    frames = Frames.of(reach, net.lengths, T, B)
    return int((frames.top - frames.start + 1).sum())
