"""Random numbers that a step draws: noted while it is recorded, and drawn for all steps before they run.

A loop draws in the order of its steps, and within a step in the order of its code. Where no draw depends on the carry,
all of them can be made in that order before anything else is computed: torch's generators then give the same numbers
as in the loop, and are left in the same state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Draw", "Filling", "constant_arguments", "draw_all", "filling", "memory_order", "normal_parts"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Filling:
    """What fills a tensor with random numbers: a method of torch.Tensor, as `uniform_` in `torch.rand`."""

    method: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Draw:
    """A draw of a step: a tensor `[rows * R, ...]` for R lanes, and what fills it.

    by: the value of the step's graph whose elements are the first argument: one probability for each number. at: which
    of its dimensions the step has the rows in. order: its dimensions as they lie in memory, the outermost first, in
    which order numbers may be drawn.
    """

    filling: Filling
    rows: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    by: str | None = None
    at: int = 0
    order: tuple[int, ...] = ()

    def empty(self, T: int, B: int) -> Tensor:
        """A tensor for the numbers of T steps and B lanes, each step's as the step itself has them."""
        sizes = [*self.shape[: self.at], B * self.rows, *self.shape[self.at :]]
        made = torch.empty(T, *[sizes[d] for d in self.order], dtype=self.dtype, device=self.device)
        return made.permute(0, *[1 + self.order.index(d) for d in range(len(sizes))])


def memory_order(t: Tensor) -> tuple[int, ...] | None:
    """The dimensions of a tensor as they lie in memory, the outermost first; None where its memory has gaps."""
    order = range(t.dim()) if t.is_contiguous() else sorted(range(t.dim()), key=t.stride, reverse=True)
    return tuple(order) if t.permute(*order).is_contiguous() else None


def draw_all(
    draws: Sequence[Draw],
    T: int,
    B: int,
    probabilities: Mapping[str, Tensor],
    before: Callable[[int], None] | None = None,
) -> list[Tensor]:
    """The numbers `[T, B * rows, ...]` that T steps of B lanes draw, in the order of a loop.

    probabilities: `[T, B * rows, ...]`, by name (see `Draw.by`). before: called with t before step t draws.
    """
    numbers = [draw.empty(T, B) for draw in draws]
    fills = [
        (getattr(Tensor, d.filling.method), n.unbind(), [d.filling.arguments] * T if d.by is None
         else [(p, *d.filling.arguments) for p in probabilities[d.by].unbind()])
        for d, n in zip(draws, numbers, strict=True)
    ]  # fmt: skip
    for t in range(T):
        if before is not None:
            before(t)
        for fill, steps, arguments in fills:
            fill(steps[t], *arguments[t])
    return [n.movedim(1 + draw.at, 1).contiguous() for draw, n in zip(draws, numbers, strict=True)]


_METHODS: dict[Any, str] = {
    getattr(getattr(aten, f"{name}_"), overload): f"{name}_"
    for name, overload in {
        "uniform": "default",
        "normal": "default",
        "exponential": "default",
        "cauchy": "default",
        "log_normal": "default",
        "geometric": "default",
        "bernoulli": "float",
    }.items()
} | {aten.random_.default: "random_", aten.random_.to: "random_", getattr(aten.random_, "from"): "random_"}
"""Operations that fill the tensor that they are given."""


def filling(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Filling, bool, Tensor | None] | None:
    """(what fills the tensor that an operation draws, whether that is its first argument, a probability for each of its
    numbers or None); None where it is unknown.
    """
    if func is aten.bernoulli.default:
        return Filling("bernoulli_", ()), False, args[0]
    if func is aten.bernoulli_.Tensor:
        return (Filling("bernoulli_", ()), True, args[1]) if args[0].shape == args[1].shape else None
    found = _of_numbers(func, args, kwargs)
    return None if found is None else (*found, None)


def _of_numbers(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Filling, bool] | None:
    """What `filling` says of draws whose arguments are numbers, or tensors of which only the shape counts."""
    if any(isinstance(v, Tensor) for v in (*args[1:], *kwargs.values())):
        return None
    named = {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | kwargs
    packet = func.overloadpacket
    if packet in (aten.rand, aten.rand_like):
        return Filling("uniform_", (0.0, 1.0)), False
    if packet in (aten.randn, aten.randn_like):
        return Filling("normal_", (0.0, 1.0)), False
    if packet in (aten.randint, aten.randint_like):
        return Filling("random_", (named.get("low", 0), named["high"])), False
    if func is aten.normal.float_float:
        return Filling("normal_", (named["mean"], named.get("std", 1.0))), False
    if func is aten.bernoulli.p:
        return Filling("bernoulli_", (named["p"],)), False
    method = _METHODS.get(func)
    if method is None:
        return None
    given = tuple(args[1:])
    given += tuple(kwargs[a.name] for a in func._schema.arguments[1 + len(given) :] if a.name in kwargs)
    return Filling(method, tuple(v for v in given if not isinstance(v, torch.Generator))), True


_PROBABILITIES: dict[Any, int] = {
    torch.bernoulli: 0, Tensor.bernoulli: 0, Tensor.bernoulli_: 1, torch.normal: 0,
}  # fmt: skip
"""Functions by whose arguments, from this one on, numbers are drawn."""


def constant_arguments(func: Any, args: Sequence[Any]) -> Sequence[Any]:
    """The arguments of a function of torch, without the history of probabilities: their gradient would be zero."""
    first = _PROBABILITIES.get(func)
    if first is None:
        return args
    return [a.detach() if isinstance(a, Tensor) and i >= first else a for i, a in enumerate(args)]


def normal_parts(func: Any, args: Sequence[Any]) -> tuple[Any, Any, list[int], Tensor] | None:
    """(mean, deviation, size, a tensor of its kind) of a normal draw about tensors: `mean + deviation * noise`."""
    if func not in (aten.normal.Tensor_float, aten.normal.float_Tensor, aten.normal.Tensor_Tensor):
        return None
    mean, std = args[0], args[1] if len(args) > 1 else 1.0
    tensors = [t for t in (mean, std) if isinstance(t, Tensor)]
    return mean, std, list(torch.broadcast_shapes(*(t.shape for t in tensors))), tensors[0]
