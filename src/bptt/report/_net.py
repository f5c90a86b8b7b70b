"""Charts of the net itself: its Jacobians, weights, gates, and the course of its training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from ..flow import CellPath, Gates, Jacobians, Lyapunov, Products, Spectrum
from ..flow.language import say
from ..flow.wording import number, percent
from ._chart import COLOURS, FAINT, LINES, Panels, chart, drawable, finish, logarithmic, positive

__all__ = ["cell_path", "eigenvalues", "gates", "jacobians", "lyapunov", "products", "training"]

LINES_AT_MOST = 24


def jacobians(measure: Jacobians) -> go.Figure:
    """Largest and smallest singular value over time, median lane."""
    figure = chart()
    for look, (name, values) in zip(
        LINES, {say("largest"): measure.norm, say("smallest"): measure.smallest}.items(), strict=False
    ):
        shown = np.where(measure.there, drawable(values), np.nan)
        middle = [float(np.nanmedian(row)) if np.any(~np.isnan(row)) else np.nan for row in shown]
        said = say("step") + " %{x}: %{y:.3g}<extra>" + name + "</extra>"
        figure.add_scatter(x=measure.t, y=middle, mode="lines", name=name, line=look["line"], hovertemplate=said)
    figure.add_hline(y=1, line={"color": FAINT, "width": 1})
    if measure.bound is not None:
        figure.add_hline(y=measure.bound, line={"color": FAINT, "dash": "dot"}, annotation_text=say("bound"))
    figure.update_xaxes(title=say("t, step"))
    figure.update_yaxes(title=say("singular values of J<sub>t</sub>, per step"), rangemode="tozero")
    return finish(figure)


def products(measure: Products) -> go.Figure:
    """Singular values along the product, with the bound, down to where float64 would round them away."""
    figure = chart()
    count = measure.singular.shape[1]
    for j in np.unique(np.linspace(0, count - 1, min(count, LINES_AT_MOST)).astype(int)):
        ends = {0: say("largest"), count - 1: say("smallest")}
        look = {"color": COLOURS[0] if j in ends else FAINT, "width": 2.5 if j in ends else 0.8}
        figure.add_scatter(
            x=measure.n,
            y=positive(measure.singular[:, j]),
            mode="lines",
            line=look | ({"dash": "dash"} if j == count - 1 and j else {}),
            name=ends.get(int(j), say("number {j}", j=j + 1)),
            showlegend=int(j) in ends,
            hovertemplate=say("{j} of {count}<br>", j=j + 1, count=count) + "n = %{x}: %{y:.3g}<extra></extra>",
        )
    if measure.bound is not None:
        look = {"color": COLOURS[1], "dash": "dot"}
        figure.add_scatter(x=measure.n, y=positive(measure.bound), mode="lines", line=look, name=say("bound"))
    shown = measure.singular[measure.log_singular >= measure.least]
    logarithmic(figure, shown, title=say("singular values of the product"))
    figure.update_xaxes(title=say("n, factors in the product"))
    return finish(figure)


def eigenvalues(measure: Spectrum) -> Panels:
    """A chart for every gate: its eigenvalues, and the unit circle over them."""
    angle = np.linspace(0, 2 * np.pi, 181)
    there = np.abs(measure.eigenvalues[np.isfinite(measure.eigenvalues)])
    limit = 1.08 * max(1.0, float(there.max(initial=0.0)))
    charts: Panels = []
    for gate, values, radius in zip(measure.gates, measure.eigenvalues, measure.radius, strict=True):
        figure = chart()
        name = "W_hh" if len(measure.gates) == 1 else say("gate {gate}", gate=gate)
        figure.add_scatter(
            x=drawable(values.real),
            y=drawable(values.imag),
            customdata=drawable(np.abs(values)),
            mode="markers",
            name=name,
            showlegend=False,
            marker={"color": COLOURS[0], "size": 5, "opacity": 0.55},
            hovertemplate="%{x:.3f} %{y:+.3f} i<br>" + say("magnitude") + " %{customdata:.3f}<extra></extra>",
        )
        circle = {"color": COLOURS[1], "width": 2.5}  # over the points, which would hide it
        figure.add_scatter(
            x=np.cos(angle), y=np.sin(angle), mode="lines", line=circle, name=say("unit circle"), hoverinfo="skip"
        )
        figure.update_xaxes(title=say("real part"), range=[-limit, limit], constrain="domain")
        figure.update_yaxes(title=say("imaginary part"), range=[-limit, limit], scaleanchor="x", constrain="domain")
        charts.append((say("{gate}: radius {radius}", gate=name, radius=number(float(radius))), finish(figure, 380)))
    return charts


def lyapunov(measure: Lyapunov) -> Panels:
    """The exponents with their errors, and the estimates step by step."""
    spectrum, running = chart(), chart()
    index = np.arange(1, len(measure.exponents) + 1)
    spectrum.add_scatter(
        x=index,
        y=drawable(measure.exponents),
        error_y={"array": drawable(measure.error)},
        mode="markers",
        marker=LINES[0]["marker"],
        showlegend=False,
        hovertemplate=say("number {j}", j="%{x}") + ": %{y:.4f} ± %{error_y.array:.4f}<extra></extra>",
    )
    steps = np.arange(1, len(measure.running) + 1)
    chosen = np.unique(np.linspace(0, len(index) - 1, min(len(index), len(LINES))).round().astype(int))
    for look, j in zip(LINES, chosen, strict=False):
        path, name = drawable(measure.running[:, j]), say("number {j}", j=j + 1)
        running.add_scatter(x=steps, y=path, mode="lines", line=look["line"], name=name)
    for figure in (spectrum, running):
        figure.add_hline(y=0, line={"color": FAINT, "width": 1})
    spectrum.update_xaxes(title=say("index, descending"), rangemode="tozero")
    spectrum.update_yaxes(title=say("exponent, nats per step"))
    running.update_xaxes(title=say("steps averaged over"))
    running.update_yaxes(title=say("estimate, nats per step"))
    return [(say("the exponents"), finish(spectrum, 380)), (say("their estimates"), finish(running, 380))]


def cell_path(measure: CellPath) -> go.Figure:
    """The forget gates' product beside all paths."""
    figure = chart()
    curves = {
        say("all paths, {of}", of="d(h, c)/d(h, c)"): measure.full,
        say("all paths, {of}", of="dc/dc"): measure.full_c,
        say("cell alone, largest"): measure.path,
        say("cell alone, mean over units"): measure.path_mean,
    }
    for look, (name, values) in zip(LINES, curves.items(), strict=True):
        said = say("after {steps}", steps=say("{count} steps", count="%{x}")) + ": %{y:.3g}<extra>" + name + "</extra>"
        figure.add_scatter(
            x=measure.n, y=positive(values), mode="lines", line=look["line"], name=name, hovertemplate=said
        )
    figure.update_xaxes(title=say("n, steps after step {step}", step=measure.start))
    logarithmic(figure, list(curves.values()), title=say("factor that is left"))
    return finish(figure)


