"""What griffe must be told about this package's source before mkdocstrings makes the reference of it."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Module, Object

_EXAMPLE = re.compile(r"(?:^ *>>> .*(?:\n(?! *$).*)*\n?)+", re.MULTILINE)


class Doctests(Extension):
    """Puts a fence around every example and its output: without one Markdown takes `>>>` for a quotation."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        """Called for every object that was read."""
        if obj.docstring is not None:
            obj.docstring.value = _EXAMPLE.sub(
                lambda found: "```pycon\n" + found[0].rstrip() + "\n```\n", obj.docstring.value
            )


class Face(Extension):
    """Makes public what a package imports `as` itself, which griffe by itself takes for private."""

    def on_module_members(self, *, mod: Module, **_: Any) -> None:
        """Called for every module, once its members are known."""
        if mod.is_init_module and mod.exports is None:
            mod.exports = [name for name, member in mod.members.items() if member.is_alias and name[0] != "_"]
