"""A step that captures what the transforms of torch.func have wrapped, as one of tensors that no transform knows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from .rebinding import Copy, LeadsBack, is_wrapped

__all__ = ["Unwrapped", "is_mapped"]

_STAND_INS: WeakKeyDictionary[nn.Module, dict[str, nn.Parameter]] = WeakKeyDictionary()
"""Of each module the tensors that stand for its wrapped parameters and buffers: the same in each call, for a guard."""


@dataclass(eq=False)
class Unwrapped:
    """A step with other tensors in the places of wrapped ones. Use `within` as the context of whatever calls it.

    given: the tensor that each of them stands for, by its id. places: where they stand in modules.
    """

    step: Callable[..., Any]
    given: dict[int, Tensor] = field(default_factory=dict)
    places: list[tuple[dict[str, Any], str, Tensor, Tensor]] = field(default_factory=list)

    @classmethod
    def of(cls, step: Callable[..., Any], bare: Callable[[Tensor], Tensor]) -> Unwrapped | None:
        """None where the step leads back to itself. bare: the value of a wrapped tensor. Transforms are not active.

        Closures, bound arguments and containers hold the value; a parameter or buffer of a module is exchanged within
        the context alone, as `torch.func.functional_call` does it.
        """
        found = cls(step)

        def plain(t: Tensor) -> Tensor | None:
            if not is_wrapped(t):
                return None
            made = bare(t)
            made.requires_grad_(made.is_floating_point())
            found.given[id(made)] = t
            return made

        def others(value: Any) -> Any:
            if isinstance(value, nn.Module):
                found._in_module(value, copy)
            if type(value) is dict and any(isinstance(t, Tensor) and is_wrapped(t) for t in value.values()):
                return {key: copy.of(item) for key, item in value.items()}
            return None

        copy = Copy(plain, others)
        try:
            found.step = copy.of(step)
        except LeadsBack:
            return None
        return found

    def _in_module(self, module: nn.Module, copy: Copy) -> None:
        for each in module.modules():
            for own in (each._parameters, each._buffers):
                for name, t in own.items():
                    if t is None or not is_wrapped(t):
                        continue
                    if id(t) not in copy.stand_ins:
                        copy.stand_ins[id(t)] = self._stand_in(each, name, t, copy)
                    self.places.append((own, name, t, copy.stand_ins[id(t)]))

    def _stand_in(self, module: nn.Module, name: str, t: Tensor, copy: Copy) -> Tensor:
        """The tensor that stands for a module's, with its value."""
        value = copy.stand_in(t)
        assert value is not None
        del self.given[id(value)]
        known = _STAND_INS.setdefault(module, {})
        kept = known.get(name)
        if kept is None or kept.dtype != value.dtype or kept.device != value.device:
            kept = known[name] = nn.Parameter(value.detach(), requires_grad=value.requires_grad)
        kept.data = value.detach()
        self.given[id(kept)] = t
        return kept

    @contextmanager
    def within(self) -> Iterator[None]:
        """Modules have the other tensors."""
        for own, name, _, other in self.places:
            own[name] = other
        try:
            yield
        finally:
            for own, name, t, _ in self.places:
                own[name] = t

    def wrapped(self, captured: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Captured tensors as the call has them."""
        return tuple(self.given.get(id(t), t) for t in captured)

    def __call__(self, *arguments: Any) -> Any:
        with self.within():
            return self.step(*arguments)


def is_mapped(t: Tensor) -> bool:
    """Whether a vmap maps over a tensor."""
    while is_functorch_wrapped_tensor(t):
        if torch._C._functorch.is_batchedtensor(t):
            return True
        t = torch._C._functorch.get_unwrapped(t)
    return False
