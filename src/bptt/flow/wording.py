"""Numbers in sentences: three digits, units, what a factor per step amounts to."""

from __future__ import annotations

import math

from .language import say

__all__ = ["STEADY", "change", "exponential", "half_life", "life", "number", "percent", "steps", "trend"]

STEADY = 100
"""Steps: what takes longer than these, and than the lags measured, to halve or double holds steady."""


def number(value: float) -> str:
    """Three significant digits, without a cluttered exponent.

    >>> number(0.123456), number(3e-07), number(1234.5), number(float("inf"))
    ('0.123', '3e-7', '1230', 'infinite')
    """
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return say("infinite") if value > 0 else say("-infinite")
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{float(f'{value:.3g}'):.10f}".rstrip("0").rstrip(".")
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def percent(fraction: float) -> str:
    """A fraction in per cent, two significant digits below 10.

    >>> percent(0.4567), percent(0.0123), percent(0.0), percent(0.99999)
    ('46 %', '1.2 %', '0 %', '100 %')
    """
    value = 100 * fraction
    if not math.isfinite(value):
        return f"{number(value)} %"
    return f"{number(float(f'{value:.2g}'))} %" if abs(value) < 10 else f"{value:.0f} %"


def half_life(rate: float) -> float:
    """Steps in which a quantity that is multiplied by `rate` per step halves or doubles; infinite for a rate of 1.

    >>> half_life(0.5), half_life(2.0), half_life(1.0)
    (1.0, 1.0, inf)
    """
    if not rate > 0:
        return 0.0 if rate == 0 else math.nan
    return abs(math.log(2) / math.log(rate)) if rate != 1 else math.inf


def trend(rate: float, lags: int = 0) -> str:
    """What a factor per step amounts to: "vanish", "hold", "explode", or "unknown" for NaN.

    lags: steps measured. "hold" where halving or doubling takes longer than these, and longer than 100 steps.

    >>> trend(0.8), trend(1.002), trend(1.2)
    ('vanish', 'hold', 'explode')
    """
    if math.isnan(rate):
        return "unknown"
    if half_life(rate) > max(lags, STEADY):
        return "hold"
    return "vanish" if rate < 1 else "explode"


def steps(count: float) -> str:
    """A number of steps, with its unit."""
    text = number(count)
    return say("{count} step", count=text) if text == "1" else say("{count} steps", count=text)


def life(rate: float) -> str:
    """`half_life` with its unit."""
    return steps(half_life(rate))


def change(rate: float, them: str = "they") -> str:
    """A factor per step in words: as a half-life where that is longer than a step. them: what changes, "they" or "it".

    >>> change(0.9), change(1.1, "it"), change(3.0)
    ('half is lost every 6.58 steps', 'it doubles every 7.27 steps', 'they grow 3-fold per step')
    """
    one = them == "it"
    if 0.5 < rate < 2:
        per = half_life(rate)
        if per > 10 * STEADY:
            part = percent(abs(rate - 1))
            return say("it changes by {part} per step" if one else "they change by {part} per step", part=part)
        if rate < 1:
            return say("half is lost every {steps}", steps=steps(per))
        return say("it doubles every {steps}" if one else "they double every {steps}", steps=steps(per))
    if rate < 1:
        return say("each step keeps {part}", part=percent(rate))
    return say("it grows {times}-fold per step" if one else "they grow {times}-fold per step", times=number(rate))


def exponential(log: float) -> str:
    """exp(log), beyond the range of floats too."""
    if math.isinf(log):
        return "0" if log < 0 else say("infinite")
    if abs(log) < 700:
        return number(math.exp(log))
    exponent = log / math.log(10)
    return f"{number(10 ** (exponent - math.floor(exponent)))}e{math.floor(exponent)}"
