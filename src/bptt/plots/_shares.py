"""The share of the weights' gradient by lag, and what cutting it off costs."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ..flow import Shares, conclusion
from ..flow.costs import CLOSE
from ..flow.language import say
from .style import BLUE, GREY, LINES, Picture, styled, title

__all__ = ["shares"]


@styled
def shares(measure: Shares, *, layer: int | None = None) -> Figure:
    """Bars: the share of dL/dW_hh by lag. Line: its relative error when everything beyond a lag is cut.

    measure: what `bptt.flow.shares` gives. layer: which of its L; by default the one that loses most.

    >>> import torch, bptt, bptt.plots
    >>> figure = bptt.plots.shares(bptt.flow.shares(bptt.nn.RNN(2, 4), torch.randn(20, 3, 2)))
    >>> [ax.get_ylabel() for ax in figure.axes]
    ['share of dL/dW_hh', 'error when cut beyond']
    """
    figure = Picture(figsize=(8.0, 5.0), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    i = int(np.argmax(np.nan_to_num(measure.bias[:, 0]))) if layer is None else layer
    at = np.arange(measure.share.shape[1])
    share = np.where(np.isfinite(measure.share[i]), measure.share[i], 0.0)
    above.bar(at, share, color=BLUE, width=0.8)
    above.axhline(0, color="black", linewidth=0.8)
    above.set_ylabel(say("share of dL/dW_hh"))
    below.plot(at, np.where(np.isfinite(measure.bias[i]), measure.bias[i], np.nan), **LINES[0])
    below.axhline(CLOSE, color=GREY, linewidth=1, linestyle="--")
    below.annotate(f"{CLOSE:.0%}", (1, CLOSE), xycoords=("axes fraction", "data"), color=GREY, va="bottom", ha="right")
    below.set_ylim(bottom=0)
    below.set_ylabel(say("error when cut beyond"))
    below.set_xlabel(say("lags, steps back from the loss"))
    _label(below, measure)
    for ax in (above, below):
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    title(figure, conclusion(measure, i))
    return figure


def _label(ax: Axes, measure: Shares) -> None:
    """The lags of each bin, as many of them as there is room for."""
    low, high = measure.bin_edges[:-1], measure.bin_edges[1:] - 1
    long = len(str(high[-1])) > 2  # then a bin's two ends stand on two lines
    words = [str(a) if a == b else f"{a}–{chr(10) * long}{b}" for a, b in zip(low, high, strict=True)]
    every = max(1, -(-len(words) * (max(len(line) for word in words for line in word.split()) + 2) // 90))
    ax.set_xticks(np.arange(len(words))[::every], words[::every])
