"""What a step reads besides its arguments: variables, attributes, contents of containers, tensors, by path."""

from __future__ import annotations

import builtins
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from operator import attrgetter, methodcaller
from types import BuiltinFunctionType, CellType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

import numpy as np
from torch import Tensor, nn

from .absences import Absences
from .bytecode import PART, Frame, Known, is_class_of, method, owner_of
from .objects import (
    CONTAINERS,
    CREATION,
    HOOKS,
    INTERNALS,
    OPERATORS,
    READS_VALUES,
    REGISTRIES,
    act,
    bases,
    changes,
    computed,
    elsewhere,
    in_library,
    is_plain,
    item_path,
    module_of,
    names_in_class,
    namespaces,
    unreadable,
    written_array,
)

__all__ = ["Fields", "Reads"]

_MOST = 5_000
"""The largest number of objects that are looked at, and of functions that are read."""

_LARGEST = 1000
"""The largest number of items of a container or an array that is compared at each call."""


@dataclass
class Fields:
    """Entries of one namespace that are read. values, paths: by key."""

    holder: Any
    values: dict[str, Any] = field(default_factory=dict)
    paths: dict[str, str] = field(default_factory=dict)


@dataclass
class Reads:
    """All that a step reads. Filled by `of`.

    entries: of dictionaries of attributes and globals, by the dictionary's id. attributes: what only getattr gives, as
    a variable of a closure. containers: those whose items are read; the path of a module's own ends with ".".
    obstacle: why a traced step would not do the same. names: of attributes that the code reads. by_any_name: whether it
    calls getattr or vars. holders: by the id of a tensor, those of all that hold it. computed: of modules, attributes
    that hooks of torch compute. absences: names that it looks up where they are not.
    """

    entries: dict[int, Fields] = field(default_factory=dict)
    attributes: dict[int, Fields] = field(default_factory=dict)
    containers: dict[int, Known] = field(default_factory=dict)
    tensors: dict[int, Known] = field(default_factory=dict)
    arrays: dict[int, Known] = field(default_factory=dict)
    obstacle: str | None = None
    names: set[str] = field(default_factory=set)
    by_any_name: bool = False
    holders: dict[int, set[int]] = field(default_factory=dict)
    computed: list[tuple[nn.Module, tuple[str, ...]]] = field(default_factory=list)
    absences: Absences = field(default_factory=Absences)
    _used: dict[int, Any] = field(default_factory=dict)
    _functions: dict[tuple[Any, ...], Any] = field(default_factory=dict)
    _queue: deque[Callable[[], None]] = field(default_factory=deque)

    @classmethod
    def of(cls, step: Callable[..., Any]) -> Reads:
        """What a step reads: again as long as names of attributes are found that objects before may have."""
        reads, known = cls(), -1
        while len(reads.names) + reads.by_any_name > known:
            known = len(reads.names) + reads.by_any_name
            reads = cls(names=reads.names, by_any_name=reads.by_any_name)
            reads.call(Known("step", step), (None, None), {})
            while reads._queue:
                reads._queue.popleft()()
        return reads

    # What the code tells

    def refuse(self, what: str, where: str) -> None:
        self.obstacle = self.obstacle or f"{where} {what}"

    def read_global(self, namespace: dict[str, Any], name: str) -> Known | None:
        if name in namespace:
            return self._entry(namespace, name, name, f"the global `{name}`")
        self.absences.note(namespace, namespace, name, name)
        return self._entry(vars(builtins), name, name) if name in vars(builtins) else None

    def read_attribute(self, owner: Known, name: str, where: str) -> Known | None:
        value, path = owner.value, f"{owner.path}.{name}"
        if isinstance(value, Tensor):
            self.use(owner)
            if name in READS_VALUES:
                self.refuse(f"reads the value of the tensor `{owner.path}` by `{name}`", where)
            elif name.endswith("_") and not name.startswith("_"):
                self.refuse(f"changes the tensor `{owner.path}` by `{name}`", where)
            elif name in ("grad", "_grad"):
                self.refuse(f"reads the gradient of the tensor `{owner.path}`", where)
            elif name in vars(value):
                return self._entry(vars(value), name, path)
            elif not hasattr(type(value), name):
                self.absences.before(value, name, path)
            return None
        if value is None or isinstance(value, int | float | complex | str):
            return None
        if elsewhere(value):
            self.use(owner)
        if isinstance(value, ModuleType) and in_library(value.__name__):
            return self._entry(vars(value), name, path) if name in vars(value) else None
        self.by_any_name = self.by_any_name or name == "__dict__"
        for namespace in namespaces(value):
            if name in namespace:
                return self._entry(namespace, name, path)
        if changes(value, name):
            self.refuse(f"calls `{path}`", where)
        found = self._of_class(owner, name)
        if found is None:
            self.use(owner)
            return method(owner, name)
        return found

    def call(self, function: Known, args: Sequence[Known | None], keywords: Mapping[str, Known | None]) -> None:
        self._queue.append(partial(self._call, function, args, keywords))

    def use(self, known: Known) -> None:
        if is_class_of(known):
            return  # that it is still the object's class is among `absences`
        if id(known.value) not in self._used and not is_plain(known.value) and known.value is not PART:
            self._used[id(known.value)] = known.value
            self._queue.append(partial(self._look, known))

    def _call(self, function: Known, args: Sequence[Known | None], keywords: Mapping[str, Known | None]) -> None:
        path, value = function
        given = written_array(value, args, keywords)
        if given is not None and isinstance(given.value, np.ndarray):
            self.refuse(f"writes to the array `{given.path}`", f"`{path}`")
        if isinstance(value, FunctionType):
            self._function(path, value, args, keywords)
        elif isinstance(value, MethodType):
            self.call(Known(path, value.__func__), (owner_of(function), *args), keywords)
            if in_library(module_of(value.__func__)):
                self.use(owner_of(function))
        elif isinstance(value, partial):
            self.use(function)
            first = [Known(f"{path}.args[{i}]", arg) for i, arg in enumerate(value.args)]
            named = {name: Known(name, arg) for name, arg in value.keywords.items()}
            self.call(Known(f"{path}.func", value.func), [*first, *args], {**named, **keywords})
        else:
            self.use(function)
            name = "forward" if isinstance(value, nn.Module) else "__call__"
            if (value is getattr or value is hasattr) and len(args) > 1 and args[0] and args[1]:
                asked = args[1].value
                if isinstance(asked, str) and args[0].value is not PART:
                    self.names.add(asked)
                    self.read_attribute(args[0], asked, f"`{path}`")
            if not isinstance(value, type) and (known := self._of_class(function, name)) is not None:
                self.call(known, args, keywords)

    def _look(self, known: Known) -> None:
        """Look at an object that is used as a whole."""
        path, value = known
        if len(self._used) > _MOST:
            self.refuse(f"leads to more than {_MOST} objects", f"`{path}`")
            self._queue.clear()
        elif isinstance(value, Tensor):
            self.tensors[id(value)] = known
        elif isinstance(value, np.ndarray):
            self._array(known)
        elif isinstance(value, CONTAINERS):
            self._container(known)
        elif isinstance(value, FunctionType | MethodType):
            self.call(known, (), {})
        elif isinstance(value, partial):
            self.call(known, (), {})
            self._use_all([self._attribute(value, name, f"{path}.{name}") for name in ("func", "args", "keywords")])
        elif isinstance(value, BuiltinFunctionType):
            self._builtin(known)
        elif reason := unreadable(value):
            self.refuse(reason, f"`{path}`")
        elif isinstance(value, nn.Module):
            self._module(known)
        elif isinstance(value, attrgetter | methodcaller) or value is attrgetter or value is methodcaller:
            self.by_any_name = True
        elif "__wrapped__" in next(namespaces(value)):  # a function behind functools.lru_cache, say
            self.use(Known(f"{path}.__wrapped__", value.__wrapped__))
        elif not (isinstance(value, ModuleType) and in_library(value.__name__)):
            self._by_names(known, self.names | OPERATORS)

    # Kinds of objects

    def _entry(self, namespace: Any, name: str, path: str, named: str | None = None) -> Known:
        fields = self.entries.setdefault(id(namespace), Fields(namespace))
        fields.values[name], fields.paths[name] = namespace[name], named or f"`{path}`"
        self._held(namespace, namespace[name])
        return Known(path, namespace[name])

    def _held(self, holder: Any, *values: Any) -> None:
        for value in values:
            if isinstance(value, Tensor):
                self.holders.setdefault(id(value), set()).add(id(holder))

    def _attribute(self, holder: Any, name: str, path: str) -> Known | None:
        try:
            value = getattr(holder, name)
        except (AttributeError, ValueError):  # a slot or a variable without a value
            return None
        fields = self.attributes.setdefault(id(holder), Fields(holder))
        fields.values[name], fields.paths[name] = value, f"`{path}`"
        self._held(holder, value)
        return Known(path, value)

    def _of_class(self, owner: Known, name: str) -> Known | None:
        """An attribute that an object has from its class, or one of a class."""
        value, path = owner.value, f"{owner.path}.{name}"
        bound = not isinstance(value, type)
        found = None
        self.absences.before(value, name, path)
        for base in (type(value) if bound else value).__mro__:
            if name not in vars(base):
                continue
            given = vars(base)[name]
            if isinstance(given, property | cached_property):
                getter = given.fget if isinstance(given, property) else given.func
                self.call(Known(path, getter), (owner,), {})
                if in_library(module_of(getter)):
                    self.use(owner)
                return Known(path, PART)
            if isinstance(given, staticmethod | classmethod | FunctionType):
                function = given if isinstance(given, FunctionType) else given.__func__
                if not isinstance(given, classmethod) and not in_library(base.__module__):
                    self._attribute(base, name, f"{base.__name__}.{name}")
                if isinstance(given, classmethod):
                    this: Any = MethodType(function, value if isinstance(value, type) else type(value))
                else:
                    this = MethodType(function, value) if bound and function is given else function
                if found is not None:  # a method that super() may lead to
                    self.use(Known(path, this))
                found = found or Known(path, this)
            elif found is None:
                plain = isinstance(given, MemberDescriptorType) or not hasattr(type(given), "__get__")
                return self._attribute(value, name, path) if plain else None
        return found

    def _function(
        self, path: str, function: FunctionType, args: Sequence[Known | None], keywords: Mapping[str, Known | None]
    ) -> None:
        code, owner = function.__code__, getattr(function, "__wrapped__", None)
        if owner is not None:
            self.use(Known(path, owner))
        if (what := act(function)) is not None:
            self.refuse(what, f"`{path}`")
        if in_library(module_of(function)):
            return
        given = (*args, *keywords.values())
        key = (function, *(known and id(known.value) for known in given), *keywords)
        if key in self._functions:
            return
        self._functions[key] = given  # held, so that no id is used again
        if len(self._functions) > _MOST:
            self.refuse(f"calls more than {_MOST} functions", f"`{path}`")
            return
        for name in ("__code__", "__defaults__", "__kwdefaults__"):
            self._attribute(function, name, f"{function.__name__}.{name}")
        defaults = function.__defaults__ or ()
        names = code.co_varnames[: code.co_argcount]
        local: dict[str, Known | None] = {}
        for name, value in zip(names[len(names) - len(defaults) :], defaults, strict=True):
            local[name] = Known(name, value)
        for name in function.__kwdefaults__ or {}:
            local[name] = self._entry(function.__kwdefaults__, name, name, f"the default of `{name}`")
        self._held(defaults, *defaults)
        self._use_all(local.values())
        local.update(zip(names, args, strict=False))
        local.update(keywords)
        cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
        free = partial(self._free, cells)
        Frame(code, function.__globals__, local, free, frozenset(code.co_freevars), self).read()

    def _free(self, cells: Mapping[str, CellType], name: str) -> Known | None:
        return self._attribute(cells[name], "cell_contents", name) if name in cells else None

    def _use_all(self, known: Iterable[Known | None]) -> None:
        for one in known:
            if one is not None:
                self.use(one)

    def _builtin(self, known: Known) -> None:
        """A function of C: it may belong to an object, or draw."""
        path, value = known
        owner = value.__self__
        if value is getattr or value is vars:
            self.by_any_name = True
        elif (what := act(value)) is not None:
            self.refuse(what, f"`{path}`")
        elif changes(owner, value.__name__):
            self.refuse("changes a container", f"`{path}`")
        elif owner is not None and not isinstance(owner, ModuleType):
            self.use(Known(path, owner))

    def _array(self, known: Known) -> None:
        value = known.value
        if value.dtype.hasobject or (value.size > _LARGEST and value.flags.writeable):
            self.refuse(
                f"is a NumPy array of {value.size} elements, of which at most {_LARGEST} are compared at each call: "
                "make it a tensor, or read-only by setflags(write=False)",
                f"`{known.path}`",
            )
        elif value.flags.writeable:
            self.arrays[id(value)] = known

    def _container(self, known: Known) -> None:
        path, value = known
        if len(value) > _LARGEST and not isinstance(value, tuple | frozenset):
            self.refuse(f"has {len(value)} items, and at most {_LARGEST} are compared at each call", f"`{path}`")
            return
        if not isinstance(value, tuple | frozenset):
            self.containers[id(value)] = known
        items = value.items() if isinstance(value, dict) else enumerate(value)
        self._held(value, *(value.values() if isinstance(value, dict) else value))
        self._use_all([Known(f"{path}[{key!r}]", item) for key, item in items])

    def _module(self, known: Known) -> None:
        path, module = known
        if "training" in vars(module):  # torch.compile's modules pass it on
            self._entry(vars(module), "training", f"{path}.training")
        for name in (*sorted(REGISTRIES), *HOOKS):
            held = self._entry(vars(module), name, f"{path}.{name}").value if name in vars(module) else {}
            if name in HOOKS:
                if any(not in_library(module_of(hook)) for hook in held.values()):
                    # A hook may do anything with what it reaches, which may be a whole trainer.
                    self.refuse("holds a hook", f"`{path}.{name}`")
                self.containers[id(held)] = Known(f"{path}.{name}", held)
                continue
            self.containers[id(held)] = Known(f"{path}.", held)
            self._held(held, *held.values())
            self._use_all([Known(item_path(path, key), item) for key, item in held.items()])
        self.absences.before(module, "forward", f"{path}.forward")
        self._attribute(type(module), "forward", f"{type(module).__name__}.forward")
        if made := computed(module):
            self.computed.append((module, tuple(made)))
        of_torch = frozenset().union(*map(names_in_class, bases(type(module), library=True)))
        read = (of_torch - REGISTRIES) & vars(module).keys()
        self._by_names(known, (self.names | OPERATORS | read | {"forward"}) - made)

    def _by_names(self, known: Known, names: set[str]) -> None:
        """The attributes of an object of which the code reads some, it is not told which: those of such names."""
        own = list(namespaces(known.value))
        if isinstance(known.value, type):
            own, names = [], names | CREATION
        else:
            names = names - {"__init__", "__post_init__", "__new__"}  # which super() may name, in a new object's
        if self.by_any_name:
            held = {name for name in set().union(*own) if isinstance(name, str) and name[:2] != "__"}
            names = names | (held - INTERNALS)
        methods = list(bases(known.value if isinstance(known.value, type) else type(known.value), library=False))
        for name in sorted(names):
            if any(name in namespace for namespace in own):
                found = self.read_attribute(known, name, f"`{known.path}`")
            elif any(name in vars(base) for base in methods):
                found = self._of_class(known, name)
            else:
                continue
            self._use_all([found])
