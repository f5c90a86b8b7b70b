"""All measurements of a net taken together: what happens to its gradients, and what to change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ._cell_path import CellPath
from ._compare import Comparison
from ._conclusions import CLOSE, SATURATED, conclusion, steepest, total_error
from ._gates import Gates
from ._jacobians import Jacobians, Products
from ._lags import LagMap, Lags, Shares
from ._lyapunov import Lyapunov
from ._spectrum import Spectrum
from ._wording import half_life, number, percent, steps, trend

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

FAR = 0.75
"""The part of the lags measured within which a horizon is that of the net, and not the end of the sequence."""

SHORT = 20
"""Steps: gradients halved faster than this are worth doing something about."""


@dataclass(frozen=True)
class Verdict:
    """What to conclude from several measurements.

    headline: the most telling conclusion. findings: (topic, conclusion) of each measurement, the headline's included.
    advice: what to change, most useful first; empty where nothing is wrong. conditions: how it was measured, where that
    is not how the net is trained. `str` writes all of it, for a screen.
    """

    headline: str
    findings: tuple[tuple[str, str], ...]
    advice: tuple[str, ...]
    conditions: tuple[str, ...] = ()

    def __str__(self) -> str:
        width = max(len(topic) for topic, _ in self.findings)
        lines = [self.headline, "", *(f"  {topic:<{width}}  {text}" for topic, text in self.findings)]
        if self.conditions:
            lines += ["", *self.conditions]
        if self.advice:
            lines += ["", "What to change:", *(f"  - {text}" for text in self.advice)]
        return "\n".join(lines)


def verdict(*measures: Any) -> Verdict:
    """Horizon, whether gradients vanish or explode and at what rate, and what to change.

    measures: dataclasses of `bptt.flow`, at least one, in any order; a list of records is a training run's.

    Raises ValueError without any, TypeError for what is no measurement.

    >>> import numpy as np, bptt
    >>> lag = np.arange(30)
    >>> norm, horizon = 0.5 ** lag[None, :], np.array([3])
    >>> lags = bptt.flow.Lags(
    ...     ("layer 0",), lag, norm, 30 - lag, np.array([0.5]), np.zeros(1), horizon, horizon + 3, np.array([True])
    ... )
    >>> print(verdict(lags))
    Gradients vanish: each step keeps 50 %; 90 % arises within 3 steps
    <BLANKLINE>
      by lag  Gradients vanish: each step keeps 50 %; 90 % arises within 3 steps
    <BLANKLINE>
    What to change:
      - To learn over more than 3 steps: bptt.nn.init.orthogonal_(layer), or an LSTM with bptt.nn.init.chrono_
      - Losses farther than 6 steps add less than 1 %: gradient="truncated:7" loses next to nothing
    """
    if not measures:
        raise ValueError("measures must hold at least one measurement: got none")
    order = list(TOPICS)
    for measure in measures:
        if type(measure) not in TOPICS:
            raise TypeError(f"measures must be dataclasses of bptt.flow or lists of records: got {measure!r}")
    ranked = sorted(measures, key=lambda measure: order.index(type(measure)))
    findings = tuple((TOPICS[type(m)], text) for m in ranked for text in _conclusions(m))
    return Verdict(conclusion(ranked[0]), findings, tuple(dict.fromkeys(_advice(ranked))))


def _conclusions(measure: Any) -> Iterator[str]:
    if isinstance(measure, Lags | Shares | LagMap):
        for layer in range(len(measure.layers)):
            yield conclusion(measure, layer)
    else:
        yield conclusion(measure)


def _advice(measures: list[Any]) -> Iterator[str]:
    cell = _cell(measures)
    broken = any(isinstance(m, Lags) and not np.all(np.isfinite(m.norm)) for m in measures)
    for measure in measures:
        match measure:
            case Lags():
                yield from _on_lags(measure, cell)
            case Lyapunov() if measure.exponents[0] > 2 * np.nan_to_num(measure.error[0]) and not broken:
                yield _TAME
            case Spectrum() if measure.gates == ("h",) and measure.radius[0] > 1.5:
                yield f"W_hh is large for a simple RNN (radius {number(measure.radius[0])}): bptt.nn.init.orthogonal_"
            case Gates() if np.any(measure.low + measure.high >= SATURATED) and measure.bounded:
                yield "Saturated values pass no gradient: smaller initial weights, a smaller learning rate"
            case Comparison():
                yield from _on_policies(measure)
            case list() | tuple() if measure and sum(r["clipped"] for r in measure) / len(measure) > 0.5:
                yield "Most steps are clipped: raise clip, or lower the learning rate"
            case _:
                pass


_WATCH = "bptt.flow.watch says where the first value that is not finite arises"
_TAME = "Clip the gradient's norm; begin with bptt.nn.init.orthogonal_(layer), or a smaller learning rate"


def _cell(measures: list[Any]) -> str | None:
    """Which cell it is, where a measurement tells."""
    for measure in measures:
        names = measure.names if isinstance(measure, Gates) else getattr(measure, "gates", ())
        if "f" in names or isinstance(measure, CellPath):
            return "lstm"
        if names:
            return "gru" if "z" in names else "rnn"
    return None


def _on_lags(lags: Lags, cell: str | None) -> Iterator[str]:
    i = steepest(lags)
    if not np.all(np.isfinite(lags.norm[i])):
        yield f"Begin with smaller recurrent weights; {_WATCH}"
        return
    rate = float(lags.rate[i])
    kind = trend(rate, int(lags.lag[-1]))
    if kind == "explode":
        yield _TAME
    if kind == "vanish" and half_life(rate) < SHORT:
        remedy = {
            "lstm": "bptt.nn.init.chrono_(layer, longest), or bptt.nn.init.forget_bias_(layer, 1)",
            "gru": "bptt.nn.init.chrono_(layer, longest)",
            "rnn": "bptt.nn.init.orthogonal_(layer), or an LSTM with bptt.nn.init.chrono_",
        }[cell or "rnn"]
        yield f"To learn over more than {steps(float(lags.horizon_90[i]))}: {remedy}"
    far = int(lags.horizon_99.max())
    if kind == "vanish" and np.all(lags.complete) and far < FAR * lags.lag[-1]:
        yield (
            f'Losses farther than {far} steps add less than 1 %: gradient="truncated:{far + 1}" loses next to nothing'
        )


def _on_policies(comparison: Comparison) -> Iterator[str]:
    full = next((row for row in comparison.rows if row.policy == "full"), None)
    near = [row for row in comparison.rows if row.policy != "full" and 0 < total_error(row) <= CLOSE]
    if full is not None and near:
        best = min(near, key=lambda row: row.seconds)
        if best.seconds < 0.9 * full.seconds:
            yield f'gradient="{best.policy}" saves time and costs {percent(total_error(best))} of the gradient'
    if np.isfinite(comparison.critical_p) and comparison.critical_p >= 1:
        yield "No randomized policy keeps a finite variance on long sequences here: adjoints do not shrink"
