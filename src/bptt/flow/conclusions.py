"""What a measurement says, in one sentence: the titles of the pictures, the lines of the report and of the verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import singledispatch
from typing import Any

import numpy as np
import numpy.typing as npt

from ..cells import CELLS
from ._by_lag import Lags
from ._cell_path import CellPath
from ._compare import Comparison
from ._gates import Gates
from ._jacobians import Jacobians, Products
from ._lags import LagMap
from ._lyapunov import Lyapunov
from ._shares import Shares
from ._spectrum import Spectrum
from .costs import CLOSE, sentence
from .course import arises, at_least, course_of, steepest
from .horizon import end, horizon, settled
from .language import say
from .wording import STEADY, change, exponential, half_life, life, number, percent, steps, trend

__all__ = ["NOTHING", "NO_LOSS", "conclusion", "course", "end_rate", "stuck"]

Floats = npt.NDArray[np.float64]

GONE = 100.0
"""The factor by which a product shrinks or grows from which on it is said to vanish or explode."""
SATURATED = 0.5
"""The fraction of a gate's values at its ends from which on it is called saturated."""
ROUNDING = 1e-6
"""How far from 1 a norm may lie to be called 1."""
ON_CIRCLE = 0.01
"""How far from 1 a spectral radius may lie to be called on the unit circle."""
NOTHING = "Nothing to change"
"""What a verdict without advice says."""
NO_LOSS = "no gradient flows: no loss reaches this layer"
_ONE_LAG = "only lag 0 was measured: nothing is known of how far gradients travel"


@singledispatch
def conclusion(measure: Any, layer: int | None = None) -> str:
    """Say in one sentence what to conclude from a measurement, with its numbers.

    measure: a dataclass of `bptt.flow`, or a list of the records of a training run. layer: which of several
    layers; by default, for `Lags` and `Shares`, the one with the steepest trend or the largest error, else the first.

    Raises TypeError for anything else, IndexError for a layer that is not there.

    >>> import numpy as np, bptt
    >>> w = np.diag([0.9, 0.5])
    >>> size = np.array([[0.9, 0.5]])
    >>> conclusion(bptt.flow.Spectrum("layer 0", ("h",), size + 0j, size, size[:, 0], size[:, 0]))
    'The largest |eigenvalue| is 0.9, inside the unit circle: powers of W_hh vanish, half is lost every 6.58 steps'
    """
    raise TypeError(f"measure must be a dataclass of bptt.flow or a list of training records: got {measure!r}")


@conclusion.register
def _(measure: LagMap, layer: int | None = None) -> str:
    i = layer or 0
    there, norm, t = measure.there[i], measure.followed[i], measure.t
    if not np.any(there):
        return _of(measure.layers, i, say(NO_LOSS))
    if np.any(there & ~np.isfinite(norm)):
        share = np.count_nonzero(there & ~np.isfinite(norm)) / np.count_nonzero(there)
        text = say("{share} of what the losses send back is not finite", share=percent(share))
        return _of(measure.layers, i, text)
    reaches = np.count_nonzero(there, axis=1)  # lags that each loss reaches: where there is data, it begins at lag 0
    far = reaches == reaches.max()
    kept = far & (np.nansum(norm, axis=1) > 0)
    if not np.any(kept):
        kept = np.nansum(norm, axis=1) > 0
    if not np.any(kept):
        return _of(measure.layers, i, say("no loss sends anything back: every norm is 0"))
    if reaches.max() == 1:
        return _of(measure.layers, i, say(_ONE_LAG))
    t, sent = t[kept], [row[seen] for row, seen in zip(norm[kept], there[kept], strict=True)]
    growth = float(np.median([_ratio(row[-1], row[0]) for row in sent]))
    if growth > 2:
        text = "what a loss sends back grows on its way: it ends {times} times as large as it began"
        return _of(measure.layers, i, say(text, times=number(growth)))
    reach = np.array([horizon(row / row.max(), 0.9) for row in sent])
    known = np.array([settled(row, np.ones(len(row)), 0.9) for row in sent])
    low, high = int(np.argmin(reach)), int(np.argmax(reach))
    middle = at_least(steps(float(np.median(reach))), bool(np.mean(known) > 0.5))
    text = say(
        "90 % of what a loss sends back arises within {far} (measured in {steps})",
        far=middle,
        steps=steps(int(reaches.max())),
    )
    if reach[low] != reach[high]:
        nearest, most = (at_least(f"{reach[j]}", bool(known[j])) for j in (low, high))
        text += say(
            ": {nearest} for the loss at step {t}, {most} at step {u}", nearest=nearest, t=t[low], most=most, u=t[high]
        )
    return _of(measure.layers, i, text)


