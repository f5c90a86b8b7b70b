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
from ._spread import lost, rest, steadily
from .costs import CLOSE, sentence
from .horizon import end, horizon, left, settled
from .wording import STEADY, change, exponential, half_life, life, number, percent, steps, trend

__all__ = ["NOTHING", "NO_LOSS", "conclusion", "course", "end_rate", "reach_of", "steady_change", "steepest", "stuck"]

Floats = npt.NDArray[np.float64]

GONE = 100.0
"""The factor by which a product shrinks or grows from which on it is said to vanish or explode."""
SATURATED = 0.5
"""The fraction of a gate's values at its ends from which on it is called saturated."""
OFF = 1.25
"""The factor by which lag 0 may lie off a straight line from lag 1 on, of which it is then said to be a part."""
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
    """One sentence that says what to conclude from a measurement, with its numbers.

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
        return _say(measure.layers, i, NO_LOSS)
    if np.any(there & ~np.isfinite(norm)):
        share = np.count_nonzero(there & ~np.isfinite(norm)) / np.count_nonzero(there)
        return _say(measure.layers, i, f"{percent(share)} of what the losses send back is not finite")
    reaches = np.count_nonzero(there, axis=1)  # lags that each loss reaches: where there is data, it begins at lag 0
    far = reaches == reaches.max()
    kept = far & (np.nansum(norm, axis=1) > 0)
    if not np.any(kept):
        kept = np.nansum(norm, axis=1) > 0
    if not np.any(kept):
        return _say(measure.layers, i, "no loss sends anything back: every norm is 0")
    if reaches.max() == 1:
        return _say(measure.layers, i, _ONE_LAG)
    t, sent = t[kept], [row[seen] for row, seen in zip(norm[kept], there[kept], strict=True)]
    growth = float(np.median([_ratio(row[-1], row[0]) for row in sent]))
    if growth > 2:
        grown = f"what a loss sends back grows on its way: it ends {number(growth)} times as large as it began"
        return _say(measure.layers, i, grown)
    reach = np.array([horizon(row / row.max(), 0.9) for row in sent])
    known = np.array([settled(row, np.ones(len(row)), 0.9) for row in sent])
    low, high = int(np.argmin(reach)), int(np.argmax(reach))
    middle = steps(float(np.median(reach)))
    window = f"(measured in {steps(int(reaches.max()))})"
    least = "" if np.mean(known) > 0.5 else "at least "
    text = f"90 % of what a loss sends back arises within {least}{middle} {window}"
    if reach[low] != reach[high]:
        nearest, most = (f"{'' if known[j] else 'at least '}{reach[j]}" for j in (low, high))
        text += f": {nearest} for the loss at step {t[low]}, {most} at step {t[high]}"
    return _say(measure.layers, i, text)


def steepest(lags: Lags) -> int:
    """The layer whose gradients change most per step: not finite first, then those with the rate farthest from 1."""
    rate = np.asarray(lags.rate, dtype=np.float64)
    steep = [abs(math.log(r)) if r > 0 else -1.0 for r in np.nan_to_num(rate, nan=0.0, posinf=math.inf)]
    curves = [lags.curve(i)[0] for i in range(len(lags.layers))]
    broken = [math.inf if not np.all(np.isfinite(row)) else s for row, s in zip(curves, steep, strict=True)]
    return int(np.argmax(broken))


@conclusion.register
def _(measure: Lags, layer: int | None = None) -> str:
    i = steepest(measure) if layer is None else layer
    norm, rate = measure.curve(i)[0], float(measure.rate[i])
    if not len(norm):
        text = NO_LOSS
    elif not np.all(np.isfinite(norm)):
        at = measure.lag[measure.there[i]][np.argmax(~np.isfinite(norm))]
        grow = not math.isnan(rate) and trend(rate, int(at)) == "explode"
        text = f"gradients explode: on the way back {change(rate)}; " if grow else "gradients "
        text += f"{'they ' if grow else ''}are not finite from lag {at} on"
    elif not np.any(norm > 0):
        text = "no gradient flows: the norm is 0 at every lag"
    elif len(norm) == 1:
        text = _ONE_LAG
    elif (last := end(norm)) is not None:
        text = f"gradients end at lag {last}: nothing arrives beyond it"
        text += f"; 90 % arises within {reach_of(measure, i)}" if last else ""
    else:
        text = _course(measure, i)
        if not text.startswith(("gradients explode", "gradients grow")):
            text += f"; 90 % arises within {reach_of(measure, i)}"
    return _say(measure.layers, i, text)


def _course(lags: Lags, i: int) -> str:
    """What becomes of gradients on their way back, with its spread over lanes and losses: a rate where one describes
    it, else what is left of them.
    """
    norm, rate = lags.curve(i)[0], float(lags.rate[i])
    last = len(norm) - 1
    half, part = left(norm)
    kind = trend(rate, last) if lags.straight[i] else ""
    if kind == "hold":
        return f"gradients hold: {steady_change(lags, i)}"
    if kind == "explode" and part > 2:
        return f"gradients explode: on the way back {steady_change(lags, i)}"
    if kind == "vanish" and part < 0.5:
        return f"gradients vanish: {steady_change(lags, i)}"
    after = f"after {steps(last)}"
    if not part <= 2:
        return f"gradients grow, at no steady rate: {number(part)} times as large {after}{rest(lags, i, number)}"
    if half is not None and part <= 0.5:
        return (
            f"gradients vanish, at no steady rate: half is lost within {steps(half)}{lost(lags, i)}, {percent(part)} "
            f"is left {after}"
        )
    return f"gradients {'fade' if part < 1 else 'grow'} slowly: {percent(part)} is left {after}{rest(lags, i, percent)}"


def steady_change(lags: Lags, i: int, them: str = "they") -> str:
    """What a straight decay amounts to, with its spread over lanes and over losses. It begins at lag 1: where lag 0
    lies off that line, that is said. them: "they", or "it" for one gradient.
    """
    rate, norm = float(lags.rate[i]), lags.curve(i)[0]
    off_the_line = len(norm) > 2 and not 1 / OFF < norm[1] / (norm[0] * rate) < OFF
    begin = "from one step back on " if them == "it" else "from lag 1 on "
    return f"{begin * off_the_line}{change(rate, them)}{steadily(lags, i)}"


def reach_of(lags: Lags, i: int, part: float = 0.9) -> str:
    """The lag within which that part of a layer's gradient arises, with the window it was measured in."""
    far = int((lags.horizon_90 if part == 0.9 else lags.horizon_99)[i])
    window = f"(measured in {steps(int(lags.measured[i]))}"
    return f"{steps(far)} {window})" if lags.settled(part)[i] else f"at least {steps(far)} {window}; measure longer)"


