"""The place of a tensor in what a function holds, written as in the function's code: for errors."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

__all__ = ["located"]

_MOST = 10_000
"""The largest number of objects that are searched."""


def located(function: Callable[..., Any], tensor: Tensor) -> str | None:
    """The shortest path to a tensor from what a function holds, as "net.neurons[1].mem"; None where none is found.

    >>> import torch
    >>> held = {"mem": [torch.zeros(2)]}
    >>> located(lambda: held, held["mem"][0])
    "held['mem'][0]"
    """
    todo = deque(_held("", function))
    seen: set[int] = set()
    while todo and len(seen) < _MOST:
        path, value = todo.popleft()
        if value is tensor:
            return path
        if id(value) not in seen:
            seen.add(id(value))
            todo.extend(_held(path, value))
    return None


def _held(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The objects that an object holds, with the paths to them."""
    if isinstance(value, (Tensor, ModuleType, type, str, bytes)):
        return
    if isinstance(value, FunctionType):
        yield from _held_by_function(value)
    elif isinstance(value, MethodType):
        yield "self", value.__self__
        yield from _held(path, value.__func__)
    elif isinstance(value, partial):
        yield from _held(path, value.func)
        yield from ((f"{path}.args[{i}]", item) for i, item in enumerate(value.args))
        yield from value.keywords.items()
    elif isinstance(value, dict):
        yield from ((f"{path}[{key!r}]", item) for key, item in list(value.items()))
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        yield from ((f"{path}[{i}]", item) for i, item in enumerate(list(value)))
    else:
        prefix = f"{path}." if path else ""
        for name, item in list(getattr(value, "__dict__", {}).items()):
            if isinstance(value, nn.Module) and name in ("_parameters", "_buffers", "_modules"):
                inner = isinstance(value, (nn.ModuleList, nn.Sequential))
                yield from ((f"{path}[{key}]" if inner else f"{prefix}{key}", held) for key, held in item.items())
            else:
                yield prefix + name, item


def _held_by_function(function: FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # a variable that has no value yet
            continue
    names = function.__code__.co_names
    yield from ((name, function.__globals__[name]) for name in names if name in function.__globals__)
    yield from (("a default of step", value) for value in function.__defaults__ or ())
    yield from (function.__kwdefaults__ or {}).items()
