"""Kinds of objects that a step may reach, by how they can change: plain values, containers, library code, draws."""

from __future__ import annotations

import array
import inspect
import logging
import mmap
import os
import random
import sys
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from enum import Enum
from functools import cache
from operator import attrgetter
from types import CodeType, FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = [
    "CONTAINERS",
    "CREATION",
    "HOOKS",
    "INTERNALS",
    "MUTATORS",
    "OPERATORS",
    "READS_VALUES",
    "REGISTRIES",
    "act",
    "bases",
    "changes",
    "computed",
    "described",
    "elsewhere",
    "foreign",
    "form",
    "in_library",
    "is_plain",
    "item_path",
    "module_of",
    "names_in_class",
    "namespaces",
    "redescribed",
    "same",
    "shown",
    "told",
    "unreadable",
    "written_array",
]

CONTAINERS = (list, tuple, dict, set, frozenset, deque)

_MUTATORS = """
add append appendleft clear discard extend extendleft insert move_to_end pop popitem popleft remove reverse rotate
setdefault sort update __setitem__ __delitem__ __iadd__ __ior__
"""

MUTATORS = frozenset(_MUTATORS.split())
"""Methods of containers that change them."""

_PLAIN = (int, float, complex, str, bytes, type(None), Enum, slice, range, type(...), np.generic, np.dtype)
_PLAIN_OF_TORCH = (torch.dtype, torch.device, torch.layout, torch.memory_format)

REGISTRIES = frozenset({"_parameters", "_buffers", "_modules"})
"""Attributes of a module that hold what it reads as its own attributes."""

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")

INTERNALS = frozenset(vars(nn.Module()))
"""Attributes that every module has."""

_VARYING = ("random", "numpy.random", "secrets", "time", "datetime", "uuid")
"""Modules whose functions give another value at each call."""

_AROUND = """
_io _locale _socket _thread asyncio.events asyncio.runners asyncio.tasks faulthandler gc genericpath getpass glob io
linecache locale mmap multiprocessing.context multiprocessing.process nt os pathlib posix pwd resource select shutil
signal socket subprocess sys tempfile threading torch.cuda.memory traceback tracemalloc
"""

_MODULES_AROUND = frozenset(_AROUND.split())
"""Modules whose functions tell of the process, its files and threads, the machine, or who calls, or act on them."""

_AROUND_IT = "tells of the process or the machine, or acts on them"


def _draws(value: Any) -> bool:
    """Whether a value is a generator of random numbers; those of NumPy by name, since asking for them loads them."""
    kind = type(value)
    own = kind.__module__.startswith("numpy.random") and kind.__name__ in ("Generator", "RandomState")
    return own or isinstance(value, torch.Generator | random.Random)


_SETTINGS = (
    torch.manual_seed, torch.seed, torch.set_rng_state, torch.cuda.manual_seed, torch.cuda.manual_seed_all,
    torch.cuda.set_rng_state, torch.set_default_dtype, torch.set_default_device, torch.set_default_tensor_type,
    torch.use_deterministic_algorithms, torch.set_float32_matmul_precision, torch.set_num_threads,
    torch.set_flush_denormal,
)  # fmt: skip
"""Functions that change torch's random generators or its settings."""


def foreign(value: Any) -> bool:
    """Whether a value is memory, or a function of C, that Python reads and writes without telling anyone."""
    own = isinstance(value, bytearray | memoryview | array.array | mmap.mmap)
    return own or any(base.__module__ == "_ctypes" for base in type(value).__mro__)


def unreadable(value: Any) -> str | None:
    """Why what an object does cannot be told from what it is; None where it can."""
    kind = type(value).__name__
    if _draws(value):
        return f"is a {kind}, whose state changes with each draw"
    if isinstance(value, torch.jit.ScriptModule | torch.jit.ScriptFunction):
        what = "module" if isinstance(value, nn.Module) else "function"
        return f"is a scripted {what}, whose code cannot be read"
    if foreign(value):
        return f"is a {kind}, which nothing compares at each call: it may be memory of any kind"
    if isinstance(value, type) and value.__module__ in _VARYING:
        return "may give another value at each call"
    if isinstance(value, type) and value.__module__ in _MODULES_AROUND and not issubclass(value, BaseException):
        return _AROUND_IT
    if hasattr(type(value), "__next__"):
        return f"is a {kind}, which gives another item each time"
    return elsewhere(value)


_WRITE_FIRST = (np.copyto, np.put, np.place, np.putmask, np.fill_diagonal, np.put_along_axis)
"""Functions of NumPy that write to their first argument."""


