"""Who computes: the kernels, the registry, and `choose`, which `kernel="auto"` asks.

A new kernel is one file and one entry in `KERNELS`, in order of preference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..cells import Cell
from .eager import Eager as Eager
from .frames import Columns as Columns
from .frames import Frames as Frames
from .registry import Kernel as Kernel
from .registry import Request as Request
from .registry import Swept as Swept
from .registry import Tape as Tape

KERNELS: dict[str, Kernel] = {kernel.name: kernel for kernel in (Eager(),)}
"""Every kernel by name, the preferred first."""


@dataclass(frozen=True)
class Choice:
    """Which kernel runs, and why."""

    kernel: Kernel
    reason: str


def check(name: str) -> str:
    """`name` if it is "auto" or a kernel's name, else ValueError.

    >>> check("eager")
    'eager'
    """
    if name not in ("auto", *KERNELS):
        raise ValueError(f"kernel must be one of {', '.join(map(repr, ('auto', *KERNELS)))}: got {name!r}")
    return name


def choose(name: str, request: Request) -> Choice:
    """The kernel for a request. A named one runs or raises RuntimeError with its reason; only "auto" may choose."""
    if name != "auto":
        reason = KERNELS[check(name)].refuses(request)
        if reason is not None:
            raise RuntimeError(f"kernel={name!r} cannot run this layer: {reason}")
        return Choice(KERNELS[name], "named by kernel=")
    passed_over: list[str] = []
    for kernel in KERNELS.values():
        reason = kernel.refuses(request)
        if reason is None:
            why = "; ".join(passed_over) or "the most preferred of the kernels there are"
            return Choice(kernel, why)
        passed_over.append(f"{kernel.name!r} cannot: {reason}")
    raise RuntimeError(f"no kernel can run this layer: {'; '.join(passed_over)}")


class Layer(Protocol):
    """What `explain` asks of a layer: a `bptt.nn` layer has it."""

    @property
    def kernel(self) -> str: ...

    def cell(self) -> Cell: ...


def explain(layer: Layer, x: Tensor | PackedSequence) -> str:
    """Which kernel a layer would run on x, and why; raises RuntimeError where a named kernel would.

    >>> import torch, bptt
    >>> bptt.explain(bptt.nn.GRU(3, 5, kernel="eager"), torch.zeros(7, 2, 3))
    "kernel 'eager' for gru, torch.float32 on cpu: named by kernel="
    """
    data = x.data if isinstance(x, PackedSequence) else x
    cell = layer.cell()
    choice = choose(layer.kernel, Request(cell, data.device, data.dtype))
    return f"kernel {choice.kernel.name!r} for {cell.name}, {data.dtype} on {data.device}: {choice.reason}"
