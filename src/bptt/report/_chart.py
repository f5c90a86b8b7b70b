"""What every chart of the report shares: colours, axes, and numbers that a page can hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ..flow.language import say

__all__ = ["COLOURS", "FAINT", "LINES", "Panels", "chart", "drawable", "finish", "logarithmic", "positive"]

COLOURS = ("#0f86c9", "#d55e00", "#12a37b", "#c77daa")
"""Okabe and Ito's blue, vermillion, green and purple, moved to where they read on white and on near-black alike."""

LINES: tuple[dict[str, Any], ...] = tuple(
    {"line": {"color": colour, "dash": dash}, "marker": {"symbol": symbol, "color": colour, "size": 6}}
    for colour, dash, symbol in zip(
        COLOURS, ("solid", "dash", "dashdot", "dot"), ("circle", "square", "diamond", "triangle-up"), strict=True
    )
)

FAINT = "rgba(128, 128, 128, 0.8)"
GRID = "rgba(128, 128, 128, 0.25)"


Panels = list[tuple[str, go.Figure]]
"""Charts that stand side by side where there is room, one below the other where not, each under its title."""


def chart(rows: int = 1, columns: int = 1, **options: Any) -> go.Figure:
    """An empty chart, of several panels if wanted."""
    return make_subplots(rows=rows, cols=columns, **options) if rows * columns > 1 or options else go.Figure()


def finish(figure: go.Figure, height: int = 400) -> go.Figure:
    """Lay it out for a page that is light or dark: the page's own background shows through, and colours its text."""
    figure.update_layout(
        height=height,
        autosize=True,
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 70, "r": 20, "t": 40, "b": 55},
        font={"family": "system-ui, sans-serif", "size": 13},
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": FAINT, "activecolor": COLOURS[0]},
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0, "traceorder": "normal"},
    )
    figure.update_xaxes(
        gridcolor=GRID, zerolinecolor=GRID, linecolor=FAINT, ticks="outside", tickcolor=FAINT, automargin=True
    )
    figure.update_yaxes(
        gridcolor=GRID,
        zerolinecolor=GRID,
        linecolor=FAINT,
        ticks="outside",
        tickcolor=FAINT,
        exponentformat="power",
        automargin=True,
        title_standoff=8,
    )
    return figure


def logarithmic(
    figure: go.Figure, values: npt.ArrayLike, axis: str = "y", title: str = "", low: bool = False, **cell: int
) -> None:
    """Make an axis logarithmic over the finite values above 0, half a decade wide or more, every tick with its number.

    title: of the axis, which is told to be logarithmic. low: whether the panel is, with room for few numbers. cell: row
    and col of the panel.
    """
    numbers = np.asarray(values, dtype=np.float64)
    numbers = numbers[np.isfinite(numbers) & (numbers > 0)]
    least, most = np.log10([numbers.min(), numbers.max()]) if numbers.size else (0.0, 1.0)
    wider = max(0.0, 0.5 - (most - least)) / 2 + 0.06 * max(most - least, 0.5)
    least, most = least - wider, most + wider
    form = "~g" if least >= -3 and most <= 5 else ".1~e"
    # No step between ticks is set: the browser's own choice has ticks in any range, zoomed into or not.
    options = {
        "type": "log",
        "range": [least, most],
        "tickformat": form,
        "nticks": 4 if low else 0,
        "title": f"{title}{' ' if axis == 'x' else '<br>'}{say('(log scale)')}",
    }
    (figure.update_xaxes if axis == "x" else figure.update_yaxes)(**options, **cell)


def drawable(values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """The numbers, NaN where they are not finite: a gap in a line."""
    numbers = np.asarray(values, dtype=np.float64)
    return np.where(np.isfinite(numbers), numbers, np.nan)


def positive(values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """The numbers that a logarithmic axis can show, NaN for the others."""
    numbers = drawable(values)
    return np.where(np.nan_to_num(numbers) > 0, numbers, np.nan)
