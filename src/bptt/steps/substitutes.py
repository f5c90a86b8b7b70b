"""Substitutes for what a traced step captures: leaves of their own, and as many rows as the trace has."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from .draws import constant_arguments
from .one_row import CELLS, leaf
from .recorder import Recorder

__all__ = ["Seen", "Substitutes", "repeated"]


@dataclass
class Seen:
    """The captured tensors that a trace has met, whether or not it came to its end."""

    captured: list[Tensor] = field(default_factory=list)


_READS = {Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.data_ptr, Tensor.__dlpack__, Tensor.untyped_storage}
"""Functions by which Python sees the memory of a tensor, where no dispatcher does."""


class Substitutes(TorchFunctionMode):
    """A function mode that replaces captured tensors with a gradient by leaves of their own, without their history and
    hooks, and those of `lanes` by ones with R rows.

    one_row: the step is mapped over its rows.
    """

    def __init__(self, recorder: Recorder, lanes: frozenset[int], R: int, seen: Seen) -> None:
        super().__init__()
        self.recorder, self.lanes, self.R, self.seen = recorder, lanes, R, seen
        self.one_row = False
        self.inside: dict[int, Tensor] = {}
        self.table: dict[int, tuple[Tensor, Tensor]] = {}
        self.back: dict[int, Tensor] = {}

    def made_for(self, substitute: Tensor) -> Tensor | None:
        """The captured tensor that a substitute stands for."""
        return self.back.get(id(substitute))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS:
            raise self.recorder.refused(f"its Python code reads a value of a tensor ({func.__name__})")
        if self.one_row:
            func = CELLS.get(getattr(func, "__name__", ""), func)
        args, kwargs = self._swapped(args), self._swapped(kwargs or {})
        result = func(*constant_arguments(func, args), **kwargs)
        self.note(result)
        return result

    def note(self, value: Any) -> None:
        """Note that tensors were made inside."""
        if isinstance(value, Tensor):
            self.inside[id(value)] = value
        elif isinstance(value, (tuple, list)):
            for item in value:
                self.note(item)
        elif isinstance(value, dict):
            for item in value.values():
                self.note(item)

    def _swapped(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._substitute(value)
        if isinstance(value, dict):
            return {key: self._swapped(item) for key, item in value.items()}
        if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
            items = [self._swapped(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return value

    def _substitute(self, t: Tensor) -> Tensor:
        if self.inside.get(id(t)) is t or self.recorder.knows(t):
            return t
        if t.requires_grad and not torch.is_grad_enabled():
            return t  # inside of a custom function: its gradient is that of the tensor which was handed over
        known = self.table.get(id(t))
        if known is not None and known[0] is t:
            return known[1]
        made = t
        with _disable_current_modes(), torch.no_grad():
            if id(t) in self.lanes:
                made = repeated(t, self.R)
            elif t.requires_grad:
                made = t.detach().clone()
        if made is not t:
            with _disable_current_modes():
                made = leaf(made, t.requires_grad)
            self.back[id(made)] = t
        self.table[id(t)] = t, made
        self.seen.captured.append(t)
        self.inside[id(made)] = made
        return made


def repeated(t: Tensor, R: int) -> Tensor:
    """R rows of a tensor, again from the first one after the last."""
    return t.detach()[torch.arange(R, device=t.device) % len(t)].clone()
