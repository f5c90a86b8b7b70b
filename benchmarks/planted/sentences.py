"""What a verdict prints, read claim by claim, and each claim judged by the planted truth.

A text that no pattern here reads counts as "unread", and fails: so no new sentence escapes judgement.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from .courses import course, plainly, spread, steady, within
from .printed import AGREES, FALSE, LESS, STEPS, UNJUDGED, UNREAD, Claim, N, P, alike, share, value
from .truth import Truth, reach

__all__ = ["judged"]

LONG, SHORT = 100, 20 * math.log2(10)
"""Steps in which what holds does not halve; the horizon below which something is worth doing (`bptt.flow`)."""


def judged(found: Any, of: Any) -> list[Claim]:
    """Every claim of a survey's verdict. of: the `Planted` net."""
    verdict, truth = found.verdict, of.truth
    claims = [claim for topic, text in verdict.findings for claim in _finding(topic, text, truth, of)]
    claims += [claim for text in verdict.advice for claim in _advice(text, truth, of)]
    if not verdict.advice:
        claims += _nothing(truth, str(verdict))
    if plain := getattr(verdict, "plain", ""):
        claims += plainly(plain, truth)
    if verdict.headline not in [text for _, text in verdict.findings]:
        claims.append(Claim("headline", verdict.headline, UNREAD))
    for text in verdict.conditions:
        known = re.match(r"Measured on (\d+) of (\d+) lanes", text)
        good = bool(known) and int(known[1]) < int(known[2]) == truth.errors.shape[1] if known else False
        known = re.fullmatch(r"Steps, products and exponents are those of lane (\d+)", text)
        good |= int(known[1]) < truth.errors.shape[1] > 1 if known else False
        known = re.match(r"W_hh, steps, products and exponents are those of layer (\d+); the gates are those of", text)
        good |= bool(known) and int(known[1]) == len(truth.jacobians) - 1 > 0 if known else False
        claims.append(Claim("conditions", text, AGREES if good else UNREAD))
    return claims


def _finding(topic: str, text: str, truth: Truth, of: Any) -> Iterator[Claim]:
    layer = re.match(r"layer (\d+): ", text)
    i = int(layer[1]) if layer else 0
    said = text[layer.end() :] if layer else text[0].lower() + text[1:]
    read = _TOPICS.get(topic)
    if read is None:
        yield Claim(topic, text, UNREAD)
        return
    seen = False
    for good, why, *rest in read(said, truth, i):
        seen = True
        outcome = good if isinstance(good, str) else AGREES if good else FALSE
        yield Claim(topic, text, outcome, why, rest[0] if rest else None)
    if not seen:
        yield Claim(topic, text, UNREAD)


def _by_lag(text: str, truth: Truth, i: int) -> Iterator[Any]:
    if said := re.search(rf"{N}[^(\d]*( \(mean of this batch[^)]*\))", text):
        yield spread(value(said[1]), said[2], truth)
        text = text.replace(said[2], "")
    K = truth.measured
    if text.startswith("only lag 0 was measured"):
        yield LESS if K == 1 else FALSE, f"{K} lags"
        return
    if text.startswith("gradients are not finite from lag"):
        yield truth.overflows, "not finite"
        return
    m = re.fullmatch(r"(.*?)(?:; 90 % arises within (.*)|; they are not finite from lag (\d+) on)?", text)
    assert m is not None
    way, reaches, broken = m[1], m[2], m[3]
    if broken:
        at = int(np.argmax(truth.curves[i] > float(np.finfo(str(truth.dtype)[6:]).max)))
        yield at > 0 and abs(int(broken) - at) <= 3, f"not finite from lag {broken}, true {at}"
    if reaches:
        yield within(reaches, truth, i, reach(truth.curves[i], 0.9))
    yield course(way, truth, i)


