"""The eigenvalues of W_hh on the unit circle."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from ..flow import Spectrum, conclusion
from ..flow.language import say
from ..flow.wording import number
from .style import BLUE, GREY, VERMILLION, Picture, empty, styled, title

__all__ = ["eigenvalues"]


@styled
def eigenvalues(measure: Spectrum) -> Figure:
    """The eigenvalues of each gate's recurrent weights in the complex plane, with the unit circle.

    measure: what `bptt.flow.spectrum` gives; one panel per gate.

    >>> import bptt, bptt.plots
    >>> figure = bptt.plots.eigenvalues(bptt.flow.spectrum(bptt.nn.GRU(2, 4)))
    >>> [ax.get_title(loc="left").split(":")[0] for ax in figure.axes]
    ['gate r', 'gate z', 'gate n']
    """
    gates = len(measure.gates)
    columns = gates if gates <= 3 else 2
    rows = -(-gates // columns)
    figure = Picture(figsize=(8.0, 4.6 if gates == 1 else 4.0 if rows == 1 else 6.8), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    angle = np.linspace(0, 2 * np.pi, 361)
    there = np.abs(measure.eigenvalues[np.isfinite(measure.eigenvalues)])
    limit = 1.1 * max(1.05, float(there.max(initial=0.0)))
    for i, gate in enumerate(measure.gates):
        ax = panels[i // columns][i % columns]
        values = measure.eigenvalues[i]
        values = values[np.isfinite(values)]
        ax.plot(np.cos(angle), np.sin(angle), color=VERMILLION, linewidth=2, zorder=4)  # over the points, to be seen
        ax.axhline(0, color=GREY, linewidth=0.5)
        ax.axvline(0, color=GREY, linewidth=0.5)
        ax.set_aspect("equal")
        if len(values):
            ax.scatter(values.real, values.imag, s=14, color=BLUE, alpha=0.6, linewidth=0, zorder=3)
            sizes = say("radius {radius}, norm {norm}", radius=number(measure.radius[i]), norm=number(measure.norm[i]))
            ax.set_title(
                f"W_hh: {sizes}" if gates == 1 else say("gate {gate}:\n{sizes}", gate=gate, sizes=sizes), fontsize=10.5
            )
        else:
            empty(ax, say("not finite"))
        if i // columns == rows - 1:
            ax.set_xlabel(say("real part"))
        if i % columns == 0:
            ax.set_ylabel(say("imaginary part"))
    panels[0][0].set_xlim(-limit, limit)
    panels[0][0].set_ylim(-limit, limit)
    title(figure, conclusion(measure))
    return figure
