"""The course of a training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ..flow import conclusion
from ..flow.language import say
from .style import BLUE, GREY, LINES, Picture, logarithmic, sparse, styled, title

__all__ = ["training"]


@styled
def training(records: Sequence[Mapping[str, Any]]) -> Figure:
    """Perplexity (the loss, of a task without one), gradient norm with clipping, and the horizon where it was measured,
    against the step.

    A horizon that the window may have cut short is an open mark: it is at least so far.

    records: the objects of a run's metrics.jsonl, with the keys of `bptt.train.loop.Record`.

    Raises ValueError without records.

    >>> import bptt.plots
    >>> record = dict(step=10, steps=10, perplexity=9.0, heldout_perplexity=None, grad_norm=2.0, clipped=0.1)
    >>> [ax.get_ylabel() for ax in bptt.plots.training([record]).axes]
    ['perplexity (log)', 'gradient norm (log)', 'steps clipped']
    """
    if not records:
        raise ValueError("records must hold at least one record: got none")
    step = np.array([record["step"] for record in records])
    horizon = _column(records, "horizon")
    rows = 2 + bool(np.any(np.isfinite(horizon)))
    figure = Picture(figsize=(8.0, 1.0 + 1.75 * rows), layout="constrained")
    loss, norm, *more = figure.subplots(rows, 1, sharex=True, height_ratios=[1.5, 1, 0.9][:rows])
    kind = "perplexity" if any(record.get("perplexity") is not None for record in records) else "loss"
    curves = {say("training"): _column(records, kind), say("held out"): _column(records, f"heldout_{kind}")}
    for line, (name, values) in zip(LINES, curves.items(), strict=False):
        there = np.isfinite(values)
        if there.any():
            loss.plot(step[there], values[there], **line, **sparse(int(there.sum()), 15), label=name)
    logarithmic(loss, list(curves.values()), least=2.0)
    loss.set_ylabel(say("perplexity (log)") if kind == "perplexity" else say("loss (log)"))
    if loss.get_legend_handles_labels()[0]:
        loss.legend(loc="best")
    size = _column(records, "grad_norm")
    norm.plot(step, size, **LINES[0], **sparse(len(step), 15))
    logarithmic(norm, size, least=4.0)
    norm.set_ylabel(say("gradient norm (log)"))
    clipped = norm.twinx()
    clipped.spines.right.set_visible(True)
    clipped.fill_between(step, _column(records, "clipped"), color=BLUE, alpha=0.2, linewidth=0, step="mid")
    clipped.set_ylim(0, 1)
    clipped.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    clipped.set_ylabel(say("steps clipped"), color=BLUE)
    for ax in more:
        there = np.isfinite(horizon)
        ax.plot(step[there], horizon[there], **LINES[2] | {"marker": ""})
        known = np.array([bool(record.get("horizon_settled")) for record in records])
        for kept, look in ((known, {}), (~known, {"marker": "^", "markerfacecolor": "none", "label": say("at least")})):
            if np.any(kept & there):
                marks = {**LINES[2], "linestyle": "", **look}
                ax.plot(step[kept & there], horizon[kept & there], **marks)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(loc="best")
        ax.set_ylim(0, 1.15 * float(np.nanmax(horizon)) or 1.0)
        ax.set_ylabel(say("horizon, steps"))
    for record in records:
        if record.get("skipped"):
            loss.axvline(record["step"], color=GREY, linewidth=0.8, linestyle=":")
    (more or [norm])[-1].set_xlabel(say("optimiser step"))
    title(figure, conclusion(list(records)))
    return figure


def _column(records: Sequence[Mapping[str, Any]], key: str) -> npt.NDArray[np.float64]:
    """A key of every record, NaN where it is missing or infinite."""
    values = np.array([record.get(key) if record.get(key) is not None else np.nan for record in records], dtype=float)
    return np.where(np.isfinite(values), values, np.nan)
