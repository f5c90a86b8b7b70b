"""How far back a norm by lag reaches, and whether that is known: what lies beyond the last lag measured is fitted.

Legend: K lags measured (0..K-1), each with a norm and a weight.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "EXTENSION",
    "FAR",
    "LAGS",
    "LOSSES",
    "beyond",
    "end",
    "fit_decay",
    "fitted",
    "horizon",
    "left",
    "settled",
    "straight",
    "tail_sum",
]

Floats = npt.NDArray[np.float64]
Weights = npt.NDArray[Any]

LAGS, LOSSES = 128, 16
"""What the contraction of a batch is measured on, at most: lags, and steps with a loss."""

FAR = 0.75
"""The part of the lags measured that a settled horizon may reach: past it, it may be the end of what was measured."""

EXTENSION = 4
"""Times the lags measured that a settled horizon is fitted to hold for."""

MOVES = 0.05
"""Part of a settled horizon by which the fitted tail may move it, and a step in any case."""

BENDS = 0.25
"""Part of a straight line's fall, over each quarter of the lags, that the curve may fall more or less, and the nats
that it may in any case."""


FADED = 1e-6
"""The part of the largest norm below which a norm that is followed by zeros has decayed to nothing, not ended."""


def fit_decay(norm: Floats, weights: Weights, part: float = 0.5) -> tuple[float, float]:
    """(factor per lag, its standard error) of a geometric decay: a weighted line through log norm over the farther part
    of the lags above 0 where anything arrives; NaN for fewer than two.
    """
    ends = int(np.argmin(np.isfinite(norm))) if not np.isfinite(norm).all() else len(norm)
    lag = np.flatnonzero((norm[:ends] > 0) & (weights[:ends] > 0))  # what is left beyond an infinity tells nothing
    lag = lag[lag > 0] if len(lag) > 2 else lag
    lag = lag[-max(2, int(np.ceil(part * len(lag)))) :]
    if len(lag) < 2:
        return float("nan"), float("nan")
    w, y = weights[lag].astype(float), np.log(norm[lag])
    x = lag - np.average(lag, weights=w)
    slope = float(np.sum(w * x * y) / np.sum(w * x * x))
    residual = y - np.average(y, weights=w) - slope * x
    spread = np.sum(w * residual**2) / np.sum(w) * len(lag) / (len(lag) - 2) if len(lag) > 2 else 0.0
    rate = float(np.exp(slope))
    return rate, rate * float(np.sqrt(spread * np.sum(w) / len(lag) / np.sum(w * x * x)))


def fitted(norm: Floats, rate: float) -> Floats:
    """The line of a decay at this rate `[K]`, through the middle of the later half of what is above 0, which it was
    fitted to; NaN where nothing is.
    """
    lag = np.arange(len(norm))
    seen = lag[np.isfinite(norm) & (norm > 0)]
    tail = seen[len(seen) // 2 :]
    offset = float(np.median(np.log(norm[tail]) - tail * np.log(rate)))
    line = np.full(len(norm), np.nan)
    line[seen] = np.exp(np.clip(offset + seen * np.log(rate), -690, 690))
    return line


def horizon(norm: Floats, part: float, more: float = 0.0) -> int:
    """The smallest lag within which that part of the sum arises, `more` beyond the last lag included in the sum; K
    where that lies beyond the last lag, K - 1 where the sum is not finite.
    """
    total = norm.sum()
    if not np.isfinite(total):
        return len(norm) - 1
    enough = np.cumsum(norm) >= part * (total + more) * (1 - 1e-9)  # a sum may round below its part
    return int(np.argmax(enough)) if enough.any() else len(norm)


def beyond(norm: Floats, weights: Weights) -> float:
    """The sum that a window `EXTENSION` times as long would add, at the slowest decay that the tail bears out.

    That of the farther half or quarter of the lags, whichever is slower, plus twice its standard error, from the mean
    over the last eighth on. Infinite where two lags above 0 are not there to be fitted.
    """
    K = len(norm)
    end = float(norm[-max(1, K // 8) :].mean()) if K else 0.0
    if K > 1 and end == 0:
        return 0.0
    fits = [fit_decay(norm, weights, part) for part in (0.5, 0.25)]
    rate = max(rate + 2 * error for rate, error in fits)
    if not np.isfinite(rate):
        return float("inf")
    with np.errstate(over="ignore"):
        return float(end * np.power(rate, np.arange(1.0, (EXTENSION - 1) * K + 1)).sum())


def tail_sum(norm: Floats, rate: float) -> float:
    """The sum beyond the last lag, if the norm went on to decay at this rate."""
    if not len(norm) or norm[-1] == 0:
        return 0.0
    return float(norm[-1] * rate / (1 - rate)) if rate < 1 else float("inf")


def settled(norm: Floats, weights: Weights, part: float) -> bool:
    """Whether the lag within which that part arises is that of the net, and not of the window it was measured in.

    So it is where it lies in the first three quarters of the lags, and what `beyond` adds moves it by at most 5 % or a
    step.
    """
    if not np.isfinite(norm).all() or not np.any(norm > 0):
        return False
    found = horizon(norm, part)
    moved = horizon(norm, part, beyond(norm, weights))
    return found < FAR * len(norm) and moved < len(norm) and moved - found <= max(1.0, MOVES * found)


def straight(norm: Floats, weights: Weights) -> bool:
    """Whether log norm is a straight line from lag 1 on, so that one factor per lag describes it.

    Over each quarter of the lags (of three lags or more) the curve falls, by least squares, as much as the line through
    all of them does, to within a quarter of that or a quarter of a nat. Nowhere does it leave the line through the
    farther half, whose slope is the rate that is told, by more than a quarter of that line's fall or half a nat. A
    curve that ends is none.
    """
    lag = np.flatnonzero((weights > 0) & (norm > 0))
    lag = lag[lag > 0] if len(lag) > 2 else lag
    if len(lag) < 2 or not np.isfinite(norm[lag]).all() or end(norm) is not None:
        return False
    whole, span = np.polyfit(lag, np.log(norm[lag]), 1)[0], lag[-1] - lag[0]
    tail = fit_decay(norm, weights)[0]
    if not tail > 0:
        return False
    off = np.log(norm[lag]) - np.log(tail) * lag
    if np.ptp(off) > BENDS * max(2.0, abs(np.log(tail)) * span):
        return False
    for part in np.array_split(lag, min(4, max(1, len(lag) // 3))):
        own = np.polyfit(part, np.log(norm[part]), 1)[0] if len(part) > 1 else whole
        if abs(own - whole) * (part[-1] - part[0]) > BENDS * max(1.0, abs(whole) * (part[-1] - part[0])):
            return False
    return True


def end(norm: Floats) -> int | None:
    """The last lag at which anything arrives, where nothing does beyond it although the norm had not faded: as in a
    shift register, or without recurrence. None where there is no such lag.
    """
    there = np.flatnonzero(norm != 0)
    if not len(there) or there[-1] == len(norm) - 1 or not np.isfinite(norm).all():
        return None
    return int(there[-1]) if norm[there[-1]] > FADED * norm.max() else None


def left(norm: Floats) -> tuple[int | None, float]:
    """(the first lag at which at most half of the norm at lag 0 is left, None where there is none; the part that is
    left at the last lag).
    """
    below = np.flatnonzero(norm <= 0.5 * norm[0])
    with np.errstate(divide="ignore", invalid="ignore"):
        return int(below[0]) if len(below) else None, float(norm[-1] / norm[0])
