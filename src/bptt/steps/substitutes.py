"""Substitutes for what a traced step captures: leaves of their own, and as many rows as the trace has."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from .draws import constant_arguments
from .objects import in_library
from .one_row import CELLS, leaf
from .recorder import Recorder

__all__ = ["Seen", "Substitutes", "counts_rows", "repeated"]


@dataclass
class Seen:
    """The captured tensors that a trace has met, whether or not it came to its end.

    B: the number of lanes. at_fault: the ids of those with as many rows that did not fit the rows of a trace.
    """

    B: int
    captured: list[Tensor] = field(default_factory=list)
    at_fault: set[int] = field(default_factory=set)

    def may_have_lanes(self, t: Tensor) -> bool:
        """Whether a captured tensor may have a row for each lane."""
        return t.dim() > 0 and len(t) == self.B


_READS = {Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.data_ptr, Tensor.__dlpack__, Tensor.untyped_storage}
"""Functions by which Python sees the memory of a tensor, where no dispatcher does."""


_HISTORY: dict[Any, str] = {
    getattr(Tensor, name).__get__: name
    for name in ("_version", "_base", "_cdata", "output_nr", "grad_fn", "is_leaf", "retains_grad", "_backward_hooks")
} | {Tensor._is_view: "_is_view", Tensor.is_inference: "is_inference"}
"""What tells how a tensor came to be, which is otherwise in a trace."""

_ASKS_FOR_GRADIENT: Any = Tensor.requires_grad.__get__  # type: ignore[attr-defined]  # a property of the class


def _one_hot(tensor: Tensor, num_classes: int = -1) -> Tensor:
    """What torch's own gives, where the number of classes is given: that one looks at values to check them."""
    if num_classes <= 0 or tensor.dtype != torch.int64:
        return torch.nn.functional.one_hot(tensor, num_classes)
    return tensor.new_zeros(*tensor.shape, num_classes).scatter(-1, tensor.unsqueeze(-1), 1)


_REPLACED: dict[Any, Any] = {torch.nn.functional.one_hot: _one_hot}
"""Functions that read values, and what does the same without."""

_CLASSES = (Tensor, torch.nn.Parameter)


