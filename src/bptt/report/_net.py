"""Charts of the net itself: its Jacobians, weights, gates, and the course of its training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from ..flow import CellPath, Gates, Jacobians, Lyapunov, Products, Spectrum
from ..flow._wording import percent
from ._chart import COLOURS, FAINT, LINES, chart, drawable, finish, positive

__all__ = ["cell_path", "eigenvalues", "gates", "jacobians", "lyapunov", "products", "training"]

LINES_AT_MOST = 24


def jacobians(measure: Jacobians) -> go.Figure:
    """Largest and smallest singular value over time, median lane."""
    figure = chart()
    for look, (name, values) in zip(
        LINES, {"largest": measure.norm, "smallest": measure.smallest}.items(), strict=False
    ):
        shown = np.where(measure.there, drawable(values), np.nan)
        middle = [float(np.nanmedian(row)) if np.any(~np.isnan(row)) else np.nan for row in shown]
        said = "step %{x}: %{y:.3g}<extra>" + name + "</extra>"
        figure.add_scatter(x=measure.t, y=middle, mode="lines", name=name, line=look["line"], hovertemplate=said)
    figure.add_hline(y=1, line={"color": FAINT, "width": 1})
    if measure.bound is not None:
        figure.add_hline(y=measure.bound, line={"color": FAINT, "dash": "dot"}, annotation_text="bound")
    figure.update_xaxes(title="t, step")
    figure.update_yaxes(title="singular values of J<sub>t</sub>, per step", rangemode="tozero")
    return finish(figure)


def products(measure: Products) -> go.Figure:
    """Singular values along the product, with the bound."""
    figure = chart()
    count = measure.singular.shape[1]
    for j in np.unique(np.linspace(0, count - 1, min(count, LINES_AT_MOST)).astype(int)):
        ends = {0: "largest", count - 1: "smallest"}
        look = {"color": COLOURS[0] if j in ends else FAINT, "width": 2.5 if j in ends else 0.8}
        figure.add_scatter(
            x=measure.n,
            y=positive(measure.singular[:, j]),
            mode="lines",
            line=look | ({"dash": "dash"} if j == count - 1 and j else {}),
            name=ends.get(int(j), f"number {j + 1}"),
            showlegend=int(j) in ends,
            hovertemplate=f"{j + 1} of {count}<br>" + "n = %{x}: %{y:.3g}<extra></extra>",
        )
    if measure.bound is not None:
        look = {"color": COLOURS[1], "dash": "dot"}
        figure.add_scatter(x=measure.n, y=positive(measure.bound), mode="lines", line=look, name="bound")
    figure.update_xaxes(title="n, factors in the product")
    figure.update_yaxes(title="singular values of the product", type="log")
    return finish(figure)


def eigenvalues(measure: Spectrum) -> go.Figure:
    """Every gate's eigenvalues, with the unit circle."""
    figure = chart()
    angle = np.linspace(0, 2 * np.pi, 181)
    circle = {"color": FAINT, "width": 1.5}
    figure.add_scatter(
        x=np.cos(angle), y=np.sin(angle), mode="lines", line=circle, name="unit circle", hoverinfo="skip"
    )
    for i, gate in enumerate(measure.gates):
        values = measure.eigenvalues[i]
        figure.add_scatter(
            x=drawable(values.real),
            y=drawable(values.imag),
            customdata=drawable(np.abs(values)),
            mode="markers",
            name="W_hh" if len(measure.gates) == 1 else f"gate {gate}",
            marker=LINES[i % len(LINES)]["marker"],
            hovertemplate="%{x:.3f} %{y:+.3f} i<br>magnitude %{customdata:.3f}<extra></extra>",
        )
    figure.update_xaxes(title="real part")
    figure.update_yaxes(title="imaginary part", scaleanchor="x")
    return finish(figure, 520)


def lyapunov(measure: Lyapunov) -> go.Figure:
    """The exponents with their errors, and the estimates step by step."""
    figure = chart(1, 2, horizontal_spacing=0.12)
    index = np.arange(1, len(measure.exponents) + 1)
    figure.add_scatter(
        x=index,
        y=drawable(measure.exponents),
        error_y={"array": drawable(measure.error)},
        mode="markers",
        marker=LINES[0]["marker"],
        showlegend=False,
        hovertemplate="number %{x}: %{y:.4f} ± %{error_y.array:.4f}<extra></extra>",
        row=1,
        col=1,
    )
    steps = np.arange(1, len(measure.running) + 1)
    chosen = np.unique(np.linspace(0, len(index) - 1, min(len(index), len(LINES))).round().astype(int))
    for look, j in zip(LINES, chosen, strict=False):
        path, name = drawable(measure.running[:, j]), f"number {j + 1}"
        figure.add_scatter(x=steps, y=path, mode="lines", line=look["line"], name=name, row=1, col=2)
    figure.add_hline(y=0, line={"color": FAINT, "width": 1})
    figure.update_xaxes(title="index, descending", row=1, col=1)
    figure.update_xaxes(title="steps averaged over", row=1, col=2)
    figure.update_yaxes(title="exponent, nats per step", row=1, col=1)
    return finish(figure)


