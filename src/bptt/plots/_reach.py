"""How far each loss reaches under each policy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator

from ..flow import pairs
from ..flow.language import say
from ..flow.wording import number, percent
from ..policies import Chunked, Full, Policy, Randomized, Truncated, parse
from .style import HEAT, Picture, styled, title

__all__ = ["reach"]

POLICIES: tuple[Policy, ...] = (Full(), Chunked(5), Truncated(5), Randomized(0.75))


@styled
def reach(policies: Sequence[Policy | str] = POLICIES, T: int = 15, *, seed: int = 0) -> Figure:
    """A panel per policy: which earlier steps (columns) the loss of each step (rows) reaches, and with what weight.

    policies: or their text forms. T: steps. seed: of the one draw of a randomized policy. The weights are those of
    `bptt.flow.pairs`.

    Raises ValueError for no policies, and for T < 1.

    >>> import bptt.plots
    >>> [ax.get_title(loc="left") for ax in bptt.plots.reach(["full", "truncated:4"], T=8).axes[:2]]
    ['full', 'truncated:4']
    """
    chosen = [parse(policy) for policy in policies]
    if not chosen:
        raise ValueError("policies must hold at least one policy: got none")
    weights = [pairs(policy, T, seed=seed) for policy in chosen]
    columns = min(len(chosen), 4)
    rows = -(-len(chosen) // columns)
    figure = Picture(figsize=(8.0, 0.9 + 2.3 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    # Without the brightest colours, which the white of what gets no gradient would swallow.
    shades = ListedColormap(colormaps[HEAT](np.linspace(0, 0.85, 256)))
    scale = LogNorm(1.0, max(2.0, *(float(w.max()) for w in weights)))
    for i, (policy, weight) in enumerate(zip(chosen, weights, strict=True)):
        ax = panels[i // columns][i % columns]
        seen = np.ma.masked_where(weight == 0, weight)
        borders = np.arange(T + 1) - 0.5
        mesh = ax.pcolormesh(borders, borders, seen, norm=scale, cmap=shades, edgecolor="white", linewidth=0.4)
        ax.set_aspect("equal")
        ax.set_xlim(-0.5, T - 0.5)
        ax.set_ylim(T - 0.5, -0.5)
        ax.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
        ax.yaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
        ax.set_title(str(policy), fontsize=10.5)
        if i % columns == 0:
            ax.set_ylabel(say("loss at step t"))
    for i in range(len(chosen), rows * columns):
        panels[i // columns][i % columns].set_visible(False)
    figure.supxlabel(say("step k whose use of the weights receives gradient"), fontsize=10.5)
    if any(float(w.max()) > 1 for w in weights):
        bar = figure.colorbar(mesh, ax=panels.ravel().tolist(), pad=0.01, format=LogFormatter())
        bar.ax.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
        bar.set_label(say("weight"))
    title(figure, _conclusion(chosen, weights, T))
    return figure


def _conclusion(policies: Sequence[Policy], weights: Sequence[npt.NDArray[np.float64]], T: int) -> str:
    """How much of the triangle each policy keeps."""
    pairs_in_all = T * (T + 1) // 2
    said = []
    for policy, weight in zip(policies, weights, strict=True):
        kept, most = percent(np.count_nonzero(weight) / pairs_in_all), float(weight.max())
        drawn = say(" in this draw, weighted up to {most}", most=number(most)) if most > 1 else ""
        said.append(f"{policy} {kept}{drawn}")
    text = "Pairs of a loss and an earlier step that get gradient, of {count}: {policies}"
    return say(text, count=pairs_in_all, policies=say(", ").join(said))
