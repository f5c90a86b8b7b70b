"""Settings of a layer of any cell, checked."""

from __future__ import annotations

from ..memory import Checkpoints, Memory
from ..memory import parse as parse_memory
from ..scan import KERNELS

__all__ = ["checked_kernel", "checked_memory"]


def checked_kernel(name: str) -> str:
    """The name, if it is "auto" or that of a kernel for steps, else ValueError."""
    if name not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(map(repr, KERNELS))}: got {name!r}")
    return name


def checked_memory(value: str | Checkpoints) -> Memory:
    """The tape policy, if it is one for steps, else ValueError."""
    memory = parse_memory(value)
    if memory == "gates":
        raise ValueError("memory must be 'auto', 'states' or Checkpoints: a cell of one's own has no gates")
    return memory
