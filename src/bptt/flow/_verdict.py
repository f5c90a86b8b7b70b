"""All measurements of a net taken together: what happens to its gradients, and what to change."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..cells import CELLS, Cell
from ._by_lag import Lags
from ._cell_path import CellPath
from ._compare import Comparison
from ._gates import Gates
from ._jacobians import Jacobians, Products
from ._lags import LagMap
from ._lyapunov import Lyapunov
from ._plain import in_words
from ._shares import Shares
from ._spectrum import Spectrum
from ._steps import StepChain
from .conclusions import NOTHING, SATURATED, conclusion, course, end_rate, stuck
from .costs import advice
from .course import steepest
from .horizon import left
from .language import say
from .shown import Shown
from .wording import STEADY, number, percent, steps, trend

__all__ = ["Verdict", "verdict"]

TOPICS: dict[type, str] = {
    Lags: "by lag",
    LagMap: "by loss",
    Shares: "weights",
    Jacobians: "steps",
    Products: "products",
    Lyapunov: "exponents",
    Spectrum: "W_hh",
    CellPath: "cell path",
    Gates: "gates",
    Comparison: "policies",
    list: "training",
    tuple: "training",
}
"""What each measurement is called in a verdict, the most telling first."""

SHORT = 20
"""Steps: where gradients are halved faster than this, or 90 % arises within as few, something is worth doing."""


FAR_ENOUGH = SHORT * math.log2(10)
"""Steps within which 90 % of gradients that halve every `SHORT` steps arises."""

KEPT = 0.9
"""The part that is left at the last lag from which on gradients are said to hold in a window that is short."""

LITTLE = 0.02
"""The relative error of a gradient that is said to lose next to nothing."""

ALIKE = 1.25
"""The factor between two half-lives up to which they are said to agree."""


@dataclass(frozen=True, repr=False)
class Verdict(Shown):
    """The conclusion of several measurements: what happens to the gradients, and what to change.

    headline: the most telling conclusion. of: the measurement that the headline is about. plain: what it means, for a
    reader who trains nets; "" where the lags were not measured. findings: (topic, conclusion) of each measurement, with
    that of the headline among them. advice: what to change, each with the measurement that it rests on: first what
    breaks training, then what the net cannot learn, then what costs too much; empty where there is nothing to change.
    conditions: how it was measured, where the net is not trained like that. `str` writes all of it, for a screen; a
    notebook shows it with its picture.
    """

    headline: str
    findings: tuple[tuple[str, str], ...]
    advice: tuple[str, ...]
    conditions: tuple[str, ...] = ()
    plain: str = ""
    of: Any = field(default=None, compare=False)

    def __repr__(self) -> str:
        change = say("{count} to change", count=len(self.advice)) if self.advice else say(NOTHING).lower()
        text = "Verdict: {headline}\n({count} findings, {change}; print it to read them)"
        return say(text, headline=self.headline, count=len(self.findings), change=change)

    def __str__(self) -> str:
        from rich.cells import cell_len, set_cell_size  # here, so that importing the package loads no rich

        width = max(cell_len(topic) for topic, _ in self.findings)
        lines = [self.plain or self.headline, *self.conditions, ""]
        lines += [say("What to change:"), *(f"  - {text}" for text in self.advice)] if self.advice else [say(NOTHING)]
        return "\n".join([*lines, "", *(f"  {set_cell_size(topic, width)}  {text}" for topic, text in self.findings)])


def verdict(*measures: Any) -> Verdict:
    """Give the verdict on measurements: the horizon, whether gradients vanish or explode and at what rate, and what to
    change.

    measures: dataclasses of `bptt.flow`, at least one, in any order; a list of records is that of a training run.

    Raises ValueError without any measurement, TypeError for what is not one.

    >>> import numpy as np, bptt
    >>> lag = np.arange(30)
    >>> norm, horizon = 0.5 ** lag[None, :], np.array([3])
    >>> lags = bptt.flow.Lags(
    ...     ("layer 0",), lag, norm, 30 - lag, np.array([0.5]), np.zeros(1), horizon, horizon + 3, np.array([True])
    ... )
    >>> print(verdict(lags))
    Going back in time from a loss, its gradient fades: each step keeps 50 %. 90 % of it stays within 3 steps of the
    loss, 99 % within 6 (30 steps were measured): what depends on events longer ago is hardly learnt.
    <BLANKLINE>
    What to change:
      - To learn over more than 3 steps (half is lost within 1 step): bptt.nn.init.orthogonal_(layer), or an LSTM
      - Losses farther than 6 steps add less than 1 %: gradient="truncated:7" loses next to nothing of what
        reaches the states
    <BLANKLINE>
      by lag  Gradients vanish: each step keeps 50 %; 90 % arises within 3 steps (measured in 30 steps)
    """
    if not measures:
        raise ValueError("measures must hold at least one measurement: got none")
    order = list(TOPICS)
    for measure in measures:
        if type(measure) not in TOPICS:
            raise TypeError(f"measures must be dataclasses of bptt.flow or lists of records: got {measure!r}")
    ranked = sorted(measures, key=lambda measure: order.index(type(measure)))
    findings = [(say(TOPICS[type(m)]), text) for m in ranked for text in _conclusions(m)]
    findings += [(say("rates"), text) for text in _rates(ranked)]
    ordered = sorted(_advice(ranked), key=lambda advice: advice[0])
    sends = any(isinstance(m, Lags) and m.there.any() for m in ranked)  # else nothing is sent, whatever the states are
    first = next(filter(_broken, ranked), ranked[0]) if sends else ranked[0]
    lags = next((m for m in ranked if isinstance(m, Lags)), None)
    return Verdict(
        headline=conclusion(first),
        findings=tuple(findings),
        advice=tuple(dict.fromkeys(text for _, text in ordered)),
        plain="" if lags is None else in_words(lags),
        of=first,
    )


def _rates(measures: list[Any]) -> Iterator[str]:
    """Which quantity each rate is, where there are two, and whether they agree."""
    lags = next((m for m in measures if isinstance(m, Lags)), None)
    exponents = next((m for m in measures if isinstance(m, Lyapunov)), None)
    product = next((m for m in measures if isinstance(m, Products)), None)
    rates, said = [], []
    if lags is not None:
        of = next((m.layer for m in (exponents, product) if m is not None), None)
        i = lags.layers.index(of) if of in lags.layers else steepest(lags)
        if lags.straight[i] and lags.rate[i] > 0:
            rates.append(float(lags.rate[i]))
            text = "by lag {rate} a step, the mean contribution of this batch's losses"
            said.append(say(text, rate=number(rates[-1])))
        else:
            said.append(say("by lag no one rate, for the decay is no straight line"))
    if exponents is not None and np.isfinite(exponents.exponents[0]):
        rates.append(math.exp(min(float(exponents.exponents[0]), 700.0)))
        text = "exponent {rate}, a typical perturbation over {steps}"
        said.append(say(text, rate=number(rates[-1]), steps=steps(exponents.steps)))
    if product is not None and math.isfinite(rate := end_rate(product)) and rate > 0:
        rates.append(rate)
        text = "product {rate}, the best direction along lane {lane} at its end"
        said.append(say(text, rate=number(rate), lane=product.lane))
    if len(said) < 2:
        return
    if len(rates) == len(said):
        logs = [math.log(rate) for rate in rates]
        apart = max(logs) - min(logs)
        alike = apart <= math.log(ALIKE) * max(map(abs, logs)) or apart < 1 / STEADY
    else:
        alike = False
    differ = (
        ": they differ, as they may where steps are not alike: a mean follows its largest parts, an exponent is a mean "
        "of logarithms, a product is one lane's"
    )
    agree = ": they agree, as they must where all steps are alike"
    yield say("; ").join(said) + (say(agree) if alike else say(differ))


def _conclusions(measure: Any) -> Iterator[str]:
    if isinstance(measure, Lags | Shares | LagMap):
        for layer in range(len(measure.layers)):
            yield conclusion(measure, layer)
    else:
        yield conclusion(measure)


_WATCH = "bptt.flow.watch says where the first value that is not finite arises"
_TAME = "Clip the gradient's norm; begin with bptt.nn.init.orthogonal_(layer), or a smaller learning rate"
_TAME_STEP = "Clip the gradient's norm; begin with smaller recurrent weights in the step, or a smaller learning rate"

BREAKS, UNLEARNT, COSTS = 0, 1, 2
"""What a piece of advice is about: training that breaks, what cannot be learnt, what costs more than it must."""


def _advice(measures: list[Any]) -> Iterator[tuple[int, str]]:
    cell = _cell(measures)
    lags = next((m for m in measures if isinstance(m, Lags)), None)
    shares = next((m for m in measures if isinstance(m, Shares)), None)
    broken = any(map(_broken, measures))
    for measure in measures:
        match measure:
            case Lags():
                yield from _on_lags(measure, cell, shares)
            case Shares() if _broken(measure):
                yield BREAKS, say("The gradient of W_hh is not finite: {watch}", watch=say(_WATCH))
            case Lyapunov() if course(measure) == "explode" and not broken:
                tame = say(_TAME_STEP if _of_step(measure.layer) else _TAME)
                largest = number(float(measure.exponents[0]))
                yield BREAKS, say("{tame} (exponents: the largest is {value})", tame=tame, value=largest)
            case Spectrum() if cell is not None and cell.slope is not None and measure.radius[0] > 1.5:
                text = "W_hh is large for a simple RNN (radius {radius}): bptt.nn.init.orthogonal_"
                yield BREAKS, say(text, radius=number(measure.radius[0]))
            case Gates() if np.any(stuck(measure) >= SATURATED) and measure.bounded and (lags is None or _fades(lags)):
                i = int(np.argmax(stuck(measure)))
                where = say("{part} of {gate}", part=percent(float(stuck(measure)[i])), gate=measure.names[i])
                text = "Saturated values pass no gradient ({where}): smaller initial weights, a smaller learning rate"
                yield UNLEARNT, say(text, where=where)
            case Comparison():
                yield from ((COSTS, text) for text in _on_policies(measure))
            case list() | tuple() if measure and sum(r["clipped"] for r in measure) / len(measure) > 0.5:
                clipped = percent(sum(r["clipped"] for r in measure) / len(measure))
                text = "Most steps are clipped ({part}): raise clip, or lower the learning rate"
                yield BREAKS, say(text, part=clipped)
            case _:
                pass


def _broken(measure: Any) -> bool:
    """Whether it holds a gradient that is not finite: what has no data is not one."""
    if isinstance(measure, Lags):
        return any(not np.all(np.isfinite(measure.curve(i)[0])) for i in range(len(measure.layers)))
    return isinstance(measure, Shares) and not np.all(np.isfinite(measure.total))


def _fades(lags: Lags) -> bool:
    """Whether a layer's gradients reach less far than is good: a tenth is left of those halved in `SHORT` steps."""
    return any(_short(lags, i) for i in range(len(lags.layers)))


