"""What each policy costs, and how far its gradient is from the full one."""

from __future__ import annotations

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..clock import Timing
from ..flow import Comparison, conclusion
from ..flow.costs import memory_of_all
from ..flow.language import say
from ..flow.wording import number
from .style import BLACK, BLUE, GREY, VERMILLION, Picture, empty, logarithmic, styled, title

__all__ = ["comparison"]


@styled
def comparison(measure: Comparison) -> Figure:
    """Bias and standard deviation of every policy, relative to |full gradient|, beside its time and memory.

    measure: what `bptt.flow.compare` gives. Policies stand in the order of their time, the fastest on top; the layer's
    own has a star. Times are medians, with a line from quartile to quartile. Memory that is the same for all is told
    once.

    >>> import torch, bptt, bptt.plots
    >>> compared = bptt.flow.compare(bptt.nn.RNN(2, 4), torch.randn(20, 3, 2), policies=["full", "chunked:5"])
    >>> sorted(label.get_text() for label in bptt.plots.comparison(compared).axes[0].get_yticklabels())
    ['chunked:5', 'full *']
    """
    rows = sorted(measure.rows, key=lambda row: row.seconds)
    same = memory_of_all(measure)
    memory = same is None and any(row.bytes is not None for row in rows)
    figure = Picture(figsize=(8.0, max(3.2, 1.7 + 0.34 * len(rows))), layout="constrained")
    errors, time, *more = figure.subplots(
        1, 3 if memory else 2, sharey=True, width_ratios=[3, 1.5, 1.3] if memory else [3, 1.8]
    )
    spreads = [math.sqrt(max(row.variance, 0.0)) if math.isfinite(row.variance) else math.nan for row in rows]
    values = [value for row, spread in zip(rows, spreads, strict=True) for value in (row.bias, spread)]
    if any(math.isfinite(value) and value > 1e-9 for value in values):
        logarithmic(errors, [value for value in values if value > 1e-9], "x", least=100.0)
    else:
        errors.set_xlim(0, 1)
    left = errors.get_xlim()[0]
    for y, (row, spread) in enumerate(zip(rows, spreads, strict=True)):
        errors.axhline(y, color="#dddddd", linewidth=0.8, zorder=0)
        _point(errors, row.bias, row.bias_error, y - 0.14, left, VERMILLION, "o")
        deviation = row.variance_error / (2 * spread) if spread > 0 else 0.0  # of a root
        _point(errors, spread, deviation, y + 0.14, left, BLUE, "s")
    errors.plot([], [], "o", color=VERMILLION, label=say("bias"))
    errors.plot([], [], "s", color=BLUE, markerfacecolor="white", label=say("standard deviation"))
    errors.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.1, handletextpad=0.1)
    errors.set_xlabel(
        say("error / |full gradient|") + ("" if measure.own is None else say("\n(*: the layer's own policy)"))
    )
    errors.set_yticks(range(len(rows)), [row.policy + (" *" if row.policy == measure.own else "") for row in rows])
    errors.set_ylim(max(len(rows), 1) - 0.5, -0.5)
    if rows:
        beside = "" if same is None else say("\n({same} MiB under each)", same=same)
        doubt = say("\n(on a disturbed machine)") if measure.disturbed else ""
        _bars(time, [1e3 * row.seconds for row in rows], say("time, ms") + doubt + beside)
        _quartiles(time, [row.time for row in rows])
    else:
        empty(errors, say("no policies"))
        time.set_axis_off()
    if more:
        _bars(more[0], [None if row.bytes is None else row.bytes / 2**20 for row in rows], say("memory, MiB"))
    title(figure, conclusion(measure))
    return figure


def _point(ax: Axes, value: float, error: float, y: float, left: float, colour: str, marker: str) -> None:
    """A value with its standard error; where it is 0 or too small for the scale, a 0 at the left edge."""
    if not math.isfinite(value):
        ax.text(
            0.99,
            y,
            say("not finite"),
            transform=ax.get_yaxis_transform(),
            color=colour,
            fontsize=9,
            va="center",
            ha="right",
        )
        return
    if value <= left or value == 0:
        ax.text(0.005, y, "0", transform=ax.get_yaxis_transform(), color=colour, fontsize=9, va="center")
        return
    face = colour if marker == "o" else "white"
    low = min(error, value * (1 - 1e-6)) if math.isfinite(error) else 0.0
    spans = [[low], [error if math.isfinite(error) else 0.0]]
    ax.errorbar(
        [value], [y], xerr=spans, color=colour, marker=marker, markerfacecolor=face, capsize=2, linestyle="none"
    )


def _bars(ax: Axes, values: list[float | None], label: str) -> None:
    """Bars with their numbers."""
    there = [0.0 if value is None or not math.isfinite(value) else value for value in values]
    ax.barh(range(len(values)), there, color=GREY, height=0.55)
    most = max(there) or 1.0
    for y, value in enumerate(values):
        text = "–" if value is None else number(float(f"{value:.2g}"))
        ax.text(there[y] + 0.04 * most, y, text, va="center", fontsize=9.5, color=BLACK)
    ax.set_xlim(0, 1.45 * most)
    ax.set_xlabel(label)
    ax.tick_params(left=False)


def _quartiles(ax: Axes, times: list[Timing]) -> None:
    """A line from quartile to quartile over the bars; the numbers stand after it."""
    for y, (time, text) in enumerate(zip(times, ax.texts, strict=True)):
        ends = [1e3 * time.low, 1e3 * time.high]
        if all(map(math.isfinite, ends)):
            ax.plot(ends, [y, y], color=BLACK, linewidth=1.2, solid_capstyle="butt")
            at, _ = text.get_position()
            text.set_x(max(at, ends[1] + 0.03 * ax.get_xlim()[1]))
    ax.set_xlim(0, max(ax.get_xlim()[1], *(1.45e3 * time.high for time in times if math.isfinite(time.high)), 0.0))
