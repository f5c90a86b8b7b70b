"""Singular values along a product of step Jacobians."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..flow import Products, conclusion
from ..flow.language import say
from .style import BLACK, GREY, blank, empty, logarithmic, styled, title

__all__ = ["products"]

LINES_AT_MOST = 32
"""Singular values drawn: the largest, the smallest, and evenly between."""


@styled
def products(measure: Products, *, ax: Axes | None = None) -> Figure:
    """The singular values of J_(k+n) ... J_(k+1) against n on a logarithmic scale, with the bound if there is one.

    measure: what `bptt.flow.products` gives. What float64 would round away beside the largest leaves the picture.
    ax: where to draw; a new figure by default.

    >>> import torch, bptt, bptt.plots
    >>> figure = bptt.plots.products(bptt.flow.products(bptt.nn.RNN(2, 4), torch.randn(20, 3, 2)))
    >>> figure.axes[0].get_xlabel()
    'n, factors in the product'
    """
    figure, axes = blank(ax)
    count = measure.singular.shape[1]
    chosen = np.unique(np.linspace(0, count - 1, min(count, LINES_AT_MOST)).astype(int))
    values = np.exp(np.clip(measure.log_singular, math.log(1e-300), math.log(1e300)))
    values = np.where(np.isfinite(measure.log_singular), values, np.nan)
    for j in chosen[::-1]:
        outer = j in (0, count - 1)
        ends = {0: say("largest"), count - 1: say("smallest")}
        label = ends.get(int(j)) if count > 1 else say("the only one")
        axes.plot(
            measure.n,
            values[:, j],
            color=BLACK if outer else GREY,
            linestyle="-" if j == 0 else "--" if outer else "-",
            linewidth=2.2 if outer else 0.7,
            marker="o" if len(measure.n) == 1 else "",
            label=label,
        )
    if np.all(np.isnan(values)):
        empty(axes, say("no product is finite"))
    else:
        least = max(measure.least, math.log(1e-300))
        logarithmic(axes, values[measure.log_singular >= least])
        if measure.bound is not None:
            low, high = axes.get_ylim()
            bound = np.where(measure.bound <= 1e6 * high, measure.bound, np.nan)
            label = say("bound") + r" $(\beta_W \beta_h)^n$"
            axes.plot(measure.n, bound, color=BLACK, linestyle=":", linewidth=1.6, label=label)
            axes.set_ylim(low, max(high, float(np.nanmax(bound, initial=high))))
        axes.axhline(1, color=GREY, linewidth=0.8, zorder=1)
        axes.legend(loc="best")
    axes.set_xlabel(say("n, factors in the product"))
    axes.set_ylabel(say("singular values of the product"))
    title(figure if ax is None else ax, conclusion(measure))
    return figure
