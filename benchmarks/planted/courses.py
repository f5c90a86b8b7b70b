"""Claims of what becomes of gradients on their way back, and how far they reach: by lag, and in plain words."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from .printed import AGREES, FALSE, LESS, STEPS, UNJUDGED, UNREAD, Claim, N, P, alike, rate_of, share, value
from .truth import Truth, reach

__all__ = ["course", "plainly", "spread", "steady", "within"]


def steady(told: float, truth: Truth, i: int, either: bool = False, digits: float = 3e-5) -> tuple[bool, str]:
    """Whether a factor per lag describes the true curve from lag 1 on."""
    if truth.rate is not None:
        near = [told, 2 - told] if either else [told]
        good = any(alike(math.log(r), math.log(truth.rate), 0.02, digits) for r in near if r > 0 < truth.rate)
        return good or (told == truth.rate == 0), f"rate {told:.5g}, true {truth.rate:.5g}"
    curve = truth.seen[i][1:]
    if np.any(curve <= 0) and np.any(curve > 0):
        return False, f"rate {told:.5g}, but the curve ends"
    off = np.log(curve) - np.arange(len(curve)) * math.log(max(told, 1e-300))
    apart, fall = float(np.ptp(off)), len(curve) * abs(math.log(max(told, 1e-300)))
    return apart <= max(0.5, 0.25 * fall), f"rate {told:.5g}: the curve departs by {apart:.2g} nats of {fall:.3g}"


def within(text: str, truth: Truth, i: int, true: float) -> tuple[Any, str, str | None]:
    """The claim of a horizon."""
    m = re.fullmatch(rf"(at least )?{STEPS} \(measured in {STEPS}(?:; measure longer)?\)", text)
    if m is None:
        return UNREAD, text, None
    told = value(m[2])
    why = f"90 % within {m[1] or ''}{told:g}, true {true:g}"
    if not alike(value(m[3]), truth.measured):
        return FALSE, f"measured in {m[3]} lags, not {truth.measured}", None
    if m[1]:
        return (LESS if told <= true else FALSE), why, "at least"
    return alike(told, true, 0.05, 1.0), why, "told"


def spread(told: float, text: str, truth: Truth) -> tuple[Any, str]:
    """The range over lanes and losses: one number where every loss has the same rate."""
    found = [float(n) for n in re.findall(r"(?<![\d.])\d+(?:\.\d+)?(?:e-?\d+)?", text.replace("8 in 10 ", ""))]
    if truth.rate is None:
        return UNJUDGED, "each loss goes its own way"
    rounding = 1e-3 if "% a step" in text else 0.0  # of rates that are 1
    return all(alike(n, told, 0.03, rounding) for n in found), f"{found} around {told:g}"


def plainly(text: str, truth: Truth) -> Iterator[Claim]:
    """The verdict in plain words: of one layer, where there are several."""
    layer = re.match(r"In layer (\d+): ", text)
    i = int(layer[1]) if layer else 0
    said = re.sub(r" \(mean of this batch[^)]*\)", "", text[layer.end() :] if layer else text)
    said = said[0].lower() + said[1:]
    curve, K = truth.seen[i], truth.measured
    rest = curve[-1] / curve[0]
    found: list[tuple[Any, str]] = []
    if m := re.match(rf"the gradient of a loss ends {STEPS} before it", said):
        found.append(course(f"gradients end at lag {m[1]}: nothing arrives beyond it", truth, i)[:2])
    elif said.startswith("only the step of the loss itself was measured"):
        found.append((LESS if K == 1 else FALSE, f"{K} lags"))
    elif re.match(rf"the gradient of a loss is infinite or not a number {STEPS} before the loss", said):
        found.append((truth.overflows, "not finite"))
    elif m := re.match(
        rf"going back in time from a loss, its gradient hardly changes: {STEPS} before the loss {P} of it is left", said
    ):
        found.append((share(m[2], rest) and value(m[1]) == K - 1 and rest > 0.48, f"{m[2]} %, true {100 * rest:.3g} %"))
    elif m := re.match(
        rf"going back in time from a loss, its gradient grows: (?:(?:from one step back on )?([^;]*); )?{STEPS} before "
        rf"the loss it is {N} times as large", said,
    ):  # fmt: skip
        found.append((alike(value(m[3]), rest, 0.05) and value(m[2]) == K - 1, f"{m[3]} times, true {rest:.3g}"))
        if m[1]:
            rate = rate_of(m[1])
            found.append((UNREAD, m[1]) if rate is None else steady(rate, truth, i))
    elif m := re.match(
        r"going back in time from a loss, its gradient fades: (?:from one step back on )?(.*?)\. 90 % of it (.*)", said
    ):
        if half := re.fullmatch(rf"half is lost within {STEPS}", m[1]):
            true = float(np.argmax(curve <= 0.5 * curve[0]))
            found.append((alike(value(half[1]), true, 0.05, 1.0), f"half within {half[1]}, true {true:g}"))
        else:
            rate = rate_of(m[1])
            found.append((UNREAD, m[1]) if rate is None else steady(rate, truth, i))
        found += _plain_reach(m[2], truth, i)
    for good, why in found or [(UNREAD, "")]:
        outcome = good if isinstance(good, str) else AGREES if good else FALSE
        yield Claim("plain", text, outcome, why)


def _plain_reach(text: str, truth: Truth, i: int) -> Iterator[tuple[Any, str]]:
    true, window = reach(truth.curves[i], 0.9), truth.measured
    if m := re.match(rf"reaches back over {STEPS} at least; {STEPS} were measured", text):
        good = value(m[1]) <= true and value(m[2]) == window
        yield LESS if good else FALSE, f"at least {m[1]}, true {true:g}"
    elif m := re.match(rf"stays within {STEPS} of the loss(?:, 99 % within (\d+))? \({STEPS} were measured\)", text):
        yield alike(value(m[1]), true, 0.05, 1.0) and value(m[3]) == window, f"within {m[1]}, true {true:g}"
        if m[2]:
            far = reach(truth.curves[i], 0.99)
            yield alike(int(m[2]), far, 0.06, 1.0), f"99 % within {m[2]}, true {far:g}"
    else:
        yield UNREAD, text


def course(text: str, truth: Truth, i: int) -> tuple[Any, ...]:
    curve, K = truth.seen[i], truth.measured
    rest = curve[K - 1] / curve[0]
    text = text.replace("from lag 1 on ", "")
    if m := re.fullmatch(r"gradients (vanish|hold|explode): (?:on the way back )?(.*)", text):
        told = rate_of(m[2])
        if told is None:
            return UNREAD, text
        good, why = steady(told, truth, i, either=m[1] == "hold")
        ends = {"vanish": rest <= 0.52, "explode": rest >= 1.9, "hold": 0.48 <= rest <= 2.1}[m[1]]
        return good and ends, f"{why}; {rest:.3g} is left"
    if m := re.fullmatch(
        rf"gradients vanish, at no steady rate: half is lost within {STEPS}, {P} is left after {STEPS}", text
    ):
        half = int(np.argmax(curve <= 0.5 * curve[0])) if np.any(curve <= 0.5 * curve[0]) else math.inf
        good = alike(value(m[1]), half, 0.05, 1.0) and share(m[2], rest) and value(m[3]) == K - 1
        return good, f"half within {m[1]}, true {half}; {m[2]} % left, true {100 * rest:.3g} %"
    if m := re.fullmatch(rf"gradients (fade|grow) slowly: {P} is left after {STEPS}", text):
        return share(m[2], rest) and value(m[3]) == K - 1, f"{m[2]} % left, true {100 * rest:.3g} %"
    if m := re.fullmatch(rf"gradients grow, at no steady rate: {N} times as large after {STEPS}", text):
        return alike(value(m[1]), rest, 0.05) and value(m[2]) == K - 1, f"{m[1]} times, true {rest:.3g}"
    if m := re.fullmatch(r"gradients end at lag (\d+): nothing arrives beyond it", text):
        last = int(np.flatnonzero(curve > 0)[-1])
        return int(m[1]) == last, f"end at {m[1]}, true {last}", "told" if last == 0 else None
    return UNREAD, text