@conclusion.register
def _(measure: Lags, layer: int | None = None) -> str:
    i = steepest(measure) if layer is None else layer
    norm, rate = measure.curve(i)[0], float(measure.rate[i])
    if not len(norm):
        text = say(NO_LOSS)
    elif not np.all(np.isfinite(norm)):
        at = measure.lag[measure.there[i]][np.argmax(~np.isfinite(norm))]
        if not math.isnan(rate) and trend(rate, int(at)) == "explode":
            text = "gradients explode: on the way back {change}; they are not finite from lag {lag} on"
            text = say(text, change=change(rate), lag=at)
        else:
            text = say("gradients are not finite from lag {lag} on", lag=at)
    elif not np.any(norm > 0):
        text = say("no gradient flows: the norm is 0 at every lag")
    elif len(norm) == 1:
        text = say(_ONE_LAG)
    elif (last := end(norm)) is not None:
        text = say("gradients end at lag {lag}: nothing arrives beyond it", lag=last)
        text += arises(measure, i) if last else ""
    else:
        text = course_of(measure, i)
    return _of(measure.layers, i, text)


@conclusion.register
def _(measure: Shares, layer: int | None = None) -> str:
    i = int(np.argmax(np.nan_to_num(measure.bias[:, 0]))) if layer is None else layer
    bias, bin_edges = measure.bias[i], measure.bin_edges
    enough = int(np.argmax(bias <= CLOSE)) if np.any(bias <= CLOSE) else len(bias) - 1
    last = int(bin_edges[enough + 1]) - 1
    if not np.isfinite(measure.total[i]):
        text = say("the gradient of W_hh is not finite")
    elif measure.total[i] == 0:
        text = say("the gradient of W_hh is 0")
    elif len(bias) == 1:
        text = say("the gradient of W_hh was measured in one bin, lags 0 to {last}", last=last)
    elif enough == len(bias) - 1:
        text = "all lags count: cut before lag {lag}, dL/dW_hh is {part} off"
        text = say(text, lag=bin_edges[enough], part=percent(bias[enough - 1]))
    else:
        text = (
            "lags 0 to {last} give dL/dW_hh to within {part}" if last else "lag 0 alone gives dL/dW_hh to within {part}"
        )
        text = say(text, last=last, part=percent(bias[enough]))
    return _of(measure.layers, i, text)


@conclusion.register
def _(measure: Jacobians, layer: int | None = None) -> str:
    norm = measure.norm[measure.there]
    if not norm.size:
        return say("No state passes a step: resets or the ends of lanes close all of them")
    if not np.all(np.isfinite(norm)):
        return say("{part} of the step Jacobians are not finite", part=percent(float(np.mean(~np.isfinite(norm)))))
    middle, above = float(np.median(norm)), float(np.mean(norm > 1 + ROUNDING))
    rest = "" if measure.bound is None else say(" (bound {bound})", bound=number(measure.bound))
    if np.any(np.diff(measure.t) > 1):
        rest += say(" (measured at {count} of the steps)", count=len(measure.t))
    if np.all(np.abs(norm - 1) <= ROUNDING):
        kept = bool(np.all(np.abs(measure.smallest[measure.there] - 1) <= ROUNDING))
        text = "|J_t| is 1 at every step: lengths are kept" if kept else "|J_t| is 1 at every step: no direction grows"
        return say(text) + rest
    if above == 0:
        most = float(norm.max())
        text = "Every step contracts: |J_t| is at most {most}"
        text = text if most < 1 - ROUNDING else "In no step does any direction grow: |J_t| is at most {most}"
        return say(text, most=number(most)) + rest
    text = "|J_t| exceeds 1 at {part} of the steps; its median is {median}"
    return say(text, part=percent(above), median=number(middle)) + rest


@conclusion.register
def _(measure: Products, layer: int | None = None) -> str:
    ends = int(measure.n[-1]) if measure.reset is None else measure.reset - 1
    n, log = ends, measure.log_singular[ends]
    until = "" if measure.reset is None else say("; then a reset ends the lane's memory, after {steps}", steps=steps(n))
    if n == 0:
        return say("A product of no factors: every singular value is 1") + until
    if np.isnan(log[0]):
        return say("The product is not finite")
    if np.isneginf(log[0]):
        first = int(measure.n[np.argmax(np.isneginf(measure.log_singular[:, 0]))])
        return say("Nothing passes {steps}: the product of the Jacobians is 0", steps=steps(first))
    small = "" if len(log) == 1 else say("; its smallest singular value is {value}", value=exponential(log[-1]))
    text = (
        "The product of {n} Jacobians {becomes}: its norm is {norm}, at the end {rate} a step{small} (along lane "
        "{lane})"
    )
    becomes, norm, rate = _becomes(float(log[0]), float(log[-1])), exponential(log[0]), number(end_rate(measure))
    return say(text, n=n, becomes=becomes, norm=norm, rate=rate, small=small, lane=measure.lane) + until


