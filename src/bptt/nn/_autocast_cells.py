"""torch's own cells as layers under autocast on a CPU: walks of float32, whose results have autocast's precision.

Under autocast a step rounds before every product, which no compiled program of a step does. What torch's cells give is
known without it, so they are compiled as without autocast: no less exact, in the same dtypes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map_only

from ..cells import of_name
from ..kernels import autocast_dtype

__all__ = ["cells_under_autocast", "in_float32", "result_dtype"]

TORCHS = {nn.RNNCell, nn.GRUCell, nn.LSTMCell}


def result_dtype(layer: Any, input: Any, hx: Any = None, reset_state: Any = None) -> torch.dtype | None:
    """The dtype of what a `Recurrent` of torch's cells returns under autocast on a CPU; None where it is not one that
    is compiled, has other parameters than float32, or gets states of several dtypes.
    """
    data = input.data if isinstance(input, PackedSequence) else input
    if type(data) is not Tensor or not data.is_cpu or data.is_nested:
        return None
    lower = autocast_dtype(data.device)
    kinds = {type(cell) for cell in layer.cells}
    if lower is None or layer.kernel not in ("auto", "interpreter") or len(kinds) > 1 or not kinds <= TORCHS:
        return None
    if any(cell._forward_hooks or cell._forward_pre_hooks for cell in layer.cells):
        return None
    if {p.dtype for p in layer.parameters()} != {torch.float32}:
        return None
    states = {t.dtype for t in tree_leaves((hx, reset_state)) if isinstance(t, Tensor)}
    if hx is None:
        states.add(torch.float32 if layer._learned else data.dtype)
    if len(states) > 1 or not {data.dtype, *states} <= {torch.float32, torch.bfloat16, torch.float16}:
        return None
    cell = of_name(kinds.pop().__name__.removesuffix("Cell").lower())
    return torch.promote_types(lower, *states) if cell.gated else lower


def cells_under_autocast(
    layer: Any, input: Any, hx: Any, reset_state: Any, others: dict[str, Any]
) -> tuple[Tensor | PackedSequence, Any] | None:
    """(y, final state) of a `Recurrent` of torch's cells; None of another one, and where autocast casts nothing."""
    dtype = result_dtype(layer, input, hx, reset_state)
    if dtype is None:
        return None
    x, states, restarts = in_float32(input), in_float32(hx), in_float32(reset_state)
    torch.set_autocast_enabled("cpu", False)
    try:
        found = layer.forward(x, states, reset_state=restarts, **others)
    finally:
        torch.set_autocast_enabled("cpu", True)
    y, final = found
    y = y.to(dtype) if isinstance(y, Tensor) else y._replace(data=y.data.to(dtype))
    return y, tree_map_only(Tensor, lambda t: t.to(dtype), final)


def in_float32(given: Any) -> Any:
    """Sequences or states, their tensors as float32."""
    if isinstance(given, PackedSequence):
        return given._replace(data=given.data.float())
    return tree_map_only(Tensor, lambda t: t.float(), given)
