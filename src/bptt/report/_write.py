"""The report: one section per measurement, in one file."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from ..flow import Comparison, LagMap, Lags, Shares, Survey, conclusion
from ..flow.costs import disturbance, duration, mebibytes, memory_of_all, total_error
from ..flow.language import say
from ..flow.wording import percent
from . import _net, _travel
from ._page import Section, page, table

__all__ = ["write"]

SECTIONS: dict[str, tuple[str, str, Any]] = {
    "lag_map": (
        "By loss",
        "How large the gradient is that the loss of step t sends back to the state so many steps (the lag) before it. "
        "A colour that fades upwards is a gradient that vanishes; columns that fade less are losses that reach "
        "farther. Where there is no cell there is no data: no step, no loss, or a reset between. Point at a cell for "
        "its number.",
        _travel.lag_map,
    ),
    "lags": (
        "By lag",
        "The mean over losses of the map, in this batch, with the range of its lanes. A straight line is a constant "
        "factor per step, and only then is a rate told and its fit drawn. The ticks mark the lags within which 90 and "
        "99 % of the sum arise: what lies beyond them hardly steers training. Where more lags than were measured would "
        "move them, they are at least so far.",
        _travel.decay,
    ),
    "shares": (
        "Weights",
        "The part of dL/dW_hh that travelled so many steps, as a share of the whole (shares may be negative, they add "
        "up to 1), and the relative error of a gradient that is cut beyond it.",
        _travel.shares,
    ),
    "comparison": (
        "Policies",
        "Every policy against the full gradient on the same batch. The error is the root mean square: bias and spread "
        "together. Farther left is better, in both panels.",
        _travel.comparison,
    ),
    "jacobians": (
        "Steps",
        "The largest and the smallest factor by which one step can stretch a perturbation of the state. Only where the "
        "largest stays below 1 do gradients have to vanish.",
        _net.jacobians,
    ),
    "products": (
        "Products",
        "Singular values of the product of n step Jacobians (J_t is the derivative of a state in the one before it): "
        "by how much a perturbation has grown or shrunk after n steps, along the directions that fare best and worst. "
        "Directions leave the picture where they are too small beside the largest to matter in float64.",
        _net.products,
    ),
    "spectrum": (
        "W_hh",
        "Eigenvalues of the recurrent weights. Magnitudes above 1 make powers of a matrix explode, below 1 vanish. In "
        "a net the slope of the activation and the gates come on top: the steps and products above are exact.",
        _net.eigenvalues,
    ),
    "lyapunov": (
        "Exponents",
        "Mean growth of perturbations in nats per step: below 0 a net that forgets, above 0 an unstable one (chaotic, "
        "if its states stay bounded). The second "
        "panel shows whether the estimates have settled.",
        _net.lyapunov,
    ),
    "cell_path": (
        "Cell path",
        "The product of forget gates is what passes through the cell alone; the exact Jacobian also counts the paths "
        "through h, which may add to it or cancel it.",
        _net.cell_path,
    ),
    "gates": (
        "Gates",
        "The values of every gate over steps, lanes and units. At the coloured ends the slope is near zero: there a "
        "gate is stuck, open or shut, and passes no gradient to its weights.",
        _net.gates,
    ),
    "records": (
        "Training",
        "The course of the run: perplexity, the norm of the gradient before clipping, how many steps were clipped, and "
        "the horizon (the lag within which 90 % of the gradient arises) where it was measured; an open mark is a "
        "horizon that the window may have cut short.",
        _net.training,
    ),
}
"""Heading, explanation and what draws it, one chart or panels, of each measurement, in the order of the page."""

COLUMNS = ("policy", "error", "bias", "standard deviation", "cosine", "time, ms (quartiles)", "memory, MiB")
"""Of the comparison in numbers; the last one where memory differs."""

BUTTONS = [["toImage", "resetScale2d"]]
"""Of a chart: dragging and double clicking do what the others do, and on a narrow screen they would hide the legend."""


def write(path: str | Path, survey: Survey) -> Path:
    """Write an interactive page of everything that a survey has measured; the path is returned.

    path: an HTML file in a directory that exists. It holds all it needs, plotly's script included (about 5 MB), and
    loads nothing from anywhere. A reader finds the old file or the whole new one. survey: what `bptt.flow.survey`
    gives; what it has not measured has no section. It is in the language of `bptt.flow.language`.

    Raises TypeError where it is no Survey, ValueError where nothing was measured, OSError where nothing can be written.

    >>> import tempfile, torch, bptt, bptt.report
    >>> found = bptt.flow.survey(bptt.nn.RNN(2, 4), torch.randn(20, 3, 2), policies=[])
    >>> with tempfile.TemporaryDirectory() as place:
    ...     bptt.report.write(place + "/report.html", found).name
    'report.html'
    """
    if not isinstance(survey, Survey):
        raise TypeError(f"survey must be a bptt.flow.Survey: got {type(survey).__name__}")
    text = page(survey.name, survey.setting, survey.verdict, list(_sections(survey)), get_plotlyjs())
    target = Path(path)
    new = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        new.write_text(text, encoding="utf-8")
        os.replace(new, target)
    except OSError as error:  # which names the new file, or, of a full disk, none
        raise OSError(error.errno, error.strerror or str(error), str(target)) from error
    finally:
        new.unlink(missing_ok=True)
    return target


def _sections(survey: Survey) -> Iterator[Section]:
    for key, (heading, explanation, draw) in SECTIONS.items():
        measure = getattr(survey, key)
        if measure is None or (key == "records" and not measure):
            continue
        if isinstance(measure, LagMap | Lags | Shares):
            said = tuple(conclusion(measure, layer) for layer in range(len(measure.layers)))
        else:
            said = (conclusion(measure),)
        rows = _policies(measure) if isinstance(measure, Comparison) else ""
        drawn = draw(measure)
        panels = [("", drawn)] if isinstance(drawn, go.Figure) else drawn
        names = [key] if isinstance(drawn, go.Figure) else [f"{key}-{i}" for i in range(len(panels))]
        charts = tuple((title, _html(name, figure)) for name, (title, figure) in zip(names, panels, strict=True))
        yield Section(key, say(heading), said, say(explanation), charts, rows)


def _html(key: str, figure: go.Figure) -> str:
    """The chart's part of the page; the library comes once, before all of them."""
    # Without plotly's button that would send a chart to its company's server.
    config = {"responsive": True, "displaylogo": False, "showSendToCloud": False, "modeBarButtons": BUTTONS}
    text: str = figure.to_html(full_html=False, include_plotlyjs=False, div_id=f"chart-{key}", config=config)
    return text


def _policies(comparison: Comparison) -> str:
    """The comparison in numbers; memory as a column only where it differs."""
    same = memory_of_all(comparison)
    head = [say(column) for column in (COLUMNS if same is None else COLUMNS[:-1])]
    rows = [
        (
            row.policy + (" *" if row.policy == comparison.own else ""),
            percent(total_error(row)),
            percent(row.bias) + (f" ± {percent(row.bias_error)}" if row.bias_error else ""),
            percent(math.sqrt(max(row.variance, 0.0))),
            f"{row.cosine:.3f}",
            duration(row),
            *([mebibytes(row)] if same is None else []),
        )
        for row in comparison.rows
    ]
    notes = [] if comparison.own is None else [say("*: the layer's own policy")]
    notes += [] if same is None else [say("{same} MiB under each", same=same)]
    notes += [disturbance(comparison)] if comparison.disturbed else []
    below = f"<p>{escape(say('{sentence}. ', sentence=say('; ').join(notes)).strip())}</p>" if notes else ""
    return table(head, rows) + below