def end_rate(measure: Products) -> float:
    """The factor per step of a product's norm over its later half, since it may grow first and then hold; NaN where it
    has none.
    """
    n = int(measure.n[-1]) if measure.reset is None else measure.reset - 1
    ends = measure.log_singular[[n // 2, n], 0]
    if n == 0 or not np.isfinite(ends).all():
        return math.nan
    return math.exp(min((ends[1] - ends[0]) / (n - n // 2), 700.0))


def _becomes(log: float, smallest: float) -> str:
    """What a product with this norm and smallest singular value, by logarithms, does to what it is applied to."""
    if abs(log) <= math.log(2):
        text = "keeps lengths to within a factor of 2"
        return say(text if smallest >= -math.log(2) else "keeps its best direction to within a factor of 2")
    if abs(log) < math.log(GONE):
        return say("shrinks") if log < 0 else say("grows")
    return say("vanishes") if log < 0 else say("explodes")


@conclusion.register
def _(measure: Spectrum, layer: int | None = None) -> str:
    i = int(np.argmax(measure.radius))
    radius, several = float(measure.radius[i]), len(measure.gates) > 1
    gate = say(" (gate {gate})", gate=measure.gates[i]) if several else ""
    start = say("The largest |eigenvalue| is {radius}{gate}", radius=number(radius), gate=gate)
    if not math.isfinite(radius):
        return say("W_hh is not finite")
    if abs(radius - 1) <= ON_CIRCLE:
        return start + say(", on the unit circle: powers of W_hh neither vanish nor explode")
    if several:
        return start + (say(", outside the unit circle") if radius > 1 else say(", inside the unit circle"))
    if radius > 1:
        text = ", outside the unit circle: powers of W_hh explode, doubling every {steps}"
        return start + say(text, steps=life(radius))
    norm = float(measure.norm[i])
    first = "" if norm <= 1 else say("; |W_hh| = {norm}, so they may grow first", norm=number(norm))
    text = ", inside the unit circle: powers of W_hh vanish, half is lost every {steps}"
    return start + say(text, steps=life(radius)) + first


@conclusion.register
def _(measure: CellPath, layer: int | None = None) -> str:
    at = len(measure.n) - 1 if measure.lanes is None else int(np.flatnonzero(measure.lanes)[-1])
    n, path, full = int(measure.n[at]), float(measure.path[at]), float(measure.full_c[at])
    if n == 0:
        return say("No step was taken: the cell path is 1")
    over = "After {steps} the cell path alone keeps {path}, all paths together {full}"
    over = say(over, steps=steps(n), path=number(path), full=number(full))
    if not (math.isfinite(path) and math.isfinite(full)):
        return over
    if full > 2 * path:
        return over + say(": most passes through h")
    if path > 2 * full:
        return over + say(": the paths through h cancel it")
    return over + say(": the cell carries it")


@conclusion.register
def _(measure: Gates, layer: int | None = None) -> str:
    ends = np.nan_to_num(stuck(measure))
    i = int(np.argmax(ends))
    several = len(measure.names) > 1
    if not measure.bounded and measure.low[0] > 0:
        text = "{part} of the state's values are 0: units that are off pass no gradient"
        return say(text, part=percent(float(measure.low[0])))
    if not measure.bounded:
        return say("The activation has no ends: no value is saturated")
    of = say("the values of gate {gate}", gate=measure.names[i]) if several else say("the state's values")
    near = "; {part} of the values of gate {gate} lie near 1: there the state is kept, which is memory"
    keeps = [
        say(near, part=percent(float(high)), gate=name)
        for name, high in zip(measure.names, measure.high, strict=True)
        if name == _keeper(measure) and high >= SATURATED
    ]
    kept = "".join(keeps)
    if ends[i] >= SATURATED:
        lower = measure.low[i] > measure.high[i] or measure.names[i] == _keeper(measure)
        side = say("lower") if lower else say("upper")
        text = "Saturated: {part} of {values} lie at its ends, most at the {side} one"
        return say(text, part=percent(ends[i]), values=of, side=side) + kept
    if ends[i] == 0:
        return say("No value is saturated") + kept
    little = ends[i] < SATURATED / 4
    text = "Little saturation: {part} of {values} lie at its ends"
    text = say(
        text if little else "Some saturation: {part} of {values} lie at its ends", part=percent(ends[i]), values=of
    )
    return text + (say(", the most of all gates") if several else "") + kept


def stuck(measure: Gates) -> Floats:
    """The fraction of each gate's values at an end, but for the end at which a gate keeps the state."""
    keeps = np.array([name == _keeper(measure) for name in measure.names])
    return np.asarray(measure.low + np.where(keeps, 0.0, measure.high))


def _keeper(measure: Gates) -> str | None:
    """The gate that keeps the state where it is 1: open for long is how a net remembers, and no fault."""
    return CELLS[measure.cell].keeps if measure.cell in CELLS else None


@conclusion.register
def _(measure: Lyapunov, layer: int | None = None) -> str:
    largest, error = float(measure.exponents[0]), float(measure.error[0])
    if not math.isfinite(largest):
        if largest != -math.inf:
            return say("The exponents are not finite")
        if 0 < measure.dead < measure.lanes:
            text = "Every perturbation dies completely in {count} of {lanes} lanes"
            return say(text, count=measure.dead, lanes=measure.lanes)
        return say("Every perturbation dies completely")
    text = "largest exponent {value} ± {error} nats per step over {steps}"
    text = text if math.isfinite(error) else "largest exponent {value} nats per step, error unknown over {steps}"
    value = say(text, value=number(largest), error=number(error), steps=steps(measure.steps))
    kind = course(measure)
    if kind == "hold":
        return say("At the edge: perturbations neither grow nor shrink ({value})", value=value)
    if kind == "unknown":
        return say("Not settled: perturbations may grow or shrink ({value})", value=value)
    if kind == "explode":
        positive = int(np.count_nonzero(measure.exponents > 2 * np.nan_to_num(measure.error)))
        where = say("{count} direction" if positive == 1 else "{count} directions", count=positive)
        text = "Unstable: perturbations double every {steps} in {where} ({value})"
        return say(text, steps=life(math.exp(largest)), where=where, value=value)
    return say("Stable: perturbations halve every {steps} ({value})", steps=life(math.exp(largest)), value=value)


def course(measure: Lyapunov) -> str:
    """What perturbations do: "vanish", "hold", "explode", or "unknown" where the error does not tell."""
    largest, doubt = float(measure.exponents[0]), 2 * float(np.nan_to_num(measure.error[0]))
    if not math.isfinite(largest):
        return "vanish" if largest == -math.inf and measure.dead in (0, measure.lanes) else "unknown"
    if half_life(math.exp(min(abs(largest) + doubt, 700.0))) > max(measure.steps, STEADY):
        return "hold"
    return "unknown" if abs(largest) <= doubt else trend(math.exp(min(largest, 700.0)), measure.steps)


@conclusion.register
def _(measure: Comparison, layer: int | None = None) -> str:
    return sentence(measure)


@conclusion.register(list)
@conclusion.register(tuple)
def _(measure: Sequence[Mapping[str, Any]], layer: int | None = None) -> str:
    kind = "perplexity" if any(record["perplexity"] is not None for record in measure) else "loss"
    measure = [record for record in measure if record.get(kind) is not None]  # not all of its steps skipped
    if not measure:
        return say("Nothing was recorded")
    first, last = measure[0], measure[-1]
    text = "Perplexity went from {first} to {last} in {step} steps"
    text = text if kind == "perplexity" else "Loss went from {first} to {last} in {step} steps"
    parts = [say(text, first=number(first[kind]), last=number(last[kind]), step=last["step"])]
    held = [(r[f"heldout_{kind}"], r["step"]) for r in measure if r.get(f"heldout_{kind}") is not None]
    if held:
        best, at = min(held)
        turned = held[-1][0] > 1.05 * best
        text = say("held-out {last}", last=number(held[-1][0]))
        parts.append(text + (say(", up from {best} at step {step}", best=number(best), step=at) if turned else ""))
    clipped = sum(r["clipped"] * r["steps"] for r in measure) / max(sum(r["steps"] for r in measure), 1)
    parts.append(say("{part} of the steps were clipped", part=percent(clipped)))
    if skipped := sum(r.get("skipped") or 0 for r in measure):
        parts.append(say("{count} skipped", count=skipped))
    horizons = [
        at_least(number(r["horizon"]), bool(r.get("horizon_settled"))) for r in measure if r.get("horizon") is not None
    ]
    if horizons:
        parts.append(say("horizon {first} to {last} steps", first=horizons[0], last=horizons[-1]))
    return say("; ").join(parts)


def _ratio(last: float, first: float) -> float:
    return float(last / first) if first > 0 else (math.inf if last > 0 else 0.0)


def _of(layers: tuple[str, ...], i: int, text: str) -> str:
    """The layer's name before the text where there are several, a capital letter where not."""
    return say("{layer}: {text}", layer=layers[i], text=text) if len(layers) > 1 else text[0].upper() + text[1:]
