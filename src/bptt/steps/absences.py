"""Names that a step's code looks up in vain, before it finds them elsewhere or nowhere: they may be set later."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field
from operator import attrgetter, contains, is_
from typing import Any

from .objects import in_library

__all__ = ["Absences", "KeptAbsences"]


@dataclass
class Absences:
    """Places where Python looks for a name and does not find it.

    An attribute of an object hides that of its class, one of a class those of the classes above, a global variable a
    builtin one; and `getattr(cell, "gain", 1.0)` asks for what may not be there. classes: the objects whose class was
    asked, and their classes.
    """

    holders: list[Container[str]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    objects: list[tuple[Any, str]] = field(default_factory=list)
    classes: list[type] = field(default_factory=list)
    _noted: set[tuple[int, str]] = field(default_factory=set)

    def note(self, owner: Any, holder: Container[str], name: str, path: str) -> None:
        """Note that a name is not in the dictionary of an object, a class or a module."""
        if (id(owner), name) not in self._noted:
            self._noted.add((id(owner), name))
            self.holders.append(holder)
            self.names.append(name)
            self.paths.append(path)

    def before(self, value: Any, name: str, path: str) -> None:
        """Note where an attribute of an object, or of a class, is not, up to the class that has it, if one has."""
        kind = value if isinstance(value, type) else type(value)
        found = next((base for base in kind.__mro__ if name in vars(base)), None)
        if value is not kind and hasattr(value, "__dict__"):
            if (id(value), "") not in self._noted:
                self._noted.add((id(value), ""))
                self.objects.append((value, path.removesuffix(f".{name}")))
                self.classes.append(kind)
            given = None if found is None else vars(found)[name]
            by_syntax = name[:2] == "__" == name[-2:]  # which asks the class alone
            if not by_syntax and not hasattr(type(given), "__set__") and name not in vars(value):
                self.note(value, vars(value), name, path)
        for base in kind.__mro__:
            if base is found:
                return
            if not in_library(base.__module__):
                self.note(base, vars(base), name, f"{base.__name__}.{name}")

    def kept(self) -> KeptAbsences:
        """All of them, to be looked at often."""
        objects = tuple(value for value, _ in self.objects)
        where = tuple(path for _, path in self.objects)
        return KeptAbsences(
            tuple(self.holders), tuple(self.names), tuple(self.paths),
            objects, where, tuple(self.classes), tuple(map(_attributes, objects)),
        )  # fmt: skip


_attributes = attrgetter("__dict__")


@dataclass(frozen=True, eq=False)
class KeptAbsences:
    """See `Absences`. where: the paths of the objects; attributes: their dictionaries, which may be exchanged whole."""

    holders: tuple[Container[str], ...]
    names: tuple[str, ...]
    paths: tuple[str, ...]
    objects: tuple[Any, ...]
    where: tuple[str, ...]
    classes: tuple[type, ...]
    attributes: tuple[dict[str, Any], ...]

    def changed(self) -> str | None:
        """What has been set since, in a sentence; None where nothing has."""
        if True in map(contains, self.holders, self.names):
            places = zip(self.holders, self.names, self.paths, strict=True)
            path = next(path for holder, name, path in places if name in holder)
            return f"`{path}` is set, and was not when the step was traced"
        if not all(map(is_, map(type, self.objects), self.classes)):
            of = zip(self.where, self.objects, self.classes, strict=True)
            where, value, kind = next(found for found in of if type(found[1]) is not found[2])
            return f"`{where}` is a {type(value).__name__}, and was a {kind.__name__} when the step was traced"
        if not all(map(is_, map(_attributes, self.objects), self.attributes)):
            of_own = zip(self.where, self.objects, self.attributes, strict=True)
            where = next(where for where, value, own in of_own if vars(value) is not own)
            return f"`{where}.__dict__` is another dict than when the step was traced"
        return None