def cell_path(measure: CellPath) -> go.Figure:
    """The forget gates' product beside all paths."""
    figure = chart()
    curves = {
        "all paths, d(h, c)/d(h, c)": measure.full,
        "all paths, dc/dc": measure.full_c,
        "cell alone, largest": measure.path,
        "cell alone, mean over units": measure.path_mean,
    }
    for look, (name, values) in zip(LINES, curves.items(), strict=True):
        said = "after %{x} steps: %{y:.3g}<extra>" + name + "</extra>"
        figure.add_scatter(
            x=measure.n, y=positive(values), mode="lines", line=look["line"], name=name, hovertemplate=said
        )
    figure.update_xaxes(title=f"n, steps after step {measure.start}")
    figure.update_yaxes(title="factor that is left (spectral norm)", type="log")
    return finish(figure)


def gates(measure: Gates) -> go.Figure:
    """A histogram per gate, the ends in another colour."""
    count = len(measure.names)
    titles = [
        f"{name}: {percent(float(low))} low, {percent(float(high))} high" if measure.bounded else name
        for name, low, high in zip(measure.names, measure.low, measure.high, strict=True)
    ]
    figure = chart(1, count, subplot_titles=titles, horizontal_spacing=0.06)
    for i, name in enumerate(measure.names):
        edges, counts = drawable(measure.edges[i]), measure.counts[i]
        middle, width = (edges[1:] + edges[:-1]) / 2, np.diff(edges)
        margin = measure.margin * (edges[-1] - edges[0])
        end = measure.bounded & ((middle < edges[0] + margin) | (middle > edges[-1] - margin))
        figure.add_bar(
            x=middle,
            y=counts / max(int(counts.sum()), 1),
            width=width,
            marker={"color": np.where(end, COLOURS[1], COLOURS[0]), "line": {"width": 0}},
            hovertemplate="value %{x:.3f}: %{y:.2%}<extra>" + name + "</extra>",
            showlegend=False,
            row=1,
            col=i + 1,
        )
        figure.update_xaxes(title="value", row=1, col=i + 1)
    figure.update_annotations(font_size=13)
    figure.update_yaxes(title="fraction of values", row=1, col=1)
    figure.update_yaxes(tickformat=".0%")
    finish(figure, 380).update_layout(margin_t=70)
    return figure


def training(records: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Perplexity, gradient norm, clipping, and the horizon where it was measured."""
    panels = {
        "perplexity": ("perplexity", "heldout_perplexity"),
        "gradient norm": ("grad_norm",),
        "steps clipped": ("clipped",),
    }
    if any(record.get("horizon") is not None for record in records):
        panels["horizon, steps"] = ("horizon",)
    figure = chart(len(panels), 1, shared_xaxes=True, vertical_spacing=0.05)
    step = [record["step"] for record in records]
    names = {"perplexity": "training", "heldout_perplexity": "held out"}
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
                hovertemplate="step %{x}: %{y:.4g}<extra>" + names.get(key, title) + "</extra>",
                row=row,
                col=1,
                **look,
            )
            if key == "horizon":
                known = [bool(record.get("horizon_settled")) for record in records]
                symbols = [look["marker"]["symbol"] if settled else "triangle-up-open" for settled in known]
                text = ["" if settled else "at least " for settled in known]
                said = "step %{x}: %{text}%{y}<extra>" + title + "</extra>"
                figure.data[-1].update(marker_symbol=symbols, text=text, mode="lines+markers", hovertemplate=said)
        figure.update_yaxes(
            title=title, type="log" if row <= 2 else "linear", dtick="D2" if row <= 2 else None, row=row, col=1
        )
    figure.update_yaxes(tickformat=".0%", range=[0, 1], row=3, col=1)
    figure.update_xaxes(title="optimiser step", row=len(panels), col=1)
    return finish(figure, 140 * len(panels) + 160)