@conclusion.register
def _(measure: Shares, layer: int | None = None) -> str:
    i = int(np.argmax(np.nan_to_num(measure.bias[:, 0]))) if layer is None else layer
    bias, bin_edges = measure.bias[i], measure.bin_edges
    enough = int(np.argmax(bias <= CLOSE)) if np.any(bias <= CLOSE) else len(bias) - 1
    last = int(bin_edges[enough + 1]) - 1
    if not np.isfinite(measure.total[i]):
        text = "the gradient of W_hh is not finite"
    elif measure.total[i] == 0:
        text = "the gradient of W_hh is 0"
    elif len(bias) == 1:
        text = f"the gradient of W_hh was measured in one bin, lags 0 to {last}"
    elif enough == len(bias) - 1:
        text = f"all lags count: cut before lag {bin_edges[enough]}, dL/dW_hh is {percent(bias[enough - 1])} off"
    else:
        lags = "lag 0 alone gives" if last == 0 else f"lags 0 to {last} give"
        text = f"{lags} dL/dW_hh to within {percent(bias[enough])}"
    return _say(measure.layers, i, text)


@conclusion.register
def _(measure: Jacobians, layer: int | None = None) -> str:
    norm = measure.norm[measure.there]
    if not norm.size:
        return "No state passes a step: resets or the ends of lanes close all of them"
    if not np.all(np.isfinite(norm)):
        return f"{percent(float(np.mean(~np.isfinite(norm))))} of the step Jacobians are not finite"
    middle, above = float(np.median(norm)), float(np.mean(norm > 1 + ROUNDING))
    bound = "" if measure.bound is None else f" (bound {number(measure.bound)})"
    if np.all(np.abs(norm - 1) <= ROUNDING):
        return f"|J_t| is 1 at every step: lengths are kept{bound}"
    if above == 0:
        return f"Every step contracts: |J_t| is at most {number(float(norm.max()))}{bound}"
    return f"|J_t| exceeds 1 at {percent(above)} of the steps; its median is {number(middle)}{bound}"