def _short(lags: Lags, i: int) -> bool:
    return bool(lags.settled()[i]) and lags.horizon_90[i] < FAR_ENOUGH


def _cell(measures: list[Any]) -> Cell | None:
    """Which cell it is, where a measurement tells."""
    return next((CELLS[m.cell] for m in measures if getattr(m, "cell", "") in CELLS), None)


def _on_lags(lags: Lags, cell: Cell | None, shares: Shares | None) -> Iterator[tuple[int, str]]:
    i, of_step = steepest(lags), _of_step(lags.layers[0])
    norm = lags.curve(i)[0]
    if not np.all(np.isfinite(norm)):
        yield BREAKS, say("Begin with smaller recurrent weights; {watch}", watch=say(_WATCH))
        return
    rate, rest = float(lags.rate[i]), left(norm)[1] if len(norm) else math.nan
    if trend(rate, int(lags.lag[-1])) == "explode" and rest > 2:
        tame = say(_TAME_STEP if of_step else _TAME)
        text = "{tame} (by lag: {times} times as large after {lag})"
        yield BREAKS, say(text, tame=tame, times=number(rest), lag=len(norm) - 1)
    if _unknown(lags, i):
        measured = steps(int(lags.measured[i]))
        text = "In {steps} the horizon has not settled: measure longer sequences before anything is changed"
        yield COSTS, say(text, steps=measured)
    if not _short(lags, i):
        return
    half = left(norm)[0]
    if half is not None:
        remedy = say("bptt.nn.init.orthogonal_(layer), or an LSTM")
        if of_step:
            text = "recurrent weights whose singular values begin near 1, or a cell with gates that keep its state"
            remedy = say(text)
        if cell is not None and cell.keeps is not None:
            remedy = "bptt.nn.init.chrono_(layer, longest)"
            remedy += say(", or bptt.nn.init.forget_bias_(layer, 1)") if cell.states == 2 else ""
        text = "To learn over more than {far} (half is lost within {half}): {remedy}"
        yield UNLEARNT, say(text, far=steps(float(lags.horizon_90[i])), half=steps(half), remedy=remedy)
    if np.all(lags.settled(0.99)):
        far = int(lags.horizon_99.max())
        window = far + 1 if shares is None else _keeps(shares, far + 1)
        if of_step:
            window = far + 2  # lag 0 is the carry that the loss's own step receives, made by the step before
        if window is not None:
            of = say(" of what reaches the states") if shares is None else ""
            text = 'Losses farther than {far} steps add less than 1 %: gradient="{policy}" loses next to nothing{of}'
            yield COSTS, say(text, far=far, policy=f"truncated:{window}", of=of)