class Substitutes(TorchFunctionMode):
    """A function mode that replaces captured tensors with a gradient by leaves of their own, without their history and
    hooks, and those of `lanes` by ones with R rows.

    one_row: the step is mapped over its rows. given: the tensors of carry and x that the step is given. asks: its code
    asks whether a tensor that it is given or makes has a gradient. sources: of a tensor made of captured ones alone,
    the ids of those of them that may have a row for each lane.
    """

    def __init__(self, recorder: Recorder, lanes: frozenset[int], R: int, seen: Seen) -> None:
        super().__init__()
        self.recorder, self.lanes, self.R, self.seen = recorder, lanes, R, seen
        self.one_row = self.asks = False
        self.given: list[Tensor] = []
        self.inside: dict[int, Tensor] = {}
        self.table: dict[int, tuple[Tensor, Tensor]] = {}
        self.back: dict[int, Tensor] = {}
        self.sources: dict[int, frozenset[int]] = {}

    @property
    def written_to(self) -> bool:
        """Whether the step has written to what it was given."""
        return any(t._version > 0 for t in self.given)

    def made_for(self, substitute: Tensor) -> Tensor | None:
        """The captured tensor that a substitute stands for."""
        return self.back.get(id(substitute))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS:
            raise self.recorder.refused(f"its Python code reads a value of a tensor ({func.__name__})")
        if func == _ASKS_FOR_GRADIENT or func in _HISTORY:
            self._asked(func, args[0], sys._getframe(1).f_globals.get("__name__"))
            return func(*args)
        if self.one_row:
            func = CELLS.get(getattr(func, "__name__", ""), func)
        func = _REPLACED.get(func, func)
        args, kwargs = self._swapped(args), self._swapped(kwargs or {})
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        try:
            result = func(*constant_arguments(func, args), **kwargs)
        except (RuntimeError, IndexError, ValueError):
            self.blame(tensors)
            raise
        self.note(result)
        if all(id(t) in self.sources for t in tensors):
            sources = frozenset[int]().union(*(self.sources[id(t)] for t in tensors))
            self.sources |= {id(t): sources for t in tree_leaves(result) if isinstance(t, Tensor)}
        return result

    def _asked(self, func: Any, of: Tensor, module: str | None) -> None:
        """Note that code asks for a tensor's history, if it is not a library's, which does so for its own ends."""
        if in_library(module):
            return
        if func != _ASKS_FOR_GRADIENT:
            raise self.recorder.refused(f"its Python code asks by `{_HISTORY[func]}` how a tensor came to be")
        inside = self.inside.get(id(of)) is of or self.recorder.knows(of)
        if inside and self.one_row:
            raise self.recorder.refused("its Python code asks by `requires_grad` whether gradients are recorded")
        self.asks = self.asks or inside  # of a captured tensor, it is compared at each call

    def blame(self, tensors: Sequence[Tensor]) -> None:
        """Note the captured tensors of which those are made alone that did not fit, if they may have lanes.

        By what is done with it, a matrix of weights is told from a tensor with a row for each lane; and a parameter is
        taken for one where there is nothing else.
        """
        made_of = [self.sources.get(id(t), self.lanes) for t in tensors]
        found = set[int]().union(*(sources for sources in made_of if not sources & self.lanes))
        parameters = {id(t) for t in self.seen.captured if isinstance(t, torch.nn.Parameter)}
        self.seen.at_fault |= found - parameters or found

    def note(self, value: Any) -> None:
        """Note that tensors were made inside."""
        if isinstance(value, Tensor):
            self._check_class(value)
            self.inside[id(value)] = value
        elif isinstance(value, (tuple, list)):
            for item in value:
                self.note(item)
        elif isinstance(value, dict):
            for item in value.values():
                self.note(item)

    def _check_class(self, t: Tensor) -> None:
        """Raise NotTraceable for a tensor whose class may have operations of its own."""
        if type(t) not in _CLASSES:
            name = type(t).__name__
            raise self.recorder.refused(f"it uses a tensor of another class than torch.Tensor ({name})")

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
        if self.inside.get(id(t)) is t or self.recorder.knows(t) or is_functorch_wrapped_tensor(t):
            return t
        self._check_class(t)
        if torch._C._functorch.is_functorch_wrapped_tensor(t):
            raise self.recorder.refused("it captures a tensor that a transform of torch.func has wrapped")
        if t.requires_grad and not torch.is_grad_enabled():
            return t  # inside of a custom function: its gradient is that of the tensor which was handed over
        known = self.table.get(id(t))
        if known is not None and known[0] is t:
            return known[1]
        made = t
        with _disable_current_modes(), temporarily_clear_interpreter_stack(), torch.no_grad():
            counting = id(t) in self.lanes and counts_rows(t, self.seen.B)
            if counting:
                made = torch.arange(self.R, device=t.device)
            elif id(t) in self.lanes:
                made = repeated(t, self.R)
            elif t.requires_grad or t.is_inference():
                made = t.detach().clone()
        if made is not t:
            with _disable_current_modes(), temporarily_clear_interpreter_stack():
                made = leaf(made, t.requires_grad)
            self.back[id(made)] = t
            if counting:
                self.recorder.node(made).meta["counting"] = True
        self.table[id(t)] = t, made
        self.sources[id(made)] = frozenset([id(t)] if self.seen.may_have_lanes(t) else [])
        self.seen.captured.append(t)
        self.inside[id(made)] = made
        return made


def counts_rows(t: Tensor, B: int) -> bool:
    """Whether a tensor is `torch.arange(B)`: the numbers of the rows, by which one element of each is taken."""
    if t.dtype != torch.int64 or t.shape != (B,):
        return False
    return torch.equal(t, torch.arange(B, device=t.device))


def _name(func: Any) -> str:
    return getattr(func, "__name__", str(func))


def repeated(t: Tensor, R: int) -> Tensor:
    """R rows of a tensor, again from the first one after the last."""
    return t.detach()[torch.arange(R, device=t.device) % len(t)].clone()
