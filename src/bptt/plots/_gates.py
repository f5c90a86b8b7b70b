"""Histograms of the gates' values, with how many lie at the ends."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..flow import Gates, conclusion
from ..flow.language import say
from ..flow.wording import percent
from .style import BLUE, ORANGE, Picture, empty, styled, title

__all__ = ["gates"]


@styled
def gates(measure: Gates) -> Figure:
    """A histogram per gate; the shaded ends are where the slope is near zero and no gradient passes.

    measure: what `bptt.flow.gates` gives.

    >>> import torch, bptt, bptt.plots
    >>> figure = bptt.plots.gates(bptt.flow.gates(bptt.nn.LSTM(2, 4), torch.randn(20, 3, 2)))
    >>> [ax.get_title(loc="left") for ax in figure.axes]
    ['i', 'f', 'g', 'o']
    """
    count = len(measure.names)
    figure = Picture(figsize=(8.0, 3.3), layout="constrained")
    panels = figure.subplots(1, count, squeeze=False)[0]
    for i, (ax, name) in enumerate(zip(panels, measure.names, strict=True)):
        bin_edges, counts = measure.bin_edges[i], measure.counts[i].astype(np.float64)
        ax.set_title(name if count > 1 else say("state h"), fontsize=10.5)
        if i == 0:
            ax.set_ylabel(say("fraction of values"))
        if not counts.sum() or not np.all(np.isfinite(bin_edges)):
            empty(ax, say("no finite value"))
            continue
        ax.stairs(counts / counts.sum(), bin_edges, fill=True, color=BLUE)
        low, high = float(bin_edges[0]), float(bin_edges[-1])
        width = measure.margin * (high - low)
        ends = ((low, measure.low[i], "left"), (high - width, measure.high[i], "right"))
        for start, fraction, side in ends if measure.bounded else ():
            ax.axvspan(start, start + width, color=ORANGE, alpha=0.35, linewidth=0)
            at = 0.08 if side == "left" else 0.92
            ax.text(at, 0.985, percent(fraction), transform=ax.transAxes, ha=side, va="top", fontsize=9.5)
        ax.set_xlim(low, high)
        ax.set_ylim(0, 1.18 * float((counts / counts.sum()).max()))
        ax.xaxis.set_major_locator(MaxNLocator(3 if count > 1 else 6))
        ax.yaxis.set_major_locator(MaxNLocator(4))
    shaded = say("; shaded: within {part} of an end", part=percent(measure.margin)) if measure.bounded else ""
    figure.supxlabel(f"{measure.layer}: {say('value')}{shaded}", fontsize=10.5)
    title(figure, conclusion(measure))
    return figure
