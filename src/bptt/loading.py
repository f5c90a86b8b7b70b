"""When the package's modules are loaded: a name when it is first used, everything as soon as torch is there.

`import bptt` alone loads neither torch nor what needs it, so that the command line says at once what it can say without
it. Where torch is loaded, before or after, all of the package is: a checkpoint or an exported program that torch reads
may hold what torch has to be told of first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["attribute", "once_loaded"]


def attribute(package: str, homes: Mapping[str, str], name: str) -> Any:
    """What a package's `__getattr__` (PEP 562) gives for a name: of the module that has it, kept from then on.

    homes: of each name the module of the package that has it; of a module of the package "".
    """
    if name not in homes:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    found = import_module(f"{package}.{homes[name] or name}")
    value = getattr(found, name) if homes[name] else found
    setattr(sys.modules[package], name, value)
    return value


def once_loaded(awaited: str, package: str, then: Callable[[], None]) -> None:
    """Call `then` once the module `awaited` is loaded: at once, or when somebody imports it.

    While a module of the package is being imported, it waits for that to end, since `then` imports them all.
    """
    if awaited in sys.modules:
        then()
    else:
        sys.meta_path.insert(0, _Arrival(awaited, package, then))


class _Arrival:
    """Looks on while `awaited` and the modules of the package are imported, which the other finders find."""

    def __init__(self, awaited: str, package: str, then: Callable[[], None]) -> None:
        self.awaited, self.within, self.then = awaited, f"{package}.", then
        self.importing: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.awaited and not fullname.startswith(self.within):
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find(fullname, path, target) if find else None
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Reporting(spec.loader, self)  # type: ignore[assignment]  # a loader by its methods
                return spec
        return None

    @contextmanager
    def during(self, name: str) -> Iterator[None]:
        """Around the import of a module: after it, nothing of the package may be half imported any more."""
        self.importing.add(name)
        try:
            yield
        finally:
            self.importing.discard(name)
        if self.importing or self.awaited not in sys.modules or self not in sys.meta_path:
            return
        sys.meta_path.remove(self)
        with suppress(ImportError):  # told where a name of the package is used, not where `awaited` is imported
            self.then()


class _Reporting:
    """Another loader, and word of when it is done. The module has that other one as its own."""

    def __init__(self, loader: Any, arrival: _Arrival) -> None:
        self.loader, self.arrival = loader, arrival

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        made: ModuleType | None = self.loader.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        assert spec is not None
        spec.loader = module.__loader__ = self.loader
        with self.arrival.during(spec.name):
            self.loader.exec_module(module)
