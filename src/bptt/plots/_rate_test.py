"""A learning-rate range test: the loss by the rate."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from .style import BLACK, GREY, LINES, VERMILLION, Picture, styled, title

__all__ = ["rate_test"]


@styled
def rate_test(
    rates: npt.ArrayLike,
    losses: npt.ArrayLike,
    smoothed: npt.ArrayLike,
    suggestion: float | None = None,
    said: str = "The loss by the learning rate",
    conditions: str = "",
) -> Figure:
    """The loss of each step of a range test by its learning rate, with the rate that is suggested.

    rates, losses, smoothed, suggestion, said, conditions: of a `bptt.train.RateTest`. The loss that is shown ends where
    it has grown well beyond the first one.

    Raises ValueError for arrays of different lengths, or of fewer than two numbers.

    >>> import bptt.plots
    >>> figure = bptt.plots.rate_test([0.01, 0.1, 1], [2, 1, 9], [2, 1, 9], 0.03)
    >>> figure.axes[0].get_xlabel()
    'learning rate (log)'
    """
    x, raw, mean = (np.asarray(values, dtype=float) for values in (rates, losses, smoothed))
    if x.ndim != 1 or len(x) < 2 or raw.shape != x.shape or mean.shape != x.shape:
        raise ValueError(
            f"rates, losses and smoothed must be [n], n at least 2: got {list(x.shape)}, {list(raw.shape)} and "
            f"{list(mean.shape)}"
        )
    figure = Picture(figsize=(8.0, 4.2), layout="constrained")
    ax = figure.add_subplot()
    ax.plot(x, raw, linestyle="", marker=".", color=GREY, label="each step")
    ax.plot(x, mean, **LINES[0] | {"marker": ""}, label="mean of neighbours")
    if suggestion is not None:
        ax.axvline(suggestion, color=VERMILLION, linestyle="--", label=f"suggested: {suggestion:.2g}")
    ax.set_xscale("log")
    low, first = float(np.nanmin(raw)), float(mean[0])
    top = min(float(np.nanmax(raw)), first + 1.5 * max(first - low, 0.1 * abs(first)))
    room = 0.05 * (top - low) or 1.0
    ax.set_ylim(low - room, top + room)
    ax.set_xlabel("learning rate (log)")
    ax.set_ylabel("loss of the step's batch")
    ax.legend(loc="best")
    if conditions:
        figure.supxlabel(conditions, fontsize=9, color=BLACK, wrap=True)
    title(figure, said)
    return figure
