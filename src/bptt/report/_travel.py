"""Charts of how far gradients travel: by loss, by lag, in the weights, and what each policy makes of it."""

from __future__ import annotations

import math

import numpy as np
import plotly.graph_objects as go

from ..flow import Comparison, LagMap, Lags, Shares
from ..flow.coarser import coarser
from ..flow.costs import duration, total_error
from ..flow.course import reach_of, steepest
from ..flow.horizon import fitted
from ..flow.language import say
from ..flow.wording import number, percent
from ._chart import COLOURS, FAINT, LINES, Panels, chart, drawable, finish, logarithmic, positive

__all__ = ["comparison", "decay", "lag_map", "shares"]

CELLS = 400
"""Along an axis of the map at most."""
DECADES = 12
"""Of the map's colours at most."""
FEW = 8
"""Steps along an axis from which on its ticks lie a step or more apart."""


def lag_map(measure: LagMap) -> go.Figure:
    """The heat map, a button for each layer where there are several."""
    figure = chart()
    for i, name in enumerate(measure.layers):
        t, lag, norm = coarser(measure, i, CELLS)
        shown = positive(norm)  # what is not finite is drawn on top, what has no data not at all
        logs = np.log10(shown)
        high = float(np.nanmax(logs, initial=-300.0))
        low = max(float(np.nanmin(logs, initial=300.0)), high - DECADES)
        ticks = np.unique(np.linspace(math.ceil(low), math.floor(high), 6).round()) if low < high else np.array([high])
        figure.add_heatmap(
            x=t,
            y=lag,
            z=logs.T.astype(np.float32),
            customdata=shown.T.astype(np.float32) if high < 38 else shown.T,
            zmin=min(low, high - 0.3),
            zmax=high,
            colorscale="Cividis",
            colorbar={  # below, for a narrow screen has no room beside the map
                "title": {
                    "text": say("|dL<sub>t</sub> / d{state}|, loss per unit of state", state=measure.state),
                    "side": "bottom",
                },
                "orientation": "h",
                "thickness": 12,
                "y": -0.2,
                "yanchor": "top",
                "tickvals": ticks,
                "ticktext": [f"1e{tick:.0f}" for tick in ticks],
            },
            hovertemplate=_place() + say("norm") + " %{customdata:.3g}<extra>" + name + "</extra>",
            hoverongaps=False,
            visible=i == 0,
            name=name,
        )
        broken = np.isinf(norm)
        figure.add_heatmap(
            x=t,
            y=lag,
            z=np.where(broken, 1.0, np.nan).T.astype(np.float32) if broken.any() else None,
            colorscale=[[0, COLOURS[1]], [1, COLOURS[1]]],
            showscale=False,
            hovertemplate=_place() + say("not finite") + "<extra>" + name + "</extra>",
            hoverongaps=False,
            visible=i == 0,
            name=say("{layer}, not finite", layer=name),
        )
    if len(measure.layers) > 1:
        shows = [[j // 2 == i for j in range(2 * len(measure.layers))] for i in range(len(measure.layers))]
        buttons = [
            {"label": name, "method": "update", "args": [{"visible": shows[i]}]}
            for i, name in enumerate(measure.layers)
        ]
        menu = {"type": "buttons", "direction": "right", "buttons": buttons, "x": 0, "y": 1.16, "xanchor": "left"}
        menu["bgcolor"] = "#e3e8ee"  # its words are dark on either page
        figure.update_layout(updatemenus=[menu])
    few, near = (values[-1] - values[0] < FEW for values in (measure.t, measure.lag))
    figure.update_xaxes(title=say("t, step of the loss"), dtick=1 if few else None)  # there is no half of a step
    figure.update_yaxes(title=say("lag, steps back"), dtick=1 if near else None)
    finish(figure, 500).update_layout(margin_b=120)
    return figure


def _place() -> str:
    """Where in the map the pointer is."""
    return f"{say('loss at t')} = %{{x}}<br>{say('lag')} %{{y}}<br>"


def decay(measure: Lags) -> go.Figure:
    """Norm by lag of every layer, with the lanes' range and the fit of the steepest, and the horizons."""
    figure = chart()
    _lanes(figure, measure, steepest(measure))
    for i, name in enumerate(measure.layers):
        label = name if len(measure.layers) > 1 else say("measured")
        look = LINES[i % len(LINES)]
        mode = "lines+markers" if len(measure.lag) <= 60 else "lines"
        figure.add_scatter(
            x=measure.lag,
            y=positive(measure.norm[i]),
            mode=mode,
            name=label,
            hovertemplate=f"{say('lag')} %{{x}}<br>{say('norm')} %{{y:.3g}}<extra>{label}</extra>",
            **look,
        )
        for part, at in ((0.9, measure.horizon_90), (0.99, measure.horizon_99)):
            known = bool(measure.settled(part)[i])
            text = percent(part) if known else say("{part} or more", part=percent(part))
            y = positive(measure.norm[i])[np.searchsorted(measure.lag, at[i])]
            figure.add_scatter(
                x=[at[i]],
                y=[y],
                mode="markers+text",
                text=[text if i == steepest(measure) else ""],  # of several layers the words would meet
                textposition="top right" if at[i] < measure.lag[-1] / 2 else "bottom left",  # away from the edge
                marker={"symbol": "line-ns-open", "size": 22, "color": look["marker"]["color"], "line": {"width": 3}},
                hovertemplate=say("{part} arises within {reach}", part=percent(part), reach=reach_of(measure, i, part))
                + f"<extra>{label}</extra>",
                showlegend=False,
            )
    _fit(figure, measure, steepest(measure))
    figure.update_xaxes(title=say("lag, steps back from the loss"))
    logarithmic(figure, measure.norm, title=say("mean norm, loss per unit of state"))
    return finish(figure)


def _lanes(figure: go.Figure, measure: Lags, layer: int) -> None:
    """From the lane that keeps least to the one that keeps most, where there are several."""
    if measure.lane_norm is None or measure.lane_norm.shape[1] < 2:
        return
    lanes = positive(measure.lane_norm[layer])
    seen = ~np.all(np.isnan(lanes), axis=0)
    limits = {"least": np.nanmin(lanes[:, seen], axis=0), "most": np.nanmax(lanes[:, seen], axis=0)}
    for name, values in limits.items():
        figure.add_scatter(
            x=measure.lag[seen],
            y=values,
            mode="lines",
            line={"width": 0},
            name=say("its lanes"),
            fill="tonexty" if name == "most" else None,
            fillcolor="rgba(15, 134, 201, 0.2)",
            showlegend=name == "most",
            hoverinfo="skip",
        )


def _fit(figure: go.Figure, measure: Lags, layer: int) -> None:
    """The line whose rate the sentence tells, where there is one."""
    rate = float(measure.rate[layer])
    if not (measure.straight[layer] and rate > 0):
        return
    figure.add_scatter(
        x=measure.lag,
        y=fitted(measure.norm[layer], rate),
        mode="lines",
        line={"color": FAINT, "width": 2, "dash": "dash"},
        name=say("fit: {rate} a step", rate=number(rate)),
        hoverinfo="skip",
    )


def shares(measure: Shares) -> go.Figure:
    """Shares as bars, the error of cutting after each bin as a line below."""
    low, high = measure.bin_edges[:-1], measure.bin_edges[1:] - 1
    bins = [str(a) if a == b else f"{a}–{b}" for a, b in zip(low, high, strict=True)]
    figure = chart(2, 1, shared_xaxes=True, vertical_spacing=0.08)
    for i, name in enumerate(measure.layers):
        shown = {"name": name, "legendgroup": name}
        bars = {"color": COLOURS[i % len(COLOURS)]}
        said = say("lags") + " %{x}: %{y:.1%}<extra>" + name + "</extra>"
        figure.add_bar(x=bins, y=drawable(measure.share[i]), marker=bars, hovertemplate=said, row=1, col=1, **shown)
        said = say("cut beyond lags") + " %{x}: " + say("{part} off", part="%{y:.1%}") + f"<extra>{name}</extra>"
        line = LINES[i % len(LINES)] | {"mode": "lines+markers", "showlegend": False}
        figure.add_scatter(x=bins, y=drawable(measure.bias[i]), hovertemplate=said, row=2, col=1, **line, **shown)
    figure.update_layout(showlegend=len(measure.layers) > 1)
    figure.update_xaxes(type="category")
    figure.update_xaxes(title=say("lags, steps back from the loss"), row=2, col=1)
    figure.update_yaxes(title=say("share of dL/dW_hh"), tickformat=".0%", row=1, col=1)
    figure.update_yaxes(title=say("error when cut beyond"), tickformat=".0%", rangemode="tozero", row=2, col=1)
    return finish(figure, 480)


def comparison(measure: Comparison) -> Panels:
    """Error, and time: a row per policy, its name over it, so that no name meets another on any screen."""
    rows = [row for row in measure.rows if math.isfinite(total_error(row))]
    errors = np.array([total_error(row) for row in rows])
    seen = errors[errors > 1e-9]
    floor = float(seen.min()) / 4 if seen.size else 1e-3
    said = [
        say(
            "{policy}: error {error}<br>bias {bias}, standard deviation {spread}<br>{time} ms",
            policy=row.policy,
            error=number(e),
            bias=number(row.bias),
            spread=number(math.sqrt(max(row.variance, 0))),
            time=duration(row),
        )
        for e, row in zip(errors, rows, strict=True)
    ]
    at, look = np.arange(len(rows)), {"hovertext": said, "hoverinfo": "text", "showlegend": False}
    error, time = chart(), chart()
    error.add_scatter(
        x=np.maximum(errors, floor),
        y=at,
        mode="markers+text",
        text=["" if e > floor else say("no error") for e in errors],
        textposition="middle right",
        marker={
            "size": 11,
            "color": COLOURS[0],
            "symbol": ["circle" if e > floor else "triangle-left" for e in errors],
        },
        **look,
    )
    logarithmic(error, np.maximum(errors, floor), "x", say("error / |full gradient|"))
    times = [1e3 * row.seconds for row in rows]
    time.add_bar(x=times, y=at, width=0.35, orientation="h", marker_color=COLOURS[0], **look)
    time.update_xaxes(title=say("time of one forward and backward, ms"), rangemode="tozero")
    for figure in (error, time):
        name = {"xref": "paper", "x": 0.01, "xanchor": "left", "yshift": 15, "showarrow": False, "font": {"size": 12}}
        for y, row in enumerate(rows):
            figure.add_annotation(y=y, text=row.policy, **name)
        finish(figure, 110 + 40 * max(len(rows), 2)).update_layout(margin_l=20)
        figure.update_yaxes(range=[max(len(rows), 1) - 0.5, -0.8], showticklabels=False, ticks="", showgrid=False)
    return [(say("error"), error), (say("time"), time)]