def gates(measure: Gates) -> Panels:
    """A histogram for every gate, the ends in another colour."""
    charts: Panels = []
    for i, name in enumerate(measure.names):
        figure = chart()
        bin_edges, counts = drawable(measure.bin_edges[i]), measure.counts[i]
        middle, width = (bin_edges[1:] + bin_edges[:-1]) / 2, np.diff(bin_edges)
        margin = measure.margin * (bin_edges[-1] - bin_edges[0])
        end = measure.bounded & ((middle < bin_edges[0] + margin) | (middle > bin_edges[-1] - margin))
        figure.add_bar(
            x=middle,
            y=counts / max(int(counts.sum()), 1),
            width=width,
            marker={"color": np.where(end, COLOURS[1], COLOURS[0]), "line": {"width": 0}},
            hovertemplate=say("value") + " %{x:.3f}: %{y:.2%}<extra>" + name + "</extra>",
            showlegend=False,
        )
        figure.update_xaxes(title=say("value"))
        figure.update_yaxes(title=say("fraction of values"), tickformat=".0%")
        ends = say(": {low} low, {high} high", low=percent(float(measure.low[i])), high=percent(float(measure.high[i])))
        of = say("state h") if len(measure.names) == 1 else say("gate {gate}", gate=name)
        charts.append((of + (ends if measure.bounded else ""), finish(figure, 300)))
    return charts


def training(records: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Perplexity (the loss, of a task without one), gradient norm, clipping, and the horizon where it was measured."""
    kind = "perplexity" if any(record.get("perplexity") is not None for record in records) else "loss"
    panels = {
        say(kind): (kind, f"heldout_{kind}"),
        say("gradient norm"): ("grad_norm",),
        say("steps clipped"): ("clipped",),
    }
    if any(record.get("horizon") is not None for record in records):
        panels[say("horizon, steps")] = ("horizon",)
    figure = chart(len(panels), 1, shared_xaxes=True, vertical_spacing=0.05)
    step = [record["step"] for record in records]
    names = {kind: say("training"), f"heldout_{kind}": say("held out")}
    for row, (title, keys) in enumerate(panels.items(), 1):
        for look, key in zip(LINES, keys, strict=False):
            values = drawable([np.nan if record.get(key) is None else record[key] for record in records])
            figure.add_scatter(
                x=step,
                y=values,
                mode="lines+markers" if len(step) <= 60 else "lines",
                connectgaps=True,
                name=names.get(key, title),
                showlegend=row == 1,
                hovertemplate=say("step") + " %{x}: %{y:.4g}<extra>" + names.get(key, title) + "</extra>",
                row=row,
                col=1,
                **look,
            )
            if key == "horizon":
                known = [bool(record.get("horizon_settled")) for record in records]
                symbols = [look["marker"]["symbol"] if settled else "triangle-up-open" for settled in known]
                text = ["" if settled else say("at least {number}", number="") for settled in known]
                said = say("step") + " %{x}: %{text}%{y}<extra>" + title + "</extra>"
                figure.data[-1].update(marker_symbol=symbols, text=text, mode="lines+markers", hovertemplate=said)
        if row <= 2:
            shown = [record[key] for record in records for key in keys if record.get(key) is not None]
            logarithmic(figure, shown, title=title, low=True, row=row, col=1)
        else:
            figure.update_yaxes(title=title, rangemode="tozero", row=row, col=1)
    figure.update_yaxes(tickformat=".0%", range=[0, 1], row=3, col=1)
    figure.update_xaxes(title=say("optimiser step"), row=len(panels), col=1)
    return finish(figure, 170 * len(panels) + 130)
