"""The learning rate over a run: a factor that depends on the step alone, so that nothing of it is to be saved."""

from __future__ import annotations

import math

from .errors import InputError
from .options import RATE

__all__ = ["LEAST_STEPS", "SCHEDULES", "check_range", "factor"]

LEAST_STEPS = 20
"""Of a learning-rate range test."""

SCHEDULES = ("constant", "linear", "cosine")


def factor(schedule: str, warmup: int, step: int, total: int) -> float:
    """What the learning rate is multiplied by at a step, counted from 0, of a run of `total` steps.

    It rises linearly over `warmup` steps, then stays ("constant") or falls to 0 after the last step, in a line
    ("linear") or half a cosine ("cosine": Loshchilov and Hutter 2017, arXiv 1608.03983, equation 5, without restarts).

    >>> [round(factor("cosine", 2, step, 6), 3) for step in range(6)]
    [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    """
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[schedule]


def check_range(lowest: float, highest: float, steps: int) -> None:
    """Raise InputError for rates of a range test that do not rise, or too few steps."""
    for name, rate in (("lowest", lowest), ("highest", highest)):
        if not (RATE.holds(rate) and rate <= RATE.most):
            raise InputError(f"{name} must be {RATE.expected}, at most {RATE.most:g}: got {rate:g}")
    if lowest >= highest:
        raise InputError(f"lowest must be below highest={highest:g}: got {lowest:g}")
    if steps < LEAST_STEPS:
        raise InputError(f"steps of a range test must be at least {LEAST_STEPS}: got {steps}")
