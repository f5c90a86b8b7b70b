"""The LSTM's cell path beside all paths."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..flow import CellPath, conclusion
from ..flow.language import say
from ..flow.wording import steps
from .style import LINES, blank, empty, logarithmic, sparse, styled, title

__all__ = ["cell_path"]


@styled
def cell_path(measure: CellPath, *, ax: Axes | None = None) -> Figure:
    """What is left of a perturbation of the state after n steps: by the forget gates alone, and by all paths.

    measure: what `bptt.flow.cell_path` gives. ax: where to draw; a new figure by default.

    >>> import torch, bptt, bptt.plots
    >>> figure = bptt.plots.cell_path(bptt.flow.cell_path(bptt.nn.LSTM(2, 4), torch.randn(20, 3, 2)))
    >>> figure.axes[0].get_yscale()
    'log'
    """
    figure, axes = blank(ax)
    curves = {
        say("all paths, {of}", of="d(h, c)/d(h, c)"): measure.full,
        say("all paths, {of}", of="dc/dc"): measure.full_c,
        say("cell alone, largest prod f"): measure.path,
        say("cell alone, mean over units"): measure.path_mean,
    }
    shown = [np.where(np.isfinite(v) & (v > 0), v, np.nan) for v in curves.values()]
    if np.all(np.isnan(shown)):
        empty(axes, say("nothing finite is left above 0"))
    else:
        for label, values, line in zip(curves, shown, LINES, strict=True):
            axes.plot(measure.n, values, **line, **sparse(len(measure.n), 12), label=label)
        logarithmic(axes, shown)
        axes.legend(loc="best")
    axes.set_xlabel(say("n, steps after step {step}", step=measure.start))
    axes.set_ylabel(say("factor that is left\n(spectral norm)"))
    memory = measure.memory[np.isfinite(measure.memory)]
    units = say("; the median unit remembers {steps}", steps=steps(float(np.median(memory)))) if memory.size else ""
    title(figure if ax is None else ax, conclusion(measure) + units)
    return figure
