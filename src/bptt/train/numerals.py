"""What a value of a table is as a number: Python's `float` takes more than anybody writes into one."""

from __future__ import annotations

import math
import re
from typing import Any

__all__ = ["MISSING", "is_number", "number_of"]

MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "?"})
"""What stands for a missing value, in small letters."""

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
"""Decimal, in ASCII digits with a point: no underscores, no other digits, no words."""


def number_of(value: Any) -> float | None:
    """A value as a number, NaN where it is missing; None where it is neither, or no finite one.

    >>> number_of("1.5e3"), number_of(" 12 "), number_of("NA"), number_of("1_0"), number_of("1,5"), number_of("1e400")
    (1500.0, 12.0, nan, None, None, None)
    """
    if value is None or (isinstance(value, str) and value.strip().lower() in MISSING):
        return math.nan
    if isinstance(value, bytes) or (isinstance(value, str) and not is_number(value)):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return None if math.isinf(number) else number


def is_number(text: str) -> bool:
    """Whether a text is a number as `number_of` reads it."""
    return NUMBER.fullmatch(text.strip()) is not None
