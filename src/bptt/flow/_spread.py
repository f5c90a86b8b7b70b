"""How the decay by lag differs between the lanes and the losses that its mean is over.

Legend: K lags; a curve is a mean norm `[K]`, NaN where there is no data.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from ._horizon import fit_decay, left
from ._lags import Lags
from ._wording import STEADY, half_life, number, percent

__all__ = ["halves", "lost", "rates", "rest", "steadily"]

Floats = npt.NDArray[np.float64]

MIDDLE = 0.8
"""The part of the losses that a range is told for, "8 in 10": a single one says little."""

ENOUGH = 0.5
"""The part of the lags measured that a lane or a loss must reach for its decay to be told."""


def rates(curves: Floats | None, lags: Lags, layer: int) -> Floats:
    """The factor per step of each curve of a layer, fitted as `Lags.rate` is; of those that reach far enough."""
    return _each(curves, lags, layer, lambda norm: fit_decay(norm, np.ones(len(norm)))[0])


def halves(curves: Floats | None, lags: Lags, layer: int) -> Floats:
    """The lag at which at most half of each curve of a layer is left, infinite where more is left at the last one."""

    def half(norm: Floats) -> float:
        at = left(norm)[0]
        return np.inf if at is None else float(at)

    return _each(curves, lags, layer, half)


def steadily(lags: Lags, layer: int) -> str:
    """In parentheses, behind `change(rate)` and in its unit: the range of the rate over lanes and over losses."""
    found = [rates(curves, lags, layer) for curves in (lags.lane_norm, lags.loss_norm)]
    rate, every = float(lags.rate[layer]), np.concatenate(found)
    if not 0.5 < rate < 2:
        return _said(found, percent if rate < 1 else number)
    if half_life(rate) > 10 * STEADY or np.any((every >= 1) if rate < 1 else (every <= 1)):
        return _said(
            [values - 1 for values in found], lambda value: f"{'+' if value > 0 else ''}{percent(value)} a step"
        )
    return _said([np.array([half_life(r) for r in values]) for values in found], number)


def lost(lags: Lags, layer: int) -> str:
    """In parentheses: the range over lanes and over losses of the lag at which half is left."""
    last = f"more than {lags.lag[-1]}"
    found = [halves(curves, lags, layer) for curves in (lags.lane_norm, lags.loss_norm)]
    return _said(found, lambda value: number(value) if np.isfinite(value) else last)


def rest(lags: Lags, layer: int, say: Callable[[float], str]) -> str:
    """In parentheses: the range over lanes of the part that is left at the last lag, of those that reach it."""
    parts = _each(lags.lane_norm, lags, layer, lambda norm: left(norm)[1], enough=1.0)
    return _said([parts, parts[:0]], say)


def _each(
    curves: Floats | None, lags: Lags, layer: int, of: Callable[[Floats], float], enough: float = ENOUGH
) -> Floats:
    """What a function makes of each curve that reaches far enough and has anything to lose."""
    values = []
    for curve in () if curves is None else curves[layer]:
        norm = curve[~np.isnan(curve)]
        if len(norm) > 1 and len(norm) >= enough * lags.measured[layer] and norm[0] > 0 and np.isfinite(norm).all():
            values.append(of(norm))
    found = np.array(values)
    return found[~np.isnan(found)]


def _said(found: list[Floats], say: Callable[[float], str]) -> str:
    """The ranges of lanes and of losses in words; "" where there is but one of each."""
    lanes, losses = found
    parts = []
    of = [name for name, values in (("lanes", lanes), ("losses", losses)) if len(values) > 1]
    if of and len({say(float(value)) for value in np.concatenate(found)}) == 1:
        return f" (mean of this batch, {' and '.join(of)} alike)"
    if len(lanes) > 1:
        parts.append(f"lanes {_range(lanes, say)}")
    if len(losses) > 1:
        middle = np.quantile(losses, [(1 - MIDDLE) / 2, (1 + MIDDLE) / 2], method="nearest")
        parts.append(f"8 in 10 losses {_range(middle, say)}")
    return f" (mean of this batch; {', '.join(parts)})" if parts else ""


def _range(values: Floats, say: Callable[[float], str]) -> str:
    """The smallest and the largest, once where they read alike."""
    low, high = say(float(values.min())), say(float(values.max()))
    return low if low == high else f"{low} to {high}"
