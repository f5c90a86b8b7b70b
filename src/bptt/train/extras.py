"""Optional packages, imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any

from .errors import InputError

__all__ = ["require"]


def require(module: str, extra: str) -> Any:
    """The module, or an InputError naming the extra of this package that installs it.

    >>> require("json", "cli").loads("1")
    1
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        top = module.partition(".")[0]
        if error.name != top:
            raise
        raise InputError(f"{top} is not installed: pip install 'bptt[{extra}]'") from None
