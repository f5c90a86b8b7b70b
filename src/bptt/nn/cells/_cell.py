"""What the cells have in common: sizes, parameters, the first state, and checks that look at shapes alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

__all__ = ["NONLINEARITIES", "CellModule", "State", "one_of", "positive"]

State: TypeAlias = Tensor | tuple[Tensor, ...]
"""A tensor `[B, H]`, or a tuple of several; without the B for a single row."""

NONLINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": torch.nn.functional.softplus,
}


class CellModule(torch.nn.Module):
    """The base class of the cells: one step of a recurrence as a module.

    It makes `weight_ih` [gates * H, I], `weight_hh` [gates * H, H] and `bias` [gates * H], or None without one.
    """

    states: ClassVar[tuple[str, ...]] = ("h",)
    """The names of the tensors that the state consists of."""
    options: ClassVar[tuple[str, ...]] = ()
    """The attributes that `repr` shows."""

    weight_ih: Tensor
    weight_hh: Tensor
    bias: Tensor | None

    def __init__(self, input_size: int, hidden_size: int, bias: bool, gates: int, device: Any, dtype: Any) -> None:
        super().__init__()
        self.input_size = positive("input_size", input_size)
        self.hidden_size = positive("hidden_size", hidden_size)
        rows = gates * hidden_size
        self.weight_ih = torch.nn.Parameter(torch.empty(rows, input_size, device=device, dtype=dtype))
        self._add("weight_hh", rows, hidden_size)
        self._add("bias", rows, wanted=bias)

    def _add(self, name: str, *shape: int, wanted: bool = True) -> None:
        parameter = torch.nn.Parameter(self.weight_ih.new_empty(shape)) if wanted else None
        self.register_parameter(name, parameter)

    def reset_parameters(self) -> None:
        """Draw every parameter anew from U(-1 / sqrt(H), 1 / sqrt(H)), as torch.nn's cells do, but for a cell's own."""
        bound = self.hidden_size**-0.5
        for parameter in self.parameters():
            torch.nn.init.uniform_(parameter, -bound, bound)

    def initial_state(self, batch_size: int | None = None) -> State:
        """The first state: zeros `[batch_size, H]`, or `[H]` for a single row; a tuple where there are several."""
        rows = () if batch_size is None else (batch_size,)
        zeros = tuple(self.weight_ih.new_zeros((*rows, self.hidden_size)) for _ in self.states)
        return zeros if len(zeros) > 1 else zeros[0]

    def extra_repr(self) -> str:
        sizes = [str(self.input_size), str(self.hidden_size), *([] if self.bias is not None else ["bias=False"])]
        return ", ".join([*sizes, *(f"{name}={getattr(self, name)!r}" for name in self.options)])

    def _entering(self, input: Tensor, hx: State | None) -> tuple[Tensor, ...]:
        """The states that enter the step, one tensor each: those of hx, or the first ones where it is None."""
        name, I, H = type(self).__name__, self.input_size, self.hidden_size
        if input.dim() not in (1, 2) or input.shape[-1] != I:
            fits = f"[B, {I}] or [{I}], as input_size={I} says"
            raise ValueError(f"{name}: input must be {fits}: got shape {tuple(input.shape)}")
        if hx is None:
            hx = self.initial_state(input.shape[0] if input.dim() == 2 else None)
        single = isinstance(hx, Tensor)
        states = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        if single != (len(self.states) == 1) or len(states) != len(self.states):
            expected = "one tensor" if len(self.states) == 1 else f"a tuple of {len(self.states)} tensors"
            got = "one tensor" if single else f"{len(states)} of them"
            raise ValueError(f"{name}: the state must be {expected} ({', '.join(self.states)}): got {got}")
        for which, state in zip(self.states, states, strict=True):
            if state.dim() not in (1, 2) or state.shape[-1] != H:
                shape = tuple(state.shape)
                raise ValueError(
                    f"{name}: {which} must be [B, {H}] or [{H}], as hidden_size={H} says: got shape {shape}"
                )
        return states


def positive(name: str, value: Any) -> Any:
    """The value, if it is above 0."""
    if not value > 0:
        raise ValueError(f"{name} must be above 0: got {value!r}")
    return value


def one_of(name: str, value: str, *choices: str) -> str:
    """The value, if it is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}: got {value!r}")
    return value