def written_array(function: Any, args: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
    """The argument of a function to which it writes, if that is an array; None where it writes to none."""
    if "out" in keywords:
        return keywords["out"]
    first = 0 if any(function is f for f in _WRITE_FIRST) else len(args)
    which = function.nin if isinstance(function, np.ufunc) else first
    return args[which] if which < len(args) else None


_ACTS: dict[Any, str] = {
    print: "prints",
    input: "asks for input",
    open: "opens a file",
    setattr: "sets an attribute whose name is not in the code",
    delattr: "deletes an attribute whose name is not in the code",
    globals: "reads globals whose names are not in the code",
    eval: "runs code that is not read",
    exec: "runs code that is not read",
    os.getenv: "reads the environment",
    breakpoint: "stops in a debugger",
    torch.is_grad_enabled: "asks whether gradients are recorded",
    torch.is_inference_mode_enabled: "asks whether gradients are recorded",
}
_ACTS |= dict.fromkeys((inspect.currentframe, inspect.stack, inspect.trace), "looks at the calls that lead to it")
_ACTS |= dict.fromkeys(
    (torch.initial_seed, torch.get_rng_state, torch.cuda.get_rng_state, torch.get_num_threads,
     torch.are_deterministic_algorithms_enabled, torch.get_float32_matmul_precision),
    "reads torch's settings or random generators",
)  # fmt: skip
"""Functions that do more than give a value, or more than can be read, or give one of the call alone."""


def act(function: Any) -> str | None:
    """What a function of a library does besides giving a value of its arguments; None where nothing is known of that.

    >>> act(os.getpid), act(len)
    ('tells of the process or the machine, or acts on them', None)
    """
    module = module_of(function) or ""
    if module in _VARYING or _draws(getattr(function, "__self__", None)):
        return "gives another value at each call"
    if any(function is f for f in _SETTINGS):
        return "changes torch's settings or random generators"
    return _ACTS.get(function) or elsewhere(function) or (_AROUND_IT if module in _MODULES_AROUND else None)


def elsewhere(value: Any) -> str | None:
    """What a value does or holds that is seen elsewhere than in the step; None where nothing is known of that."""
    if isinstance(value, logging.Logger | logging.LoggerAdapter):
        return "logs"
    if isinstance(value, FunctionType) and module_of(value) == "logging":
        return "logs"
    if value is os.environ:
        return "is the environment, which may change"
    if isinstance(value, ContextVar):
        return "is a ContextVar, which may have another value in each context"
    if isinstance(value, threading.local):
        return "may hold other values in each thread"
    return None


READS_VALUES = frozenset({"item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__"})
"""Methods of a tensor that give its value to Python, where nothing tells when it changes."""

CREATION = frozenset({"__init__", "__post_init__", "__new__", "forward", "backward", "setup_context"})
"""Methods that run where a class is called, or an autograd.Function applied."""

_OPERATORS = """
call getitem getattr iter len bool float int index contains enter exit neg abs eq ne lt le gt ge torch_function
add radd sub rsub mul rmul matmul rmatmul truediv rtruediv floordiv rfloordiv pow rpow mod rmod
"""

OPERATORS = frozenset(f"__{name}__" for name in _OPERATORS.split())
"""Methods that syntax calls."""


_DEEPEST = 16
"""Tuples within one another that are compared as one value; deeper ones are looked at like lists."""


def is_plain(value: Any, depth: int = _DEEPEST) -> bool:
    """Whether a value is a number, a string or such, which cannot change and can be compared.

    >>> is_plain((1, "a", None)), is_plain([1])
    (True, False)
    """
    if isinstance(value, tuple | frozenset):
        return depth > 0 and all(is_plain(item, depth - 1) for item in value)
    return isinstance(value, _PLAIN + _PLAIN_OF_TORCH)


_LIBRARIES = frozenset({"torch", "numpy", "einops", "opt_einsum"})
"""Packages, besides the standard library, whose functions keep no more than caches."""


def in_library(name: str | None) -> bool:
    """Whether a module is the standard library's or such a package's, whose code is not read."""
    name = name or ""
    root = name.partition(".")[0]
    if root == "bptt":
        # Cells and the step of `Recurrent` are steps, and examples in the docstrings here hold some.
        return not name.startswith(("bptt.nn", "bptt.steps"))
    return root in _LIBRARIES or root in sys.stdlib_module_names


def bases(kind: type, library: bool) -> Iterator[type]:
    """The classes that a class inherits from which are a library's, or which are not, object and nn.Module aside."""
    for base in kind.__mro__:
        if base not in (object, nn.Module) and in_library(base.__module__) == library:
            yield base


_CHANGE_MODULES = {"add_module", "apply", "double", "eval", "float", "half", "load_state_dict", "to", "train"}

_CHANGE_ARRAYS = {"byteswap", "fill", "itemset", "partition", "put", "resize", "setfield", "setflags", "sort"}


def changes(owner: Any, name: str) -> bool:
    """Whether a method of a container, a module or an array changes it."""
    if isinstance(owner, nn.Module):
        named = name.startswith("register_") or (name.endswith("_") and not name.startswith("_"))
        return name in _CHANGE_MODULES or (named and hasattr(nn.Module, name))
    if isinstance(owner, np.ndarray | np.ufunc):
        return name in _CHANGE_ARRAYS if isinstance(owner, np.ndarray) else name == "at"
    return isinstance(owner, CONTAINERS) and name in MUTATORS


@cache
def names_in_class(kind: type) -> frozenset[str]:
    """The names of globals and attributes in the methods of a library's class."""
    codes = [function.__code__ for function in vars(kind).values() if isinstance(function, FunctionType)]
    names: set[str] = set()
    while codes:
        code = codes.pop()
        names.update(code.co_names)
        codes.extend(inner for inner in code.co_consts if isinstance(inner, CodeType))
    return frozenset(names)


def computed(module: nn.Module) -> set[str]:
    """The attributes of a module that torch's own hooks compute before each of its calls, as a normed weight."""
    hooks = [hook for hook in module._forward_pre_hooks.values() if in_library(module_of(hook))]
    return {name for hook in hooks if isinstance(name := getattr(hook, "name", None), str)}


def namespaces(value: Any) -> Iterator[dict[str, Any]]:
    """The dictionaries of an object's own attributes."""
    own = vars(value) if hasattr(value, "__dict__") and not isinstance(value, type) else {}
    yield own
    if isinstance(value, nn.Module):
        yield from (own[name] for name in REGISTRIES if name in own)


def module_of(function: Any) -> str | None:
    """The name of the module that a function's code stands in."""
    return getattr(function, "__globals__", {}).get("__name__") or getattr(function, "__module__", None)


def item_path(path: str, key: str) -> str:
    """The path of a module's parameter, buffer or submodule, as in code: a number is one of a list.

    >>> item_path("net", "0"), item_path("net", "weight")
    ('net[0]', 'net.weight')
    """
    return f"{path}[{key}]" if key.isdigit() else f"{path}.{key}"


form = attrgetter("shape", "dtype", "requires_grad", "device")
"""What a traced step takes for granted of a tensor, besides its strides."""


def described(t: Tensor) -> tuple[tuple[Any, ...], tuple[int, ...] | None]:
    """The form and strides of a tensor: all but its values, and who it is."""
    return form(t), t.stride() if t.layout is torch.strided else None


def same(a: Any, b: Any) -> bool:
    """Whether two values are one, or are numbers, strings or such of one type and value (NaN and -0.0 told apart)."""
    if a is b:
        return True
    if type(a) is not type(b) or not is_plain(a):
        return False
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return repr(a) == repr(b) if isinstance(a, float | complex) else bool(a == b)


def shown(value: Any) -> str:
    """A plain value as in code, at most 60 characters of it; the kind of another."""
    if not is_plain(value):
        kind = type(value).__name__
        return f"{'an' if kind[:1] in 'AEIOU' else 'a'} {kind}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def told(name: str, value: Any, before: Any) -> str:
    """The sentence for a value that has changed."""
    if shown(value) == shown(before):
        return f"{name} is another {type(value).__name__} than when the step was traced"
    return f"{name} is {shown(value)}, and was {shown(before)} when the step was traced"


def redescribed(name: str, before: tuple[Any, ...], now: tuple[Any, ...]) -> str:
    """The sentence for a tensor whose description has changed."""
    words = ("shape", "dtype", "requires_grad", "device", "strides")
    pairs = zip(words, (*before[0], before[1]), (*now[0], now[1]), strict=True)
    word, old, new = next((word, a, b) for word, a, b in pairs if a != b)
    whose = f"{name[:-1]}.{word}`" if name.endswith("`") else f"the {word} of {name}"
    if word == "shape":
        old, new = tuple(old), tuple(new)
    return f"{whose} is {new}, and was {old} when the step was traced"
