"""The precision of torch.nn's layers under autocast, which its lists of operations give them.

Those lists cast what enters a product, but never float64. On a GPU a layer is one such operation, and so is oneDNN's
LSTM; others run on a CPU one operation at a time. There a simple RNN's state is made of products alone, while a gate
multiplies the state of before, so that the new one has the wider type of the two, from the initial state on.

Source: aten/src/ATen/autocast_mode.h and .cpp, aten/src/ATen/native/RNN.cpp; measured with torch 2.13 on a CPU.
"""

from __future__ import annotations

import torch

from ..cells import Cell
from .torch_layers import BY_LIBRARY

__all__ = ["autocast_dtype", "torchs_precision"]


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast casts tensors on a device to; None where it casts none."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def torchs_precision(
    cell: Cell, device: torch.device, lower: torch.dtype, state: torch.dtype, packed: bool, projection: bool
) -> tuple[torch.dtype, torch.dtype]:
    """(of y and h, of c) of the layer of torch.nn with that cell, whose tensors are not float64.

    lower: what autocast casts to. state: of the initial state, the last of (h, c), which is x's where none is given.
    """
    library = cell.mode in BY_LIBRARY and not (packed or projection) and torch._C._get_mkldnn_enabled()
    if device.type != "cpu" or not cell.gated or (library and torch.backends.mkldnn.is_available()):
        return lower, lower
    carried = torch.promote_types(lower, state)
    return lower if projection else carried, carried
