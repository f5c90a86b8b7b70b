"""The learning rate over a run: a factor that depends on the step alone, so that nothing of it is to be saved."""

from __future__ import annotations

import math

__all__ = ["SCHEDULES", "factor"]

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
