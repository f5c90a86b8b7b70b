"""Lyapunov exponents, and whether they have converged."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..flow import Lyapunov, conclusion
from ..flow.language import say
from .style import BLACK, GREY, LINES, Picture, empty, sparse, styled, title

__all__ = ["lyapunov"]


@styled
def lyapunov(measure: Lyapunov) -> Figure:
    """Left: the exponents in descending order with their standard errors. Right: the estimates step by step.

    measure: what `bptt.flow.lyapunov` gives.

    >>> import torch, bptt, bptt.plots
    >>> figure = bptt.plots.lyapunov(bptt.flow.lyapunov(bptt.nn.RNN(2, 4), torch.randn(60, 3, 2)))
    >>> [ax.get_xlabel() for ax in figure.axes]
    ['index, descending', 'steps averaged over']
    """
    figure = Picture(figsize=(8.0, 3.8), layout="constrained")
    spectrum, running = figure.subplots(1, 2)
    values = np.where(np.isfinite(measure.exponents), measure.exponents, np.nan)
    index = np.arange(1, len(values) + 1)
    spectrum.axhline(0, color=GREY, linewidth=0.8)
    if np.all(np.isnan(values)):
        empty(spectrum, say("no exponent is finite"))
    else:
        error = np.where(np.isfinite(measure.error), measure.error, 0.0)
        spectrum.errorbar(
            index, values, yerr=error, color=BLACK, marker="o", markersize=3.5, linestyle="none", capsize=2
        )
    spectrum.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    spectrum.set_xlabel(say("index, descending"))
    spectrum.set_ylabel(say("exponent, nats per step"))
    steps = np.arange(1, len(measure.running) + 1)
    running.axhline(0, color=GREY, linewidth=0.8)
    chosen = np.unique(np.linspace(0, len(values) - 1, min(len(values), len(LINES))).round().astype(int))
    for line, j in zip(LINES, chosen, strict=False):
        path = np.where(np.isfinite(measure.running[:, j]), measure.running[:, j], np.nan)
        running.plot(steps, path, **line, **sparse(len(steps), 8), label=say("number {j}", j=j + 1))
    running.set_xlabel(say("steps averaged over"))
    running.set_ylabel(say("estimate, nats per step"))
    running.legend(loc="best", ncols=2)
    title(figure, conclusion(measure))
    return figure
