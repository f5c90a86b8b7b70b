"""One step of a scan, replayed in backward.

A replay has to be the same computation: the same tensors captured by the step's closure, the same random numbers,
the same autocast. And it has to be cut off from the graph around it: the gradient of a captured tensor is an
output of the replay, not something that flows on from it.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from .forms import Form, Step, split, split_y
from .leaves import alias, differentiable
from .surroundings import GeneratorStates, Surroundings, set_generators
from .visit import Visit, unseen

__all__ = ["Replay"]

_Mode = TypeVar("_Mode", bound="_Substitution")


class _Substitution(TorchFunctionMode):
    """Puts other tensors in the place of the captured ones."""

    def __init__(self, table: dict[int, Tensor]) -> None:
        super().__init__()
        self.table = table

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*self._swap(args), **self._swap(kwargs or {}))

    def _swap(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.table.get(id(value), value)
        if isinstance(value, dict):
            return {key: self._swap(item) for key, item in value.items()}
        if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
            items = [self._swap(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return value


class _NotedSubstitution(_Substitution):
    """The same, and notes the tensors that were made."""

    def __init__(self, table: dict[int, Tensor]) -> None:
        super().__init__(table)
        self.made: list[weakref.ref[Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        self.made += [weakref.ref(t) for t in tree_leaves(result) if isinstance(t, Tensor)]
        return result


@dataclass(frozen=True)
class Replay:
    """All that a step needs to be run again.

    carry: the form of the carry that enters each step. x, y: the form of each x and y.
    overwrites: the step writes to its carry or x in place, and is to get copies.
    opaque: the step hands captured tensors to calls that torch function modes do not see, such as the `apply` of an
        autograd.Function or a scripted module.
    """

    step: Step
    carry: Sequence[Form]
    x: Form
    y: Form
    captured: tuple[Tensor, ...]
    written: tuple[Tensor, ...]
    states: Sequence[GeneratorStates | None]
    surroundings: Surroundings
    overwrites: bool
    opaque: bool = False

    @property
    def rounding(self) -> float:
        """The relative rounding error of the least precise type that the step is known to compute in."""
        types = {t.dtype for t in self.captured if differentiable(t)}
        types |= {dtype for enabled, dtype in self.surroundings.autocast.values() if enabled}
        return max((torch.finfo(dtype).eps for dtype in types), default=0.0)

    def visit(self, t: int, carry: Sequence[Tensor], x: Sequence[Tensor], captured: Sequence[Tensor]) -> Visit:
        """Step t again, recorded by autograd from these carry and x, with these in place of the captured tensors."""
        return self._visit(_Substitution, t, carry, x, captured)[0]

    def noted(
        self, t: int, carry: Sequence[Tensor], x: Sequence[Tensor], captured: Sequence[Tensor]
    ) -> tuple[Visit, list[weakref.ref[Tensor]]]:
        """The same, and the tensors that were made."""
        visit, mode = self._visit(_NotedSubstitution, t, carry, x, captured)
        return visit, mode.made

    def _visit(
        self, kind: type[_Mode], t: int, carry: Sequence[Tensor], x: Sequence[Tensor], captured: Sequence[Tensor]
    ) -> tuple[Visit, _Mode]:
        with torch.enable_grad():
            results, mode = self._run(kind, t, carry, x, captured)
            # A view, so that even a captured tensor that is returned as it is has a node of this replay before it.
            outputs = [alias(r) if r.requires_grad else r for r in results]
        return Visit([*carry, *x, *captured], outputs, self.captured if self.opaque else ()), mode

    def again(self, t: int, carry: Sequence[Tensor], x: Sequence[Tensor], captured: Sequence[Tensor]) -> list[Tensor]:
        """The carry after step t, run again as in forward: not recorded."""
        with torch.no_grad():
            return [c.detach() for c in self._run(_Substitution, t, carry, x, captured)[0][: len(carry)]]

    def _run(
        self, kind: type[_Mode], t: int, carry: Sequence[Tensor], x: Sequence[Tensor], captured: Sequence[Tensor]
    ) -> tuple[list[Tensor], _Mode]:
        """The carry after step t, and y; the mode that it ran under."""
        table = {id(old): new for old, new in zip(self.captured, captured, strict=True)}
        table |= {id(old): old.clone() for old in self.written}
        state = self.states[t]
        if state is not None:
            set_generators(state)
        received = [r.clone() for r in (*carry, *x)] if self.overwrites else [*carry, *x]
        mode = kind(table)
        with self.surroundings.entered(), mode:
            new_carry, y = self.step(self.carry[t].join(received[: len(carry)]), self.x.join(received[len(carry) :]))
        return [*split(new_carry, self.carry[t])[0], *split_y(y, self.y)[0]], mode

    def check(self, visit: Visit) -> None:
        """Raise RuntimeError where a visit in backward uses a parameter that the forward did not."""
        for leaf in unseen(visit, self.captured)[0]:
            if isinstance(leaf, torch.nn.Parameter):
                raise RuntimeError(
                    f"step, run again for the gradient, uses a parameter {list(leaf.shape)} that it did not use in "
                    "forward: what its closure captures must still be there in backward (torch.func.functional_call "
                    "puts its tensors there only until it returns)"
                )