def _by_loss(text: str, truth: Truth, i: int) -> Iterator[Any]:
    if text.startswith("only lag 0 was measured"):
        yield LESS if truth.measured == 1 else FALSE, f"{truth.measured} lags"
    elif re.fullmatch(rf"{P} of what the losses send back is not finite", text):
        yield truth.overflows, "not finite"
    elif m := re.fullmatch(rf"what a loss sends back grows on its way: it ends {N} times as large as it began", text):
        ends = [curve[truth.measured - 1] / curve[0] for curve in (truth.of_loss(step)[i] for step in truth.far)]
        rest = float(np.median(ends))
        yield rest > 1.9 and alike(value(m[1]), rest, 0.05), f"{m[1]} times, true {rest:.3g}"
    elif m := re.fullmatch(
        rf"90 % of what a loss sends back arises within ((?:at least )?{STEPS} \(measured in {STEPS}\))"
        r"(?:: (at least )?(\d+) for the loss at step (\d+), (at least )?(\d+) at step (\d+))?", text
    ):  # fmt: skip
        yield within(m[1], truth, i, truth.of_far_losses(i))[:2]
        for least, told, at in (m.groups()[3:6], m.groups()[6:9]):
            if told:
                true = reach(truth.of_loss(int(at))[i], 0.9)
                good = (LESS if int(told) <= true else FALSE) if least else alike(int(told), true, 0.05, 1.0)
                yield good, f"the loss at {at} within {least or ''}{told}, true {true:g}"


def _weights(text: str, truth: Truth, i: int) -> Iterator[Any]:
    yield UNJUDGED, "the weights' gradient by lag is no matter of the Jacobians alone"


def _steps(text: str, truth: Truth, i: int) -> Iterator[Any]:
    low, high, smallest = truth.power(1)
    if m := re.search(r" \(measured at (\d+) of the steps\)$", text):
        text = text[: m.start()]
        yield int(m[1]) < truth.errors.shape[0], f"{m[1]} of {truth.errors.shape[0]} steps"
    if m := re.fullmatch(
        rf"\|J_t\| is 1 at every step: (lengths are kept|no direction grows)(?: \(bound {N}\))?", text
    ):
        yield alike(low, 1, 1e-5), f"|J| is {low:g}"
        yield alike(smallest, 1, 1e-5) == (m[1] == "lengths are kept"), f"smallest singular value {smallest:g}"
    elif m := re.fullmatch(rf"in no step does any direction grow: \|J_t\| is at most {N}(?: \(bound {N}\))?", text):
        yield alike(high, 1, 1e-5), f"|J| is {high:g}"
    elif m := re.fullmatch(rf"every step contracts: \|J_t\| is at most {N}(?: \(bound {N}\))?", text):
        yield low * 0.99 <= value(m[1]) <= high * 1.01 and low <= 1 + 1e-6, f"|J| at most {m[1]}, true {high:g}"
        if m[2]:
            yield alike(value(m[2]), high, 0.01), f"bound {m[2]}, true {high:g}"
    elif m := re.fullmatch(rf"\|J_t\| exceeds 1 at {P} of the steps; its median is {N}(?: \(bound {N}\))?", text):
        yield high > 1 and low * 0.99 <= value(m[2]) <= high * 1.01, f"median {m[2]}, true {low:g} to {high:g}"
        if not truth.cell:
            yield value(m[1]) == 100, f"{m[1]} %, true 100 %"
    elif text.startswith("no state passes a step"):
        yield truth.measured == 1, "no state passes"


