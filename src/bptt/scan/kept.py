"""Where traces are kept: with a module that their steps hold, and so no longer than it lives; else in one place."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import Any, Generic, TypeVar

from ..steps import module_in

__all__ = ["Kept"]

Entry = TypeVar("Entry")

_ATTRIBUTE = "_bptt_traces"


class _WithModule(Generic[Entry]):
    """The traces that a module holds. A copy of the module, or a pickle, has none."""

    __slots__ = ("__weakref__", "entries")

    def __init__(self) -> None:
        self.entries: OrderedDict[Hashable, list[Entry]] = OrderedDict()

    def __deepcopy__(self, memo: dict[int, Any]) -> _WithModule[Entry]:
        return _WithModule()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # what is loaded without this package too


class Kept(Generic[Entry]):
    """Lists of entries by the step and a key, the last used ones. most: how many, for each module and for the others.

    An entry holds its step, and so all that the step holds. What stands in an attribute of a module that is among this
    goes with it, when the last other reference to the module is gone: the circle is garbage.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.others: OrderedDict[Hashable, list[Entry]] = OrderedDict()

    def at(self, step: Callable[..., Any], key: Hashable) -> list[Entry]:
        """The entries of a step and a key, to which others may be added."""
        entries = self._all(step)
        found = entries.setdefault(key, [])
        with suppress(KeyError):  # another thread has made room
            entries.move_to_end(key)
        while len(entries) > self.most:
            entries.popitem(last=False)
        return found

    def clear(self) -> None:
        """Forget what no module holds."""
        self.others.clear()

    def _all(self, step: Callable[..., Any]) -> OrderedDict[Hashable, list[Entry]]:
        module = module_in(step)
        if module is None:
            return self.others
        held = vars(module).get(_ATTRIBUTE)
        if type(held) is not _WithModule:
            held = vars(module)[_ATTRIBUTE] = _WithModule()
        return held.entries
