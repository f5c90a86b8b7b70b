"""The LSTM's cell path beside all paths."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..flow import CellPath, conclusion
from ..flow.wording import number
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
        "all paths, d(h, c)/d(h, c)": measure.full,
        "all paths, dc/dc": measure.full_c,
        "cell alone, largest prod f": measure.path,
        "cell alone, mean over units": measure.path_mean,
    }
    shown = [np.where(np.isfinite(v) & (v > 0), v, np.nan) for v in curves.values()]
    if np.all(np.isnan(shown)):
        empty(axes, "nothing finite is left above 0")
    else:
        for label, values, line in zip(curves, shown, LINES, strict=True):
            axes.plot(measure.n, values, **line, **sparse(len(measure.n), 12), label=label)
        logarithmic(axes, shown)
        axes.legend(loc="best")
    axes.set_xlabel(f"n, steps after step {measure.start}")
    axes.set_ylabel("factor that is left\n(spectral norm)")
    memory = measure.memory[np.isfinite(measure.memory)]
    units = f"; the median unit remembers {number(float(np.median(memory)))} steps" if memory.size else ""
    title(figure if ax is None else ax, conclusion(measure) + units)
    return figure
