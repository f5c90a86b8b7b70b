"""How a measurement shows itself: a short repr, and in a notebook its sentence with its picture.

Nothing here draws. Whoever assembles the package says what does, by `draw_with`; until then a notebook shows the repr.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any

import numpy as np
from torch import Tensor

__all__ = ["Shown", "draw_with"]

FEW = 4
"""Values of a tuple that a repr tells."""

_DRAW: list[Callable[[Any], str | None]] = []


def draw_with(html: Callable[[Any], str | None]) -> None:
    """Let notebooks show measurements by this function, to HTML; None where it has no picture of one."""
    _DRAW[:] = [html]


class Shown:
    """A dataclass of numbers: its repr tells shapes instead of numbers, a notebook draws it."""

    def __repr__(self) -> str:
        told = ((entry, getattr(self, entry.name)) for entry in fields(self))  # type: ignore[arg-type]  # a dataclass
        said = (f"{entry.name}={_brief(value)}" for entry, value in told if not _is_default(entry.default, value))
        return f"{type(self).__name__}({', '.join(said)})"

    def _repr_html_(self) -> str | None:
        return _DRAW[0](self) if _DRAW else None


def _is_default(default: Any, value: Any) -> bool:
    """Whether there is nothing to tell: what was left out when it was made."""
    return default is not MISSING and (value is default or (isinstance(value, tuple) and value == default))


def _brief(value: Any) -> str:
    """A value in a few words: of an array its kind and shape."""
    if isinstance(value, np.ndarray | Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, tuple | list) and len(value) > FEW:
        return f"{len(value)} of {type(value[0]).__name__}"
    if isinstance(value, tuple):
        return "(" + "".join(f"{_brief(part)}, " for part in value).removesuffix(", ") + ("," * (len(value) == 1)) + ")"
    if isinstance(value, str | int | float | bool | np.generic) or value is None:
        return repr(value.item() if isinstance(value, np.generic) else value)
    return type(value).__name__
