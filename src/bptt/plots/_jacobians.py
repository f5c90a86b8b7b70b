"""How large the step Jacobians are over time."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..flow import Jacobians, conclusion
from ..flow.language import say
from .style import BLACK, BLUE, GREY, blank, empty, styled, title

__all__ = ["jacobians"]


@styled
def jacobians(measure: Jacobians, *, ax: Axes | None = None) -> Figure:
    """The norm of J_t over time, median and range over lanes, with its smallest singular value and the bound.

    measure: what `bptt.flow.jacobians` gives. ax: where to draw; a new figure by default.

    >>> import torch, bptt, bptt.plots
    >>> figure = bptt.plots.jacobians(bptt.flow.jacobians(bptt.nn.RNN(2, 4), torch.randn(20, 3, 2)))
    >>> figure.axes[0].get_xlabel()
    't, step'
    """
    figure, axes = blank(ax)
    shown = np.isfinite(measure.norm) & measure.there
    norm, smallest = (np.where(shown, values, np.nan) for values in (measure.norm, measure.smallest))
    whole = ~np.all(np.isnan(norm), axis=1)
    if not whole.any():
        empty(axes, say("no step Jacobian is finite") if measure.there.any() else say("no state passes a step"))
    else:
        t, norm, smallest = measure.t[whole], norm[whole], smallest[whole]
        dot = "o" if len(t) == 1 else ""
        if norm.shape[1] > 1:
            low, high = np.nanmin(norm, axis=1), np.nanmax(norm, axis=1)
            axes.fill_between(t, low, high, color=BLUE, alpha=0.25, linewidth=0, label=say("largest, all lanes"))
        axes.plot(t, np.nanmedian(norm, axis=1), color=BLUE, marker=dot, label=say("largest, median"))
        middle = np.nanmedian(smallest, axis=1)
        axes.plot(t, middle, color=BLACK, linestyle="--", marker=dot, label=say("smallest, median"))
        if measure.bound is not None:
            axes.axhline(measure.bound, color=BLACK, linestyle=":", label=say("bound") + r" $\beta_W \beta_h$")
        axes.axhline(1, color=GREY, linewidth=0.8, zorder=1)
        if _spread(norm):
            axes.set_yscale("symlog", linthresh=1.0)
        axes.set_ylim(bottom=0)
        below = {"loc": "upper left", "bbox_to_anchor": (0, -0.13), "ncols": 4, "borderaxespad": 0}
        axes.legend(**below if ax is None else {"loc": "best"})
    axes.set_xlabel(say("t, step"))
    axes.set_ylabel(say("singular values of J_t, per step"))
    title(figure if ax is None else ax, conclusion(measure))
    return figure


def _spread(norm: npt.NDArray[np.float64]) -> bool:
    """Whether one scale cannot show both the typical norm and the largest."""
    return bool(np.nanmax(norm) > 100 * max(float(np.nanmedian(norm)), 1.0))
