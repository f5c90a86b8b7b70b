"""How the decay by lag differs between the lanes and the losses that its mean is over.

Legend: K lags; a curve is a mean norm `[K]`, NaN where there is no data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ._by_lag import Lags
from .horizon import fit_decay, left
from .language import say
from .wording import STEADY, half_life, number, percent

__all__ = ["Range", "halves", "lost", "rates", "rest", "steadily"]

Floats = npt.NDArray[np.float64]

MIDDLE = 0.8
"""The part of the losses that a range is told for, "8 in 10": a single one says little."""

FAR = 0.5
"""The part of the lags of a fit, or from the lag at which half is left, that a lane or a loss must reach too."""


@dataclass(frozen=True)
class Range:
    """A number for each lane and for each loss that reaches far enough: the long lanes, the late losses.

    all_lanes, all_losses: whether all reach so far.
    """

    lanes: Floats
    losses: Floats
    all_lanes: bool
    all_losses: bool

    def each(self, change: Callable[[Floats], Floats]) -> Range:
        """The same numbers in another unit."""
        return replace(self, lanes=change(self.lanes), losses=change(self.losses))


def rates(lags: Lags, layer: int) -> Range:
    """The factor per step of each lane and loss, fitted over the lags over which `Lags.rate` is."""
    lag = np.flatnonzero(np.nan_to_num(lags.norm[layer]) > 0)
    lag = lag[lag > 0] if len(lag) > 2 else lag
    first = int(lag[-max(2, -(-len(lag) // 2))]) if len(lag) > 1 else 0  # as in `fit_decay`

    def rate(norm: Floats) -> float:
        return fit_decay(norm, (np.arange(len(norm)) >= first).astype(float), part=1.0)[0]

    return _over(lags, layer, first + int(FAR * (lags.measured[layer] - first)), rate)


def halves(lags: Lags, layer: int) -> Range:
    """The lag at which at most half is left of each lane and loss, infinite where more is left at twice the lag at
    which half of their mean is.
    """
    half = left(lags.curve(layer)[0])[0]
    need = _twice(half, lags, layer)

    def first(norm: Floats) -> float:
        at = left(norm[:need])[0]
        return np.inf if at is None else float(at)

    return _over(lags, layer, need, first)


def steadily(lags: Lags, layer: int) -> str:
    """In parentheses, after `change(rate)` and in its unit: the range of the rate over lanes and over losses."""
    found, rate = rates(lags, layer), float(lags.rate[layer])
    if not 0.5 < rate < 2:
        return _said(found, percent if rate < 1 else number)
    every = np.concatenate([found.lanes, found.losses])
    if half_life(rate) > 10 * STEADY or np.any((every >= 1) if rate < 1 else (every <= 1)):
        return _said(
            found.each(lambda rate: rate - 1),
            lambda value: say("{part} a step", part=f"{'+' * (value > 0)}{percent(value)}"),
        )
    return _said(found.each(lambda rate: np.array([half_life(r) for r in rate])), number)


def lost(lags: Lags, layer: int) -> str:
    """In parentheses: the range over lanes and over losses of the lag at which half is left."""
    beyond = say("more than {lag}", lag=_twice(left(lags.curve(layer)[0])[0], lags, layer) - 1)
    return _said(halves(lags, layer), lambda value: number(value) if np.isfinite(value) else beyond)


def rest(lags: Lags, layer: int, told: Callable[[float], str]) -> str:
    """In parentheses: the range over lanes of the part that is left at the last lag, of those that reach it."""
    found = _over(lags, layer, int(lags.measured[layer]), lambda norm: left(norm)[1])
    return _said(replace(found, losses=found.losses[:0]), told)


def _twice(half: int | None, lags: Lags, layer: int) -> int:
    """Lags that show where half is lost, of a lane or loss that may take twice as long as the mean."""
    most = int(lags.measured[layer])
    return most if half is None else min(most, 2 * half + 1)


def _over(lags: Lags, layer: int, need: int, of: Callable[[Floats], float]) -> Range:
    """What a function makes of each lane and loss that reaches so many lags and has anything to lose."""
    values: list[list[float]] = [[], []]
    whole = [True, True]
    for i, curves in enumerate((lags.lane_norm, lags.loss_norm)):
        for curve in () if curves is None else curves[layer]:
            norm = curve[~np.isnan(curve)]
            if not len(norm):
                continue
            if len(norm) > 1 and len(norm) >= need and norm[0] > 0 and np.isfinite(norm).all():
                values[i].append(of(norm))
            else:
                whole[i] = False
    lanes, losses = (np.array(found)[~np.isnan(found)] for found in values)
    return Range(lanes, losses, *whole)


def _said(found: Range, told: Callable[[float], str]) -> str:
    """The ranges of lanes and of losses in words; "" where there is but one of each."""
    lanes = say("lanes") if found.all_lanes else say("long lanes")
    losses = say("losses") if found.all_losses else say("late losses")
    named = [(name, values) for name, values in ((lanes, found.lanes), (losses, found.losses)) if len(values) > 1]
    if not named:
        return ""
    if len({told(float(value)) for _, values in named for value in values}) == 1:
        return say(" (mean of this batch, {who} alike)", who=say(" and ").join(name for name, _ in named))
    parts = []
    for name, values in named:
        ends, who = values, name
        if name == losses:
            ends = np.quantile(values, [(1 - MIDDLE) / 2, (1 + MIDDLE) / 2], method="nearest")
            who = say("8 in 10 {losses}", losses=name)
        low, high = told(float(ends.min())), told(float(ends.max()))
        parts.append(f"{who} {low if low == high else say('{low} to {high}', low=low, high=high)}")
    return say(" (mean of this batch; {ranges})", ranges=say(", ").join(parts))
