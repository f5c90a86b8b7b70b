"""Another step of the same code: the same lambda made again, a method fetched again, with other tensors perhaps."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterable, Mapping, Set
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .objects import described, form, redescribed, same, told

__all__ = ["Copy", "LeadsBack", "Rebinding", "holds_wrapped", "is_wrapped", "module_in", "origin", "without_history"]


def origin(step: Callable[..., Any]) -> Hashable:
    """What steps of one code have in common, as a key for those that were traced: several may have it.

    >>> def make(k):
    ...     return lambda h, x: (h * k, x)
    >>> origin(make(1)) == origin(make(2)), origin(make(1)) == origin(lambda h, x: (h, x))
    (True, False)
    """
    if isinstance(step, partial):
        return origin(step.func)
    function = step.__func__ if isinstance(step, MethodType) else step
    if isinstance(function, FunctionType):
        return function.__code__
    return step if isinstance(step, Hashable) else type(step)


def module_in(step: Any, depth: int = 4) -> nn.Module | None:
    """The first module that a step holds: bound to it, in its closure or its arguments, or as a global that it names.

    >>> cell = nn.Linear(2, 2)
    >>> module_in(lambda h, x: (cell(h), x)) is cell, module_in(lambda h, x: (h, x))
    (True, None)
    """
    if isinstance(step, nn.Module):
        return step
    found = None
    if depth > 0:
        found = next((module for part in _held(step) if (module := module_in(part, depth - 1)) is not None), None)
    if found is None and isinstance(step, FunctionType):
        named = map(step.__globals__.get, step.__code__.co_names)
        found = next((value for value in named if isinstance(value, nn.Module)), None)
    return found


def is_wrapped(t: Tensor) -> bool:
    """Whether a tensor is the wrapper of a transform of torch.func, or has a tangent of `torch.autograd.forward_ad`."""
    if torch._C._functorch.is_functorch_wrapped_tensor(t):
        return True
    if getattr(forward_ad, "_current_level", 0) < 0:
        return False
    with forward_ad._set_fwd_grad_enabled(True):  # wherever a tangent is hidden
        return forward_ad.unpack_dual(t).tangent is not None


def holds_wrapped(step: Any, depth: int = 4) -> bool:
    """Whether a tensor that a step holds, itself or in a module, is wrapped in the sense of `is_wrapped`.

    >>> import torch
    >>> torch.func.grad(lambda w: float(holds_wrapped(lambda h, x: (h * w, x))) * w)(torch.tensor(2.0))
    tensor(1.)
    """
    if isinstance(step, Tensor):
        return is_wrapped(step)
    if isinstance(step, nn.Module):
        own = (t for module in step.modules() for of in (module._parameters, module._buffers) for t in of.values())
        return any(t is not None and is_wrapped(t) for t in own)
    return depth > 0 and any(holds_wrapped(part, depth - 1) for part in _held(step))


def _held(step: Any) -> Iterable[Any]:
    """What a step is made of, or some of what a container holds."""
    if isinstance(step, FunctionType):
        return map(_contents, step.__closure__ or ())
    if isinstance(step, MethodType):
        return step.__self__, step.__func__
    if isinstance(step, partial):
        return step.func, *step.args, *step.keywords.values()
    if type(step) in (list, tuple):
        return step[:_FEW]
    return islice(step.values(), _FEW) if type(step) is dict else ()


_FEW = 16
"""The items of a container that are looked at."""


def without_history(step: Callable[..., Any]) -> tuple[Callable[..., Any], dict[int, Tensor]]:
    """The step to remember: tensors of its closure that were computed stand there without what they come from.

    A trace that is kept for later calls would keep the graph of the first one, and all that this holds. Returns too the
    tensor that stands for another, by its id.
    """
    try:
        copy = Copy(_without_history)
        return copy.of(step), copy.stand_ins
    except LeadsBack:
        return step, {}


def _without_history(t: Tensor) -> Tensor | None:
    return None if t.grad_fn is None else t.detach().requires_grad_()


class LeadsBack(Exception):  # noqa: N818  the step is remembered as it is
    """A step leads back to itself, as a function does that calls itself, or goes too deep to tell."""


DEEPEST = 50
"""The functions and containers within one another that are looked into."""


@dataclass
class Copy:
    """A copy of a step in which other tensors stand for some.

    stand_in: what stands for a tensor, or None. others: what stands for an object of another kind, or None. stand_ins:
    the tensor that stands for another, by its id. made: what stands for a function or container, by its id; missing
    while that is being made.
    """

    stand_in: Callable[[Tensor], Tensor | None]
    others: Callable[[Any], Any] = lambda _: None
    stand_ins: dict[int, Tensor] = field(default_factory=dict)
    made: dict[int, Any] = field(default_factory=dict)
    depth: int = 0

    def of(self, value: Any) -> Any:
        """What stands for a value: itself where nothing in it has another in its place. Raises LeadsBack."""
        if isinstance(value, Tensor):
            if id(value) not in self.stand_ins:
                made = self.stand_in(value)
                if made is None:
                    return value
                self.stand_ins[id(value)] = made
            return self.stand_ins[id(value)]
        if not isinstance(value, (MethodType, list, tuple, partial, FunctionType)):
            return value if (other := self.others(value)) is None else other
        if id(value) in self.made:
            if self.made[id(value)] is _UNFINISHED:
                raise LeadsBack
            return self.made[id(value)]
        if self.depth == DEEPEST:
            raise LeadsBack
        self.made[id(value)] = _UNFINISHED
        self.depth += 1
        found = self._of_parts(value)
        self.depth -= 1
        self.made[id(value)] = found
        return found

    def _of_parts(self, value: Any) -> Any:
        if isinstance(value, MethodType):
            of = value.__self__ if isinstance(value.__self__, Tensor) else self.of(value.__self__)
            return value if of is value.__self__ else MethodType(value.__func__, of)
        if type(value) in (list, tuple):
            items = list(map(self.of, value))
            return value if all(map(operator.is_, items, value)) else type(value)(items)
        if isinstance(value, partial):
            held = [value.func, *value.args, *value.keywords.values()]
            others = list(map(self.of, held))
            if all(map(operator.is_, held, others)):
                return value
            function, *rest = others
            args, keywords = rest[: len(value.args)], rest[len(value.args) :]
            return partial(function, *args, **dict(zip(value.keywords, keywords, strict=True)))
        if not isinstance(value, FunctionType) or not value.__closure__:
            return value
        contents = [_contents(cell) for cell in value.__closure__]
        if any(content is value for content in contents):  # a function that calls itself
            return value
        others = list(map(self.of, contents))
        if all(map(operator.is_, contents, others)):
            return value
        cells = tuple(cell if a is b else CellType(b)
                      for cell, a, b in zip(value.__closure__, contents, others, strict=True))  # fmt: skip
        made = FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, cells)
        made.__kwdefaults__, made.__module__ = value.__kwdefaults__, value.__module__
        made.__qualname__ = value.__qualname__
        return made


_UNFINISHED = object()


@dataclass
class Rebinding:
    """A comparison of a step with the one that was traced, whose captured tensors may have been exchanged for others.

    holders: by the id of each captured tensor, the ids of all objects that hold it: it counts as exchanged only if the
    comparison has seen all of them. lanes: the ids of those with a row for each lane, whose number may be another.
    replacements: by the id of a tensor, the one in its place.
    """

    holders: Mapping[int, set[int]]
    lanes: Set[int] = frozenset()
    replacements: dict[int, Tensor] = field(default_factory=dict)
    _seen: dict[int, set[int]] = field(default_factory=dict)
    _compared: set[tuple[int, int]] = field(default_factory=set)

    def difference(self, before: Any, now: Any, path: str) -> str | None:
        """What differs between two steps, in a sentence; None where the one traced stands for the other."""
        found = self._differs(before, now, path)
        exchanged = (key for key, t in self.replacements.items() if id(t) != key)
        if found is None and any(self.holders[key] - self._seen[key] for key in exchanged):
            return f"`{path}` has another tensor in one place, and the one it had when the step was traced in another"
        return found

    def _differs(self, before: Any, now: Any, path: str) -> str | None:
        """The first difference. What lies within one another is looked into one after the other, however deep."""
        todo: list[tuple[Any, Any, str, Any]] = [(before, now, path, None)]
        while todo:
            before, now, path, holder = todo.pop()
            if isinstance(before, Tensor):
                if difference := self._tensor(before, now, path, holder):
                    return difference
                continue
            if before is now or (id(before), id(now)) in self._compared or same(before, now):
                continue
            self._compared.add((id(before), id(now)))
            parts, others = _parts(before, path), _parts(now, path)
            if type(before) is not type(now) or parts is None or others is None or parts.keys() != others.keys():
                return told(f"`{_short(path)}`", now, before)
            if isinstance(before, FunctionType) and before.__globals__ is not now.__globals__:
                return f"`{path}` is of another module than when the step was traced"
            todo += [(one, others[name][0], name, owner) for name, (one, owner) in reversed(parts.items())]
        return None

    def _tensor(self, before: Tensor, now: Any, path: str, holder: Any) -> str | None:
        key = id(before)
        self._seen.setdefault(key, set()).add(id(holder))
        rows = key in self.lanes and isinstance(now, Tensor) and now.dim() > 0 and now.is_contiguous()
        if rows and before.is_contiguous() and _of_a_row(before) == _of_a_row(now):
            pass
        elif isinstance(now, Tensor) and described(before) != described(now):
            return redescribed(f"`{path}`", described(before), described(now))
        if before is not now and (type(before) is not type(now) or key not in self.holders):
            return told(f"`{path}`", now, before)
        if self.replacements.setdefault(key, now) is not now:
            return f"`{path}` and another variable were one tensor when the step was traced, and are two"
        return None


def _of_a_row(t: Tensor) -> tuple[Any, ...]:
    """The form of a tensor, but for the number of its rows."""
    shape, *others = form(t)
    return tuple(shape[1:]), *others


def _parts(value: Any, path: str) -> dict[str, tuple[Any, Any]] | None:
    """The parts of a function or container by path, each with what holds it; None for other objects."""
    if isinstance(value, FunctionType):
        held = {
            f"{path}.__code__": (value.__code__, value),
            f"{path}.__defaults__": (value.__defaults__, value),
            f"{path}.__kwdefaults__": (value.__kwdefaults__, value),
        }
        names = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        return held | {name: (_contents(cell), cell) for name, cell in names}
    if isinstance(value, MethodType):
        return {f"{path}.__func__": (value.__func__, value), f"{path}.__self__": (value.__self__, value)}
    if isinstance(value, partial):
        return {f"{path}.{name}": (getattr(value, name), value) for name in ("func", "args", "keywords")}
    if type(value) in (list, tuple):
        return {f"{path}[{i}]": (item, value) for i, item in enumerate(value)}
    if type(value) is dict:
        return {f"{path}[{key!r}]": (item, value) for key, item in value.items()}
    return None


def _short(path: str) -> str:
    return path if len(path) <= 200 else f"{path[:100]}...{path[-80:]}"


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a variable without a value
        return CellType