def _products(text: str, truth: Truth, i: int) -> Iterator[Any]:
    if text.startswith("a product of no factors"):
        yield LESS, "no factors"
    elif m := re.fullmatch(rf"nothing passes {STEPS}: the product of the Jacobians is 0", text):
        n = int(value(m[1]))
        yield truth.power(n)[0] == 0 < truth.power(n - 1)[0] if n > 1 else truth.power(1)[0] == 0, f"0 after {n}"
    elif m := re.fullmatch(
        rf"the product of (\d+) Jacobians (vanishes|explodes|shrinks|grows|"
        rf"keeps (?:lengths|its best direction) to within a factor of 2): "
        rf"its norm is {N}, at the end {N} a step(?:; its smallest singular value is {N})? \(along lane \d+\)"
        rf"(?:; then a reset ends the lane's memory, after {STEPS})?", text
    ):  # fmt: skip
        n = int(m[1])
        low, high, smallest = truth.power(n)
        told = value(m[3])
        yield low * 0.98 <= told <= high * 1.02, f"norm {told:g}, true {low:.3g} to {high:.3g}"
        logs = sorted(math.log(max(v, 1e-320)) for v in (low, high))
        says = {
            "vanishes": logs[0] <= -math.log(98), "explodes": logs[1] >= math.log(98), "shrinks": logs[0] < -0.67,
            "grows": logs[1] > 0.67,
        }.get(m[2], logs[0] <= 0.7 and logs[1] >= -0.7)  # fmt: skip
        yield says, f"{m[2]}: norm {low:.3g}"
        if m[2].startswith("keeps"):
            yield ("lengths" in m[2]) == (smallest >= 0.5), f"{m[2]}: smallest singular value {smallest:.3g}"
        middle = truth.power(n // 2)
        per = math.log(low / middle[0]) / (n - n // 2) if low > 0 and middle[0] > 0 else math.nan
        slack = math.log(high / low) + 0.003 if low > 0 else 1
        yield (
            alike(math.log(value(m[4])), per, 0.02, slack + 0.003),
            f"at the end {m[4]}, true {math.exp(per):.4g}",
        )
        if m[5]:
            yield alike(value(m[5]), smallest, 0.02), f"smallest {m[5]}, true {smallest:.3g}"


def _exponents(text: str, truth: Truth, i: int) -> Iterator[Any]:
    low, high = truth.grown
    if text.startswith("every perturbation dies completely"):
        yield truth.largest < 1e-9, f"true {truth.largest:g} a step"
        return
    m = re.fullmatch(
        rf"(at the edge: perturbations neither grow nor shrink|stable: perturbations halve every {STEPS}|"
        rf"unstable: perturbations double every {STEPS} in (\d+) directions?|"
        r"not settled: perturbations may grow or shrink) "
        rf"\(largest exponent {N} (?:± {N} )?nats per step(, error unknown)? over {STEPS}\)", text,
    )  # fmt: skip
    if m is None:
        return
    told, error = value(m[5]), value(m[6]) if m[6] else 0.0
    yield _between(told, low, high, 3 * error), f"exponent {told:g} ± {error:g}, true {low:.4g} to {high:.4g} a step"
    far = 1.1 * math.log(2) / LONG
    if m[1].startswith("not settled"):
        yield LESS, "not settled"
    elif m[1].startswith("at the edge"):
        yield abs(math.log(max(truth.largest, 1e-300))) <= far, f"at the edge, true {truth.largest:g} a step"
    else:
        grows = m[1].startswith("unstable")
        yield high > 1 if grows else low < 1, f"{m[1]}: true {low:.4g} to {high:.4g} a step over so many steps"
        per = math.log(2) / max(value(m[2] or m[3]), 1e-9) * (1 if grows else -1)
        yield alike(per, told, 0.03), f"{m[2] or m[3]} steps against {told:g}"
        if m[4] and truth.rate is not None:
            many = min(len(truth.jacobians[-1]), 16)
            yield int(m[4]) == many, f"{m[4]} directions, true {many}"


def _between(log: float, low: float, high: float, slack: float) -> bool:
    """Whether a logarithm lies between those of two factors, to 2 % and the rounding of the weights."""
    ends = [math.log(max(factor, 1e-300)) for factor in (low, high)]
    slack += 0.02 * abs(ends[0]) + 1e-6
    return ends[0] - slack <= log <= ends[1] + slack


def _spectrum(text: str, truth: Truth, i: int) -> Iterator[Any]:
    m = re.fullmatch(
        rf"the largest \|eigenvalue\| is {N}(?: \(gate \w\))?, (on|inside|outside) the unit circle"
        rf"(?:: powers of W_hh (neither vanish nor explode|vanish, half is lost every {STEPS}|"
        rf"explode, doubling every {STEPS})(?:; \|W_hh\| = {N}, so they may grow first)?)?", text,
    )  # fmt: skip
    if m is None:
        return
    true = truth.radius
    yield alike(value(m[1]), true, 0.01, 1e-4), f"radius {m[1]}, true {true:g}"
    yield {"on": 0.989 < true < 1.011, "inside": true < 0.991, "outside": true > 1.009}[m[2]], f"{m[2]}: {true:g}"
    if m[4] or m[5]:
        per = abs(math.log(2) / math.log(true)) if true else 0.0
        yield alike(value(m[4] or m[5]), per, 0.03), f"every {m[4] or m[5]}, true {per:.3g}"
    if m[6]:
        yield alike(value(m[6]), float(np.linalg.norm(truth.jacobians[-1], 2)), 0.01), f"|W_hh| = {m[6]}"


def _ends(truth: Truth) -> dict[str, tuple[float, float]]:
    """Of each gate, the part of its values near the lower and the upper end."""
    found = {}
    alive = np.arange(len(truth.errors))[:, None] < truth.lengths
    for name, values in (truth.gates or {}).items():
        low, high = (0.1, 0.9) if name in ("n", "g") else (0.05, 0.95)
        low = -0.9 if name in ("n", "g") else low
        near = values[alive]
        found[name] = (float(np.mean(near <= low + 1e-6)), float(np.mean(near >= high - 1e-6)))
    return found


def _gates(text: str, truth: Truth, i: int) -> Iterator[Any]:
    if truth.gates is None:
        if text.startswith("the activation has no ends"):
            yield not truth.bounded, "no ends"
        elif text == "no value is saturated":
            yield truth.bounded, "at rest"
        elif m := re.match(rf"{P} of the state's values are 0", text):
            yield value(m[1]) == 0 or not truth.rectified, f"{m[1]} % are off"
        return
    ends = _ends(truth)
    stuck = {g: low + (0 if g in "fz" else high) for g, (low, high) in ends.items()}
    text, *kept = text.split("; ")
    for part in kept:
        m = re.fullmatch(rf"{P} of the values of gate (\w) lie near 1: there the state is kept, which is memory", part)
        if m is None:
            yield UNREAD, part
        else:
            yield share(m[1], ends[m[2]][1]) and value(m[1]) >= 49, f"{m[1]} % near 1, true {ends[m[2]][1]:.2g}"
    most = max(stuck, key=lambda g: stuck[g])
    if text == "no value is saturated":
        yield stuck[most] < 1e-3, f"{stuck[most]:.3g} of {most}"
    elif m := re.match(rf"(little|some) saturation: {P} of the values of gate (\w) lie at its ends", text):
        yield share(m[2], stuck[m[3]]) and alike(stuck[m[3]], stuck[most]), f"{m[2]} % of {m[3]}: {stuck[most]:.3g}"
    elif m := re.match(rf"saturated: {P} of the values of gate (\w) lie at its ends, most at the (lower|upper)", text):
        yield share(m[1], stuck[m[2]]) and stuck[m[2]] >= 0.49, f"{m[1]} % of {m[2]}: {stuck[m[2]]:.3g}"


def _cell_path(text: str, truth: Truth, i: int) -> Iterator[Any]:
    if text.startswith("no step was taken"):
        yield LESS, "no step"
    elif m := re.fullmatch(
        rf"after {STEPS} the cell path alone keeps {N}, all paths together {N}: the cell carries it", text
    ):
        true = truth.power(int(value(m[1])))[0]
        yield all(alike(value(told), true, 0.02) for told in (m[2], m[3])), f"{m[2]} and {m[3]}, true {true:.3g}"


def _rates(text: str, truth: Truth, i: int) -> Iterator[Any]:
    i = len(truth.jacobians) - 1  # the cell's measurements are those of the top layer
    by_lag = re.match(rf"by lag (?:the mean contribution of this batch's losses changes by )?{N} a step", text)
    largest = re.search(rf"along a trajectory by {N} \(largest|along a trajectory, is {N} a step|exponent {N},", text)
    if largest and " over " not in text:
        return
    if by_lag is None and not text.startswith("by lag no one rate"):
        return
    if by_lag:
        yield steady(value(by_lag[1]), truth, i, digits=6e-4)
    if largest:
        told = value(next(g for g in largest.groups() if g))
        low, high = truth.grown
        good = _between(math.log(max(told, 1e-300)), low, high, 0.01)
        yield good, f"exponent {told:g} a step, true {low:.4g} to {high:.4g}"
    if by_lag and truth.rate is not None:
        yield "they agree" in text, "one rate for all"


_TOPICS: dict[str, Any] = {
    "by lag": _by_lag, "by loss": _by_loss, "weights": _weights, "steps": _steps, "products": _products,
    "exponents": _exponents, "W_hh": _spectrum, "gates": _gates, "cell path": _cell_path, "rates": _rates,
}  # fmt: skip


def _grown(truth: Truth) -> float:
    return max(float(curve[-1] / curve[0]) for curve in truth.seen)


def _advice(text: str, truth: Truth, of: Any) -> Iterator[Claim]:
    good: Any = UNREAD
    why = ""
    nearest = min(reach(curve, 0.9) for curve in truth.curves)
    if m := re.match(rf"To learn over more than {STEPS} \(half is lost within {STEPS}\): ", text):
        ends = [reach(curve, 0.9) for curve in truth.curves]
        good = any(alike(value(m[1]), end, 0.05, 1.0) for end in ends) and nearest <= SHORT + 2
        why = f"90 % within {m[1]}, true {ends}"
    elif m := re.match(rf'Losses farther than {STEPS} add less than 1 %: gradient="truncated:(\d+)"', text):
        left = max(float(curve[int(value(m[1])) + 1 :].sum() / curve.sum()) for curve in truth.curves)
        off = of.off(f"truncated:{m[2]}")
        good, why = left <= 0.015 and off <= 0.1, f"{100 * left:.2g} % beyond; the gradient is {100 * off:.2g} % off"
    elif text.startswith("Clip the gradient's norm"):
        good, why = _grown(truth) > 1.9 or truth.largest > 1.005, f"grown by {_grown(truth):.3g}"
        if m := re.search(rf"by lag: {N} times as large after (\d+)", text):
            rests = [float(curve[int(m[2])] / curve[0]) for curve in truth.seen]
            good = good and any(alike(value(m[1]), rest, 0.05) for rest in rests)
    elif m := re.match(rf"W_hh is large for a simple RNN \(radius {N}\)", text):
        good, why = truth.radius > 1.49 and alike(value(m[1]), truth.radius, 0.01), f"radius {truth.radius:g}"
    elif text.startswith("Begin with smaller recurrent weights"):
        good, why = truth.overflows, "an adjoint overflows"
    elif text.startswith("The gradient of W_hh is not finite"):
        good, why = not of.finite, "the gradient itself"
    elif m := re.match(rf"Saturated values pass no gradient \({P} of (\w)\)", text):
        low, high = _ends(truth)[m[2]]
        good, why = low + (0 if m[2] in "fz" else high) >= 0.49 and nearest <= SHORT + 2, f"{low:g}, {high:g}"
    elif re.match(r"In \d+ steps? the horizon has not settled: measure longer", text):
        good, why = LESS, "nothing is known"
    yield Claim("advice", text, good if isinstance(good, str) else AGREES if good else FALSE, why)


def _nothing(truth: Truth, printed: str) -> Iterator[Claim]:
    """No advice: where gradients neither grow for ever, or a hundredfold, nor break, nor fade within a few steps; in a
    window that is too short for more, where they hold.
    """
    nearest = min(reach(curve, 0.9) for curve in truth.curves)
    holds = truth.measured > 1 and all(curve[-1] / curve[0] >= 0.9 for curve in truth.seen)
    breaks = _grown(truth) > (2.1 if truth.largest > 1.005 else 100) or truth.overflows
    good = not breaks and (nearest >= SHORT - 2 or holds)
    yield Claim("advice", "Nothing to change", AGREES if good else FALSE, f"horizon {nearest:g}, {_grown(truth):.3g}")
