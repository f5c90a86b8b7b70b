"""What a notebook shows of a measurement: its sentence and its picture."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable
from functools import singledispatch
from html import escape
from typing import Any

from matplotlib.figure import Figure

from ..flow import (
    CellPath,
    Comparison,
    Diagnosis,
    Gates,
    Jacobians,
    LagMap,
    Lags,
    Lyapunov,
    Products,
    Shares,
    Spectrum,
    Survey,
    Verdict,
    conclusion,
)
from ..flow.conclusions import NOTHING
from ..flow.language import say
from ._cell_path import cell_path
from ._comparison import comparison
from ._decay import decay
from ._eigenvalues import eigenvalues
from ._gates import gates
from ._jacobians import jacobians
from ._lag_map import lag_map
from ._lyapunov import lyapunov
from ._products import products
from ._shares import shares
from .style import Picture

__all__ = ["html"]

DRAWN: dict[type, Any] = {
    CellPath: cell_path,
    Comparison: comparison,
    Gates: gates,
    Jacobians: jacobians,
    LagMap: lag_map,
    Lags: decay,
    Lyapunov: lyapunov,
    Products: products,
    Shares: shares,
    Spectrum: eigenvalues,
}
"""What draws each measurement."""


@singledispatch
def html(measure: Any) -> str | None:
    """A measurement as HTML, its picture within it: what a notebook shows where one is the value of a cell.

    measure: a dataclass of `bptt.flow`. None for what has no picture and no sentence.

    >>> import torch, bptt, bptt.plots
    >>> text = bptt.plots.html(bptt.flow.spectrum(bptt.nn.GRU(2, 4)))
    >>> text.startswith("<figure"), "The largest |eigenvalue| is" in text
    (True, True)
    """
    draw = DRAWN.get(type(measure))
    return None if draw is None else _figure(draw(measure), conclusion(measure))


@html.register
def _(measure: Verdict) -> str:
    draw = DRAWN.get(type(measure.of))
    picture = "" if draw is None else _figure(draw(measure.of), measure.headline)
    said = [_paragraph(measure.plain or measure.headline, bold=True), *map(_paragraph, measure.conditions)]
    if measure.advice:
        said.append(f"<p><b>{escape(say('What to change'))}</b></p>{_list(measure.advice)}")
    else:
        said.append(_paragraph(say(NOTHING), bold=True))
    rows = "".join(f"<tr><td>{escape(topic)}</td><td>{escape(text)}</td></tr>" for topic, text in measure.findings)
    findings = f"<details><summary>{escape(say('All findings'))}</summary><table>{rows}</table></details>"
    return f"{''.join(said)}{picture}{findings}"


@html.register
def _(measure: Survey) -> str:
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{escape(text)}</td></tr>" for name, text in measure.setting.entries)
    head = f"<p>{escape(measure.name)}</p><table>{rows}</table>"
    if not measure.measures:
        return head
    map = measure.lag_map
    picture = "" if map is None else _figure(lag_map(map), conclusion(map))
    return f"{head}{html(measure.verdict)}{picture}"


@html.register
def _(measure: Diagnosis) -> str:
    if not measure.findings:
        return _paragraph(say("Everything is finite"), bold=True)
    return _paragraph(say("Not finite"), bold=True) + _list(finding.message for finding in measure.findings)


def _figure(picture: Figure, sentence: str) -> str:
    assert isinstance(picture, Picture)
    data = b64encode(picture._repr_png_()).decode()
    image = f'<img style="max-width: 100%" alt="{escape(sentence)}" src="data:image/png;base64,{data}">'
    return f'<figure style="margin: 0">{image}</figure>'


def _paragraph(text: str, bold: bool = False) -> str:
    said = escape(text)
    return f"<p><b>{said}</b></p>" if bold else f"<p>{said}</p>"


def _list(texts: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ul>"
