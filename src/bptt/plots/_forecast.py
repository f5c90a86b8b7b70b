"""A forecast beyond what was known of the series."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from .style import GREY, LINES, Picture, styled, title

__all__ = ["forecast"]

MOST = 8
"""Panels of one picture."""


@styled
def forecast(
    known: Mapping[str, npt.NDArray[np.float64]],
    predicted: Mapping[str, npt.NDArray[np.float64]],
    steps: Sequence[int] | None = None,
    heading: str = "Forecast",
    times: Mapping[str, Sequence[object]] | None = None,
    time: str = "row",
) -> Figure:
    """What was known of each series, and what is predicted after it; at most 8 series.

    known: by name, `[n]`, NaN where a value is missing. predicted: by the same names, `[h]`: the steps after the last.
    steps: those at which `predicted` lies, from 0 at the first known one, as many as are predicted; None: after the
    last. Of a longer past the last 4 h steps are drawn, 60 at least. times: by the same names, what stands at the
    steps, the predicted ones included, in place of their numbers. time: what these are, under the picture.

    Raises ValueError without a series.

    >>> import numpy as np, bptt.plots
    >>> figure = bptt.plots.forecast({"y": np.arange(5.0)}, {"y": np.array([5.0, 6.0])})
    >>> [text.get_text() for text in figure.legends[0].get_texts()]
    ['known', 'predicted']
    """
    if not predicted:
        raise ValueError("predicted must hold at least one series: got none")
    shown = list(predicted)[:MOST]
    figure = Picture(figsize=(8.0, 0.8 + 1.9 * len(shown)), layout="constrained")
    axes = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
    for ax, name in zip(axes, shown, strict=True):
        past, future = known[name], predicted[name]
        after = np.arange(len(past), len(past) + len(future)) if steps is None else np.asarray(steps)[: len(future)]
        first = max(0, len(past) - max(60, 4 * len(future))) if steps is None else 0
        at = np.arange(first, len(past))
        ax.plot(at, past[first:], **{**LINES[0], "marker": ""}, label="known")
        ax.plot(
            after, future, **LINES[1] | {"markersize": 3, "marker": "o" if len(future) < 40 else ""}, label="predicted"
        )
        if steps is None:
            ax.axvline(len(past) - 0.5, color=GREY, linewidth=0.8, linestyle=":")
        ax.set_ylabel(name)
        if times is not None:
            ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            ax.xaxis.set_major_formatter(FuncFormatter(partial(_at, times[name])))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower right", ncols=2)
    axes[-1].set_xlabel(time)
    title(figure, heading)
    return figure


def _at(times: Sequence[object], step: float, position: object) -> str:
    """What stands at a step, nothing where there is none."""
    return str(times[int(step)]) if step == int(step) and 0 <= step < len(times) else ""