@conclusion.register
def _(measure: Products, layer: int | None = None) -> str:
    ends = int(measure.n[-1]) if measure.reset is None else measure.reset - 1
    n, log = ends, measure.log_singular[ends]
    until = "" if measure.reset is None else f"; then a reset ends the lane's memory, after {steps(n)}"
    if n == 0:
        return "A product of no factors: every singular value is 1" + until
    if np.isnan(log[0]):
        return "The product is not finite"
    if np.isneginf(log[0]):
        first = int(measure.n[np.argmax(np.isneginf(measure.log_singular[:, 0]))])
        return f"Nothing passes {steps(first)}: the product of the Jacobians is 0"
    smallest = f"; its smallest singular value is {exponential(log[-1])}" if len(log) > 1 else ""
    norm = f"its norm is {exponential(log[0])}, at the end {number(end_rate(measure))} a step"
    where = f" (along lane {measure.lane})"
    return f"The product of {n} Jacobians {_becomes(float(log[0]))}: {norm}{smallest}{where}{until}"


def end_rate(measure: Products) -> float:
    """The factor per step of a product's norm over its later half, since it may grow first and then hold; NaN where it
    has none.
    """
    n = int(measure.n[-1]) if measure.reset is None else measure.reset - 1
    ends = measure.log_singular[[n // 2, n], 0]
    if n == 0 or not np.isfinite(ends).all():
        return math.nan
    return math.exp(min((ends[1] - ends[0]) / (n - n // 2), 700.0))


def _becomes(log: float) -> str:
    """What a product of this norm, by its logarithm, does to what it is applied to."""
    if abs(log) <= math.log(2):
        return "keeps lengths to within a factor of 2"
    if abs(log) < math.log(GONE):
        return "shrinks" if log < 0 else "grows"
    return "vanishes" if log < 0 else "explodes"


@conclusion.register
def _(measure: Spectrum, layer: int | None = None) -> str:
    i = int(np.argmax(measure.radius))
    radius, gate = float(measure.radius[i]), f" (gate {measure.gates[i]})" if len(measure.gates) > 1 else ""
    start = f"The largest |eigenvalue| is {number(radius)}{gate}"
    if not math.isfinite(radius):
        return "W_hh is not finite"
    if abs(radius - 1) <= ON_CIRCLE:
        return f"{start}, on the unit circle: powers of W_hh neither vanish nor explode"
    if len(measure.gates) > 1:
        where = "outside" if radius > 1 else "inside"
        return f"{start}, {where} the unit circle"
    if radius > 1:
        return f"{start}, outside the unit circle: powers of W_hh explode, doubling every {life(radius)}"
    first = "" if measure.norm[i] <= 1 else f"; |W_hh| = {number(float(measure.norm[i]))}, so they may grow first"
    return f"{start}, inside the unit circle: powers of W_hh vanish, half is lost every {life(radius)}{first}"


@conclusion.register
def _(measure: CellPath, layer: int | None = None) -> str:
    at = len(measure.n) - 1 if measure.lanes is None else int(np.flatnonzero(measure.lanes)[-1])
    n, path, full = int(measure.n[at]), float(measure.path[at]), float(measure.full_c[at])
    if n == 0:
        return "No step was taken: the cell path is 1"
    over = f"After {steps(n)} the cell path alone keeps {number(path)}, all paths together {number(full)}"
    if not (math.isfinite(path) and math.isfinite(full)):
        return over
    if full > 2 * path:
        return f"{over}: most passes through h"
    if path > 2 * full:
        return f"{over}: the paths through h cancel it"
    return f"{over}: the cell carries it"


@conclusion.register
def _(measure: Gates, layer: int | None = None) -> str:
    ends = np.nan_to_num(stuck(measure))
    i = int(np.argmax(ends))
    several = len(measure.names) > 1
    if not measure.bounded and measure.low[0] > 0:
        return f"{percent(float(measure.low[0]))} of the state's values are 0: units that are off pass no gradient"
    if not measure.bounded:
        return "The activation has no ends: no value is saturated"
    of = f"the values of gate {measure.names[i]}" if several else "the state's values"
    keeps = [
        f"; {percent(float(high))} of the values of gate {name} lie near 1: there the state is kept, which is memory"
        for name, high in zip(measure.names, measure.high, strict=True)
        if name == _keeper(measure) and high >= SATURATED
    ]
    kept = "".join(keeps)
    if ends[i] >= SATURATED:
        side = "lower" if measure.low[i] > measure.high[i] or measure.names[i] == _keeper(measure) else "upper"
        return f"Saturated: {percent(ends[i])} of {of} lie at its ends, most at the {side} one{kept}"
    if ends[i] == 0:
        return f"No value is saturated{kept}"
    degree = "Little" if ends[i] < SATURATED / 4 else "Some"
    most = ", the most of all gates" if several else ""
    return f"{degree} saturation: {percent(ends[i])} of {of} lie at its ends{most}{kept}"


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
        return "Every perturbation dies completely" if largest == -math.inf else "The exponents are not finite"
    known = f"± {number(error)} nats per step" if math.isfinite(error) else "nats per step, error unknown"
    value = f"largest exponent {number(largest)} {known} over {steps(measure.steps)}"
    kind = course(measure)
    if kind == "hold":
        return f"At the edge: perturbations neither grow nor shrink ({value})"
    if kind == "unknown":
        return f"Not settled: perturbations may grow or shrink ({value})"
    if kind == "explode":
        positive = int(np.count_nonzero(measure.exponents > 2 * np.nan_to_num(measure.error)))
        where = f"{positive} direction" + ("" if positive == 1 else "s")
        return f"Unstable: perturbations double every {life(math.exp(largest))} in {where} ({value})"
    return f"Stable: perturbations halve every {life(math.exp(largest))} ({value})"


def course(measure: Lyapunov) -> str:
    """What perturbations do: "vanish", "hold", "explode", or "unknown" where the error does not tell."""
    largest, doubt = float(measure.exponents[0]), 2 * float(np.nan_to_num(measure.error[0]))
    if not math.isfinite(largest):
        return "vanish" if largest == -math.inf else "unknown"
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
        return "Nothing was recorded"
    first, last = measure[0], measure[-1]
    fell = f"{kind.capitalize()} went from {number(first[kind])} to {number(last[kind])}"
    parts = [f"{fell} in {last['step']} steps"]
    held = [(r[f"heldout_{kind}"], r["step"]) for r in measure if r.get(f"heldout_{kind}") is not None]
    if held:
        best, at = min(held)
        turned = held[-1][0] > 1.05 * best
        parts.append(f"held-out {number(held[-1][0])}" + (f", up from {number(best)} at step {at}" if turned else ""))
    clipped = sum(r["clipped"] * r["steps"] for r in measure) / max(sum(r["steps"] for r in measure), 1)
    parts.append(f"{percent(clipped)} of the steps were clipped")
    if skipped := sum(r.get("skipped") or 0 for r in measure):
        parts.append(f"{skipped} skipped")
    horizons = [
        ("" if r.get("horizon_settled") else "at least ") + number(r["horizon"])
        for r in measure
        if r.get("horizon") is not None
    ]
    if horizons:
        parts.append(f"horizon {horizons[0]} to {horizons[-1]} steps")
    return "; ".join(parts)


def _ratio(last: float, first: float) -> float:
    return float(last / first) if first > 0 else (math.inf if last > 0 else 0.0)


def _say(layers: tuple[str, ...], i: int, text: str) -> str:
    """The layer's name before the text where there are several, a capital letter where not."""
    return f"{layers[i]}: {text}" if len(layers) > 1 else text[0].upper() + text[1:]
