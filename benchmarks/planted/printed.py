"""What a verdict prints, as numbers, and when a printed number agrees with a true one."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

__all__ = [
    "AGREES", "FALSE", "LESS", "STEPS", "UNJUDGED", "UNREAD", "Claim", "N", "P", "alike", "rate_of", "share", "value",
]  # fmt: skip

AGREES, LESS, FALSE, UNREAD, UNJUDGED = "agrees", "less", "false", "unread", "not judged"

N = r"(-?(?:\d+(?:\.\d+)?(?:e-?\d+)?|infinite|NaN))"
STEPS = rf"{N} steps?"
P = rf"{N} %"


@dataclass(frozen=True)
class Claim:
    """A sentence, or a part of one, and what has become of it. horizon: what it tells of one, "told" or "at least"."""

    topic: str
    text: str
    outcome: str
    why: str = ""
    horizon: str | None = None


def value(text: str) -> float:
    """A printed number."""
    return {"infinite": math.inf, "-infinite": -math.inf, "NaN": math.nan}.get(text) or float(text)


def alike(told: float, true: float, part: float = 0.02, least: float = 0.0) -> bool:
    """Whether a number agrees, to within a part of it or `least`."""
    if not math.isfinite(told) or not math.isfinite(true):
        return told == true
    return abs(told - true) <= max(part * abs(true), least) + 1e-12


def share(told: str, true: float) -> bool:
    """Whether a percentage agrees: it has two digits."""
    return alike(value(told) / 100, true, 0.06, 0.006 if true >= 0.095 else 0.0006)


def rate_of(text: str) -> float | None:
    """The factor per step that a change in words amounts to; nearest to 1 where both are meant."""
    if m := re.fullmatch(rf"half is lost every {STEPS}", text):
        return 2 ** (-1 / value(m[1])) if value(m[1]) else 0.0
    if m := re.fullmatch(rf"(?:they double|it doubles) every {STEPS}", text):
        return 2 ** (1 / value(m[1]))
    if m := re.fullmatch(rf"each step keeps {P}", text):
        return value(m[1]) / 100
    if m := re.fullmatch(rf"(?:they grow|it grows) {N}-fold per step", text):
        return value(m[1])
    if m := re.fullmatch(rf"(?:they change|it changes) by {P} per step", text):
        return 1 - value(m[1]) / 100
    return None
