"""The (t, lag) map of what every loss sends back."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from ..flow import LagMap, conclusion
from ..flow.coarser import coarser
from ..flow.language import say
from .style import GREY, HEAT, PALE, VERMILLION, blank, readable, styled, title

__all__ = ["lag_map"]

DECADES = 12
"""Shown at most below the largest; what is smaller, and not at lag 0, gets the colour of the smallest."""
CELLS = 1000
"""Drawn at most along an axis: more are averaged over neighbours, since a picture has no room for them."""


@styled
def lag_map(measure: LagMap, *, layer: int = 0, ax: Axes | None = None) -> Figure:
    """Heat map of |contribution of the loss at t to the adjoint at t - lag|, on a logarithmic scale.

    measure: what `bptt.flow.lag_map` gives. layer: which of its L. ax: where to draw; a new figure by default. Where
    there is no data (before or after a sequence, beyond a reset, no loss) the ground shows through.

    Raises IndexError for a layer that is not there.

    >>> import torch, bptt, bptt.plots
    >>> figure = bptt.plots.lag_map(bptt.flow.lag_map(bptt.nn.RNN(2, 4), torch.randn(20, 3, 2)))
    >>> figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()
    ('t, step of the loss', 'lag, steps back')
    """
    figure, axes = blank(ax)
    t, lag, norm = coarser(measure, layer, CELLS)
    broken, finite = np.isinf(norm), np.isfinite(norm)
    positive = norm[finite & (norm > 0)]
    high = max(float(positive.max()), 1e-280) if positive.size else 1.0
    begin = norm[finite & (norm > 0) & (lag[None, :] == lag[0])]  # so that an explosion is seen from where it starts
    least = min(high * 10.0**-DECADES, float(np.median(begin))) if begin.size else high * 10.0**-DECADES
    low = max(float(positive.min()), least) if positive.size else high / 10
    floor = min(low, high / 2)
    scale = LogNorm(floor, high)
    borders = _borders(t), _borders(lag)
    axes.set_facecolor(PALE)
    values = np.where(finite, np.maximum(norm, floor), np.nan)
    mesh = axes.pcolormesh(*borders, np.ma.masked_invalid(values.T), norm=scale, cmap=colormaps[HEAT], rasterized=True)
    keys = [Patch(facecolor=PALE, edgecolor=GREY, label=say("no data"))] if np.any(np.isnan(norm)) else []
    if np.any(broken):
        red = np.ma.masked_where(~broken.T, np.ones_like(norm.T))
        axes.pcolormesh(*borders, red, cmap=ListedColormap([VERMILLION]), rasterized=True)
        keys.append(Patch(facecolor=VERMILLION, label=say("not finite")))
    if keys:
        axes.legend(handles=keys, loc="upper left", frameon=True, framealpha=0.9, edgecolor="none")
    below = bool(np.any(norm[finite] < low))
    bar = figure.colorbar(mesh, ax=axes, extend="min" if below else "neither", pad=0.02)
    readable(bar.ax.yaxis, high / floor)
    bar.set_label(say("|dL_t / d{state}| at t - lag,\nloss per unit of state", state=measure.state))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))  # there is no half of a step
    axes.set_xlabel(say("t, step of the loss"))
    axes.set_ylabel(say("lag, steps back"))
    title(figure if ax is None else ax, conclusion(measure, layer))
    return figure


def _borders(middles: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Borders between neighbours, half a distance beyond the first and the last."""
    if len(middles) == 1:
        return np.array([middles[0] - 0.5, middles[0] + 0.5])
    between = (middles[1:] + middles[:-1]) / 2
    return np.concatenate([[2 * middles[0] - between[0]], between, [2 * middles[-1] - between[-1]]])
