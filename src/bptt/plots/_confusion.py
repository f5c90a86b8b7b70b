"""Which class was taken for which: the confusion matrix of a classifier."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ..flow.wording import percent
from .style import HEAT, Picture, styled, title

__all__ = ["confusion"]

WRITTEN = 16
"""Classes up to which every cell has its number; of more there is no room for letters of 9 points."""
NAMED = 24
"""Classes up to which each is named at the axes; of more every second one, every third, ..."""
LETTERS = 14
"""Of a class's name; a longer one is cut short."""


@styled
def confusion(counts: npt.ArrayLike, classes: Sequence[str]) -> Figure:
    """The share of each class's sequences by the class they were taken for; a cell's number counts them.

    counts: whole numbers `[C, C]`, the true class by row, the predicted one by column. classes: their C names. A row
    that is all in the diagonal is a class that was always known; the figure after a name is the share that was.

    Raises ValueError for counts of another shape, or below 0.

    >>> import bptt.plots
    >>> figure = bptt.plots.confusion([[9, 1], [0, 5]], ["low", "high"])
    >>> figure.get_suptitle()
    'Right in 14 of 15 cases, 93 %; most often low is taken for high (1 of 10)'
    """
    n = np.asarray(counts)
    C = len(classes)
    if n.shape != (C, C) or n.dtype.kind not in "iu" or C == 0 or (n < 0).any():
        raise ValueError(f"counts must be whole numbers of at least 0 [{C}, {C}], as there are {C} classes: got {n!r}")
    seen = n.sum(1)
    share = n / np.maximum(seen, 1)[:, None]
    height = min(8.0, max(3.4, 1.6 + 0.36 * C))
    figure = Picture(figsize=(8.0, height), layout="constrained")
    ax = figure.add_subplot()
    shown = np.ma.masked_where(np.broadcast_to((seen == 0)[:, None], n.shape), share)
    image = ax.imshow(shown, cmap=HEAT, vmin=0, vmax=1, aspect="auto")
    ax.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=ax, label="share of the true class", fraction=0.05, pad=0.02)
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    bar.outline.set_visible(False)
    if C <= WRITTEN:
        colours = mpl.colormaps[HEAT]([1.0, 0.0])
        for (i, j), count in np.ndenumerate(n):
            if count:
                dark = share[i, j] < 0.5
                ax.text(j, i, f"{count}", ha="center", va="center", fontsize=9.5, color=colours[0 if dark else 1])
    at = np.arange(0, C, -(-C // NAMED))
    short = [name if len(name) <= LETTERS else f"{name[: LETTERS - 1]}…" for name in classes]
    ax.set_yticks(at, [f"{short[i]}  {percent(share[i, i]) if seen[i] else '–':>5}" for i in at])
    long = max(len(short[i]) for i in at) * len(at) > 70
    ax.set_xticks(at, [short[i] for i in at], rotation=90 if long else 0)
    ax.tick_params(length=0)
    ax.set_xlabel("predicted class")
    ax.set_ylabel("true class, share right")
    title(figure, _sentence(n, classes))
    return figure


def _sentence(n: npt.NDArray[np.int64], classes: Sequence[str]) -> str:
    total, right = int(n.sum()), int(np.trace(n))
    if not total:
        return "No case was classified, so that nothing is known"
    said = f"Right in {right:,} of {total:,} cases, {percent(right / total)}"
    wrong = n - np.diag(np.diag(n))
    if not wrong.any():
        return said
    i, j = divmod(int(wrong.argmax()), len(classes))
    return f"{said}; most often {classes[i]} is taken for {classes[j]} ({n[i, j]:,} of {n[i].sum():,})"
