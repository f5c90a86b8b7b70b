"""How a text may be drawn from a language model: checked without torch."""

from __future__ import annotations

import math

from .config import Config

__all__ = ["check_drawing"]


def check_drawing(length: int, temperature: float, seed: int) -> None:
    """Raise ValueError for a negative length, a temperature that is negative or not finite, a seed that no run has."""
    if length < 0:
        raise ValueError(f"length must be at least 0: got {length}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be a finite number of at least 0: got {temperature}")
    Config.check("seed", seed)
