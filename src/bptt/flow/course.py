"""What becomes of gradients on their way back, in words, and within how many lags they arise."""

from __future__ import annotations

import math

import numpy as np

from ._by_lag import Lags
from ._spread import lost, rest, steadily
from .horizon import left
from .language import say
from .wording import change, number, percent, steps, trend

__all__ = ["arises", "at_least", "course_of", "reach_of", "steady_change", "steepest"]

OFF = 1.25
"""The factor by which lag 0 may lie off a straight line from lag 1 on, of which it is then said to be a part."""


def steepest(lags: Lags) -> int:
    """The layer whose gradients change most per step: not finite first, then those with the rate farthest from 1."""
    rate = np.asarray(lags.rate, dtype=np.float64)
    steep = [abs(math.log(r)) if r > 0 else -1.0 for r in np.nan_to_num(rate, nan=0.0, posinf=math.inf)]
    curves = [lags.curve(i)[0] for i in range(len(lags.layers))]
    broken = [math.inf if not np.all(np.isfinite(row)) else s for row, s in zip(curves, steep, strict=True)]
    return int(np.argmax(broken))


def arises(lags: Lags, i: int) -> str:
    """Within how many lags 90 % of a layer's gradient arises, to follow what becomes of it."""
    return say("; 90 % arises within {reach}", reach=reach_of(lags, i))


def course_of(lags: Lags, i: int) -> str:
    """What becomes of gradients on their way back, with its spread over lanes and losses: a rate where one describes
    it, else what is left of them; and within how many lags they arise, where they do not grow.
    """
    norm, rate = lags.curve(i)[0], float(lags.rate[i])
    last = len(norm) - 1
    half, part = left(norm)
    kind = trend(rate, last) if lags.straight[i] else ""
    if kind == "hold":
        return say("gradients hold: {change}", change=steady_change(lags, i)) + arises(lags, i)
    if kind == "explode" and part > 2:
        return say("gradients explode: on the way back {change}", change=steady_change(lags, i))
    if kind == "vanish" and part < 0.5:
        return say("gradients vanish: {change}", change=steady_change(lags, i)) + arises(lags, i)
    after = steps(last)
    if not part <= 2:
        text = "gradients grow, at no steady rate: {times} times as large after {steps}"
        return say(text, times=number(part), steps=after) + rest(lags, i, number)
    if half is not None and part <= 0.5:
        text = "gradients vanish, at no steady rate: half is lost within {half}{spread}, {part} is left after {steps}"
        said = say(text, half=steps(half), spread=lost(lags, i), part=percent(part), steps=after)
        return said + arises(lags, i)
    if part < 1:
        said = say("gradients fade slowly: {part} is left after {steps}", part=percent(part), steps=after)
        return said + rest(lags, i, percent) + arises(lags, i)
    said = say("gradients grow slowly: {part} is left after {steps}", part=percent(part), steps=after)
    return said + rest(lags, i, percent)


def steady_change(lags: Lags, i: int, them: str = "they") -> str:
    """What a straight decay amounts to, with its spread over lanes and over losses. It begins at lag 1: where lag 0
    lies off that line, that is said. them: "they", or "it" for one gradient.
    """
    rate, norm = float(lags.rate[i]), lags.curve(i)[0]
    off_the_line = len(norm) > 2 and not 1 / OFF < norm[1] / (norm[0] * rate) < OFF
    said = change(rate, them)
    if off_the_line:
        begin = "from one step back on {change}" if them == "it" else "from lag 1 on {change}"
        said = say(begin, change=said)
    return f"{said}{steadily(lags, i)}"


def reach_of(lags: Lags, i: int, part: float = 0.9) -> str:
    """The lag within which that part of a layer's gradient arises, with the window it was measured in."""
    far = int((lags.horizon_90 if part == 0.9 else lags.horizon_99)[i])
    settled = bool(lags.settled(part)[i])
    text = "{far} (measured in {steps})" if settled else "{far} (measured in {steps}; measure longer)"
    return say(text, far=at_least(steps(far), settled), steps=steps(int(lags.measured[i])))


def at_least(text: str, settled: bool) -> str:
    """A number that is known, or no more of it than a bound."""
    return text if settled else say("at least {number}", number=text)
