"""How the gradient's norm decays by lag."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..flow import Lags, Products, conclusion
from ..flow.course import at_least, steepest
from ..flow.horizon import fitted
from ..flow.language import say
from ..flow.wording import number, percent, trend
from .style import BLUE, GREY, LINES, blank, empty, logarithmic, sparse, styled, title

__all__ = ["decay"]


@styled
def decay(measure: Lags, *, bound: float | Products | None = None, ax: Axes | None = None) -> Figure:
    """The mean norm by lag on a logarithmic scale, its fitted rate, the horizons, and the bound if there is one.

    measure: what `bptt.flow.by_lag` gives; every layer is a line, the steepest has the range of its lanes and its
    horizons drawn, and its fit where the decay is a straight line. A horizon that the window may have cut short is
    labelled "at least". bound: beta_W beta_h, the factor per step that no norm can exceed, or the `Products` that hold
    it. ax: where to draw; a new figure by default.

    >>> import torch, bptt, bptt.plots
    >>> rnn, x = bptt.nn.RNN(2, 4), torch.randn(20, 3, 2)
    >>> bptt.plots.decay(bptt.flow.by_lag(bptt.flow.lag_map(rnn, x))).axes[0].get_yscale()
    'log'
    """
    figure, axes = blank(ax)
    main, lag = steepest(measure), measure.lag
    for i, name in enumerate(measure.layers):
        shown = _positive(measure.norm[i])
        label = name if len(measure.layers) > 1 else say("measured")
        axes.plot(lag, shown, **LINES[i % len(LINES)], **sparse(len(lag)), label=label, zorder=3)
    axes.set_xlabel(say("lag, steps back from the loss"))
    axes.set_ylabel(say("mean norm,\nloss per unit of state"))
    if len(lag) == 1:
        axes.set_xlim(-0.5, 0.5)
    norm, rate = _positive(measure.norm[main]), float(measure.rate[main])
    if not np.any(measure.there[main]):
        empty(axes, say("no loss reaches this layer"))
    elif np.all(np.isnan(norm)):
        empty(axes, say("no lag has a finite norm above 0"))
    else:
        logarithmic(axes, measure.norm)
        _lanes(axes, measure, main)
        if math.isfinite(rate) and rate > 0 and measure.straight[main]:
            _fit(axes, lag, norm, rate)
        if bound is not None:
            _bound(axes, lag, norm, bound)
        if trend(rate, int(lag[-1])) != "explode":  # then most arises at the end of what was measured, wherever it is
            _horizons(axes, measure, main)
        axes.legend(loc="best")
    title(figure if ax is None else ax, conclusion(measure))
    return figure


def _positive(norm: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.where(np.isfinite(norm) & (norm > 0), norm, np.nan)


def _lanes(ax: Axes, measure: Lags, layer: int) -> None:
    """From the lane that keeps least to the one that keeps most."""
    if measure.lane_norm is None or measure.lane_norm.shape[1] < 2:
        return
    lanes = _positive(measure.lane_norm[layer])
    seen = ~np.all(np.isnan(lanes), axis=0)
    low, high = np.nanmin(lanes[:, seen], axis=0), np.nanmax(lanes[:, seen], axis=0)
    ax.fill_between(measure.lag[seen], low, high, color=BLUE, alpha=0.2, linewidth=0, label=say("its lanes"), zorder=1)


def _fit(ax: Axes, lag: npt.NDArray[np.int64], norm: npt.NDArray[np.float64], rate: float) -> None:
    """The fitted slope."""
    line = fitted(norm, rate)
    ax.plot(
        lag, line, color=GREY, linewidth=5, alpha=0.45, label=say("fit: {rate} a step", rate=number(rate)), zorder=2
    )


def _bound(ax: Axes, lag: npt.NDArray[np.int64], norm: npt.NDArray[np.float64], bound: float | Products) -> None:
    """The norm at the first lag, carried on by the largest factor that a step can have."""
    if isinstance(bound, Products):
        if bound.beta_w is None or bound.beta_h is None:
            return
        bound = bound.beta_w * bound.beta_h
    if not bound > 0:
        return
    first = int(np.argmax(~np.isnan(norm)))
    logs = math.log(norm[first]) + (lag - lag[first]) * math.log(bound)
    shown = logs < math.log(1e6 * float(np.nanmax(norm)))  # a bound that leaves the picture must not shrink the rest
    ax.plot(
        lag[shown],
        np.exp(logs[shown]),
        color=GREY,
        linestyle=":",
        label=say("bound: {rate} a step", rate=number(bound)),
    )


def _horizons(ax: Axes, measure: Lags, layer: int) -> None:
    """Where 90 and 99 % have arisen."""
    for part, at, dashes in ((0.9, measure.horizon_90, "-"), (0.99, measure.horizon_99, "--")):
        lag = at_least(f"{at[layer]}", bool(measure.settled(part)[layer]))
        label = say("{part} within {lag}", part=percent(part), lag=lag)
        ax.axvline(float(at[layer]), color=GREY, linewidth=1, linestyle=dashes, label=label)
