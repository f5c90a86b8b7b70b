"""The bytecode of a step, read once from top to bottom: which objects its names lead to, and what it changes.

No branch is followed and no loop is repeated, so that more may be found than a call reads, and rarely less.
"""

from __future__ import annotations

import builtins
import dis
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import CodeType
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import Tensor

from .objects import MUTATORS, is_plain

__all__ = ["METHOD", "PART", "Frame", "Known", "Reader", "is_class_of", "method", "owner_of"]

PART = object()
"""Stands for an unknown value that belongs to a known object: an item of a list over which a loop runs, say."""

METHOD = object()
"""Stands for a method that gives parts of a known object."""

_GIVE_PARTS = frozenset({"get", "items", "keys", "values", "__getitem__", "__iter__"})

_PASS_PARTS = (enumerate, getattr, iter, next, reversed, vars, zip)

_CHANGEABLE = (list, dict, set, deque, bytearray, np.ndarray, Tensor)

_INERT = "CACHE COPY_FREE_VARS EXTENDED_ARG MAKE_CELL NOP NOT_TAKEN PRECALL RESUME SETUP_ANNOTATIONS"

_IDLE = frozenset(_INERT.split())
"""Instructions that leave the stack alone."""


class Known(NamedTuple):
    """A value that the code reaches by a path of names, as `cell.scale`."""

    path: str
    value: Any


class Reader(Protocol):
    """What is told of the code's reads. None stands for a value that is new at each call."""

    names: set[str]

    def read_global(self, namespace: dict[str, Any], name: str) -> Known | None:
        """The value of a global or builtin variable."""
        ...

    def read_attribute(self, owner: Known, name: str, where: str) -> Known | None:
        """The value of an attribute."""
        ...

    def use(self, known: Known) -> None:
        """Receive an object that is used as a whole: computed with, passed on, tested."""
        ...

    def call(self, function: Known, args: Sequence[Known | None], keywords: Mapping[str, Known | None]) -> None:
        """Receive an object that is called, and its arguments, those after `*` left out."""
        ...

    def refuse(self, what: str, where: str) -> None:
        """Receive a change that outlives the call: "assigns to the global `n`"."""
        ...


