"""One step of a scan, replayed in backward.

A replay has to be the same computation: the same tensors captured by the step's closure, the same random numbers,
the same autocast. And it has to be cut off from the graph around it: the gradient of a captured tensor is an
output of the replay, not something that flows on from it.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from .forms import Form, Step, split, split_y
from .leaves import alias, differentiable
from .surroundings import GeneratorStates, Surroundings, set_generators
from .visit import Visit, unseen

__all__ = ["Replay", "differs"]


class _Substitution(TorchFunctionMode):
    """Puts other tensors in the place of the captured ones. made: notes the tensors that are made, where given."""

    def __init__(self, table: dict[int, Tensor], made: list[weakref.ref[Tensor]] | None) -> None:
        super().__init__()
        self.table, self.made = table, made

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*self._swap(args), **self._swap(kwargs or {}))
        if self.made is not None:
            self.made += [weakref.ref(t) for t in tree_leaves(result) if isinstance(t, Tensor)]
        return result

    def _swap(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.table.get(id(value), value)
        if isinstance(value, dict):
            return {key: self._swap(item) for key, item in value.items()}
        if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
            items = [self._swap(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return value


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

    def visit(self, t: int, entries: Sequence[Tensor], made: list[weakref.ref[Tensor]] | None = None) -> Visit:
        """Step t again, recorded by autograd from these carry, x, and tensors in the place of the captured ones.

        made: a list that is to hold all tensors that are made.
        """
        with torch.enable_grad():
            carry, y = self._run(t, entries, made)
            # A view, so that even a captured tensor that is returned as it is has a node of this replay before it.
            outputs = [alias(r) if r.requires_grad else r for r in (*carry, *y)]
        return Visit(list(entries), outputs, self.captured if self.opaque else ())

    def again(self, t: int, entries: Sequence[Tensor]) -> list[Tensor]:
        """The carry after step t, run again as in forward: not recorded."""
        with torch.no_grad():
            return [c.detach() for c in self._run(t, entries)[0]]

    def _run(
        self, t: int, entries: Sequence[Tensor], made: list[weakref.ref[Tensor]] | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The carry after step t, and y."""
        given = len(entries) - len(self.captured)
        table = {id(old): new for old, new in zip(self.captured, entries[given:], strict=True)}
        table |= {id(old): old.clone() for old in self.written}
        state = self.states[t]
        if state is not None:
            set_generators(state)
        received = (r.clone() if self.overwrites else r for r in entries[:given])
        with self.surroundings.entered(), _Substitution(table, made):
            carry, y = self.step(self.carry[t].join(received), self.x.join(received))
        return split(carry, self.carry[t])[0], split_y(y, self.y)[0]

    def check(self, visit: Visit) -> None:
        """Raise RuntimeError where a visit in backward uses a parameter that the forward did not."""
        for leaf in unseen(visit, self.captured)[0]:
            if isinstance(leaf, torch.nn.Parameter):
                raise RuntimeError(
                    f"step, run again for the gradient, uses a parameter {list(leaf.shape)} that it did not use in "
                    "forward: what its closure captures must still be there in backward (torch.func.functional_call "
                    "puts its tensors there only until it returns)"
                )


def differs(t: int) -> RuntimeError:
    """The error for a step that gives another result in backward."""
    return RuntimeError(
        f"step, run again in backward, gave another result at step {t}: it must depend on carry, x and captured "
        "tensors alone (captured state it changes, random numbers from another generator than torch's default, or "
        "a module switched between train and eval?)"
    )