def _of_step(layer: str) -> bool:
    """Whether a measurement is that of a scan: of the carry of a step of the user's own."""
    return layer == StepChain.name


def _unknown(lags: Lags, i: int) -> bool:
    """Whether more lags could show that a layer's gradients reach less far than is good, where these do not."""
    if lags.measured[i] < 2:
        return bool(lags.measured[i])
    level = bool(lags.straight[i]) and trend(float(lags.rate[i]), int(lags.measured[i]) - 1) != "vanish"
    holds = level and left(lags.curve(i)[0])[1] >= KEPT
    return bool(not (lags.settled()[i] or holds) and lags.horizon_90[i] < FAR_ENOUGH)


def _keeps(shares: Shares, window: int) -> int | None:
    """A window from this one on whose gradient of W_hh, of every layer, is close to the full one; None where only the
    whole is. What lies between two edges of the shares is known by the nearer edge below it, else the one above.
    """
    bias = np.nan_to_num(shares.bias).max(0)  # NaN: the full gradient is 0
    close = shares.bin_edges[1:-1][bias[:-1] <= LITTLE]
    if np.any(close <= window) and int(close[close <= window].max()) == max(
        (int(edge) for edge in shares.bin_edges[1:] if edge <= window), default=0
    ):
        return window
    above = close[close >= window]
    return int(above.min()) if len(above) else None


def _on_policies(comparison: Comparison) -> Iterator[str]:
    text = advice(comparison)
    if text is not None:
        yield text
    own = comparison.own
    if (own is None or own.startswith("randomized")) and comparison.critical_p >= 1:
        yield say("No randomized policy keeps a finite variance on long sequences here: adjoints do not shrink")