@dataclass
class Frame:
    """A function's code with the values of its variables that are known before a call.

    local: its arguments and its own variables. free: the value of one from outside. outlives: the names of those that
    outlive the call.
    """

    code: CodeType
    namespace: dict[str, Any]
    local: dict[str, Known | None]
    free: Callable[[str], Known | None]
    outlives: frozenset[str]
    reader: Reader
    stack: list[Known | None] = field(default_factory=list)
    line: int = 0
    keywords: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """The function, its file and the line that is read."""
        return f"`{self.code.co_name}` (line {self.line} of {self.code.co_filename})"

    def read(self) -> None:
        """Tell the reader all that the code and the functions defined in it read."""
        loops = False
        for op in dis.get_instructions(self.code):
            self.line = (op.positions.lineno if op.positions else None) or self.line
            loops = loops or "BACKWARD" in op.opname
            self._follow(op)
        self._use(*self.stack)
        if loops:  # a variable that is set at the end of a loop's body may be used at its beginning
            self._use(*self.local.values())
        for inner in self.code.co_consts:
            if isinstance(inner, CodeType):
                own = set(self.code.co_cellvars)
                outlives = frozenset(inner.co_freevars) & self.outlives - own
                Frame(inner, self.namespace, {}, self._variable, outlives, self.reader).read()

    # The stack

    def _pop(self) -> Known | None:
        return self.stack.pop() if self.stack else None

    def _push(self, *values: Known | None) -> None:
        self.stack.extend(values)

    def _use(self, *values: Known | None) -> None:
        for value in values:
            if value is not None and value.value is not PART and value.value is not METHOD:
                self.reader.use(value)

    def _variable(self, name: str) -> Known | None:
        own = name in self.local or name not in self.code.co_freevars
        return self.local.get(name) if own else self.free(name)

    def _assign(self, name: str) -> None:
        self._use(self.local.get(name))
        self.local[name] = self._pop()

    def _refuse(self, what: str) -> None:
        self.reader.refuse(what, self.where)

    def _changes(self, target: Known | None, what: str) -> None:
        if target is not None and not is_plain(target.value):
            self._refuse(what.format(target.path))

    # The instructions

    def _follow(self, op: dis.Instruction) -> None:
        kind, name = op.opname, op.argval
        if kind in _IDLE or (kind.startswith("JUMP") and not kind.endswith("_POP")):
            return
        if kind == "KW_NAMES":
            self.keywords = self.code.co_consts[op.arg or 0]
        elif kind in ("LOAD_CONST", "LOAD_SMALL_INT"):
            self._push(Known(repr(name), name))
        elif kind in ("LOAD_GLOBAL", "LOAD_NAME"):
            known = self.reader.read_global(self.namespace, name)
            if known is not None and known.value is builtins.super:
                self._use(self.local.get(next(iter(self.code.co_varnames), "")))
            callee = [None] * (_effect(op) - 1)
            self._push(*([*callee, known] if sys.version_info < (3, 13) else [known, *callee]))
        elif kind in ("LOAD_ATTR", "LOAD_METHOD"):
            self._push(self._attribute(self._pop(), name), *[None] * _effect(op))
        elif kind.startswith("LOAD_FAST") or kind in ("LOAD_DEREF", "LOAD_CLASSDEREF"):
            self._push(*map(self._variable, name if isinstance(name, tuple) else (name,)))
        elif (kind.startswith("LOAD_") and _effect(op) == 1) or kind == "PUSH_NULL":
            self._push(None)
        elif kind == "IMPORT_NAME":
            del self.stack[-2:]
            self._push(Known(name.partition(".")[0], sys.modules.get(name.partition(".")[0])))
        elif kind.startswith("STORE_FAST"):
            self._store_fast(kind, name if isinstance(name, tuple) else (name,))
        elif kind == "STORE_DEREF":
            if name in self.outlives:
                self._refuse(f"assigns to the variable `{name}` of its closure")
            self._assign(name)
        elif kind in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            self._refuse(f"assigns to the global `{name}`")
        elif kind in ("STORE_ATTR", "DELETE_ATTR"):
            self._changes(self._pop(), f"sets `{{}}.{name}`")
            self._use(*([self._pop()] if kind == "STORE_ATTR" else []))
        elif kind in ("STORE_SUBSCR", "DELETE_SUBSCR", "STORE_SLICE"):
            self._use(*[self._pop() for _ in range(2 if kind == "STORE_SLICE" else 1)])
            self._changes(self._pop(), "sets an item of `{}`")
            self._use(*([] if kind == "DELETE_SUBSCR" else [self._pop()]))
        elif kind == "BINARY_SUBSCR" or (kind == "BINARY_OP" and op.argrepr == "[]"):
            key, owner = self._pop(), self._pop()
            self._use(key, owner)
            self._push(_item(owner, key))
        elif kind == "COPY":
            self._push(self.stack[-name] if name <= len(self.stack) else None)
        elif kind == "SWAP":
            self.stack[:0] = [None] * (name - len(self.stack))
            self.stack[-name], self.stack[-1] = self.stack[-1], self.stack[-name]
        elif kind in ("CALL", "CALL_KW"):
            self._call(op.arg or 0, kind == "CALL_KW")
        else:
            self._compute(op)

    def _compute(self, op: dis.Instruction) -> None:
        """Any other instruction: what it takes is used, what it gives is new, or part of what it takes."""
        if op.opname == "LOAD_SUPER_ATTR":
            self.reader.names.add(op.argval)
        inplace = op.opname == "BINARY_OP" and op.argrepr.endswith("=") and len(self.stack) > 1
        if inplace and (target := self.stack[-2]) is not None and isinstance(target.value, _CHANGEABLE):
            self._changes(target, f"changes `{{}}` by `{op.argrepr}`")
        effect = _effect(op)
        self._use(*[self._pop() for _ in range(-effect)])
        top = self._pop()
        self._use(top)
        parts = op.opname in ("GET_ITER", "FOR_ITER", "UNPACK_SEQUENCE", "UNPACK_EX")
        part = _part_of(top) if parts and top else None
        self._push(*[part] * (1 + max(effect, 0)))

    def _attribute(self, owner: Known | None, name: str) -> Known | None:
        self.reader.names.add(name)
        if owner is None:
            return None
        if owner.value is not PART:
            return self.reader.read_attribute(owner, name, self.where)
        if name in MUTATORS - {"add", "sort"}:  # which tensors have too
            self._refuse(f"calls `{owner.path}.{name}`")
        return method(owner, name)

    def _store_fast(self, kind: str, names: tuple[str, ...]) -> None:
        self._assign(names[0])
        if kind == "STORE_FAST_STORE_FAST":
            self._assign(names[1])
        elif kind == "STORE_FAST_LOAD_FAST":
            self._push(self._variable(names[1]))

    def _call(self, n: int, names_on_stack: bool) -> None:
        names = self._pop() if names_on_stack else None
        keywords = names.value if names is not None else self.keywords
        self.keywords = ()
        args = [self._pop() for _ in range(n)][::-1]
        callees = [known for known in (self._pop(), self._pop()) if known is not None]
        given = n - len(keywords)
        self._use(*args)
        for known in callees:
            if known.value is not PART and known.value is not METHOD:
                self.reader.call(known, args[:given], dict(zip(keywords, args[given:], strict=True)))
        owners = [known for known in callees if known.value is METHOD]
        if any(known.value is function for known in callees for function in _PASS_PARTS):
            owners += filter(None, args)
        one = args[0] if len(args) == 1 else None
        if one is not None and one.value is not PART and any(known.value is type for known in callees):
            self._push(Known(f"{_CLASS_OF}{one.path})", type(one.value)))
        else:
            self._push(_part_of(owners[0]) if owners else None)


def _effect(op: dis.Instruction) -> int:
    return dis.stack_effect(op.opcode, op.arg, jump=False)


def method(owner: Known, name: str) -> Known:
    """The attribute of an object whose class is not known: a method that gives parts of it, or a part."""
    return Known(f"{owner.path}.{name}", METHOD if name in _GIVE_PARTS else PART)


def _item(owner: Known | None, key: Known | None) -> Known | None:
    """The item of a known container, or a part of it where the key is new at each call."""
    if owner is None:
        return None
    if type(owner.value) in (list, tuple, dict) and key is not None and isinstance(key.value, int | str):
        try:
            return Known(f"{owner.path}[{key.value!r}]", owner.value[key.value])
        except (LookupError, TypeError):
            return None
    return _part_of(owner)


def _part_of(owner: Known) -> Known:
    path = owner.path.rpartition(".")[0] if owner.value is METHOD else owner.path
    return Known(path if path.endswith("[...]") else f"{path}[...]", PART)


_CLASS_OF = "type("


def is_class_of(known: Known) -> bool:
    """Whether a value is what `type` gave for another: where its attributes are not read, its name perhaps is."""
    return isinstance(known.value, type) and known.path.startswith(_CLASS_OF)


def owner_of(bound: Known) -> Known:
    """The object of a bound method, by its path."""
    path, dot, name = bound.path.rpartition(".")
    named = path if dot and name == bound.value.__func__.__name__ else f"{bound.path}.__self__"
    return Known(named or "self", bound.value.__self__)
