"""The computational graph of a small net, unrolled in time."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch

from ..cells import of_name
from .style import BLACK, GREY, PALE, VERMILLION, blank, styled, title

__all__ = ["graph"]

Place = tuple[float, float]


@styled
def graph(T: int = 3, cell: str = "rnn", *, ax: Axes | None = None) -> Figure:
    """Inputs, shared weights, states, outputs and loss of T steps; black is forward, dashed vermillion backward.

    T: steps, 1 to 8: more cannot be read. cell: "rnn", "gru" or "lstm"; an LSTM has a row for c. ax: where to draw; a
    new figure by default.

    Raises ValueError for another cell or T. Source: Zhang, Lipton, Li, Smola, Dive into Deep Learning, section 9.7.

    >>> import bptt.plots
    >>> bptt.plots.graph(T=2, cell="lstm").get_suptitle().split(":")[0]
    'One w_h acts at all 2 steps'
    """
    states = of_name(cell).state_names[::-1]  # bottom up
    if not 1 <= T <= 8:
        raise ValueError(f"T must be 1 to 8 steps: got {T}")
    figure, axes = blank(ax, (8.0, 4.0 + 0.9 * len(states)))
    rows = ["x", *states, "o", "l"]
    places = {(row, t): (float(t), float(y)) for y, row in enumerate(rows) for t in range(1, T + 1)}
    places |= {(row, 0): (0.4, float(rows.index(row))) for row in states}
    top = ((T + 1) / 2, float(len(rows)))
    for (row, t), place in places.items():
        _node(axes, place, f"${_symbol(row)}_{{{t}}}$", "white" if row in "xo" or t == 0 else PALE)
    _node(axes, top, "$L$", PALE)
    for start, end, bend in _arrows(T, states):
        _arrow(axes, places[start], places[end], bend, backward=start[0] != "x" and start[1] > 0)
    for t in range(1, T + 1):
        _arrow(axes, places["l", t], top, 0.0, backward=True)
        x, y = places["h", t]
        axes.text(x + 0.09, y + 0.42, rf"$\lambda_{{{t}}}$", color=VERMILLION, fontsize=12, ha="center", va="center")
    _weights(axes, places, T, "w_h", states[0])
    _weights(axes, places, T, "w_o", "o")
    axes.plot([], [], color=BLACK, label="forward")
    axes.plot([], [], color=VERMILLION, linestyle="--", label=r"backward; $\lambda_t = dL/dh_t$")
    axes.legend(loc="upper left", borderaxespad=0.0)
    axes.set_xlim(0.15, T + 0.35)
    axes.set_ylim(-0.35, top[1] + 0.3)
    axes.set_axis_off()
    through = f"{T * (T + 1) // 2} pairs of a loss and a step before it" if T > 1 else "one loss"
    acts = f"acts at all {T} steps" if T > 1 else "acts at one step"
    title(figure if ax is None else ax, f"One w_h {acts}: dL/dw_h adds up what {through} send back")
    return figure


def _symbol(row: str) -> str:
    return r"\ell" if row == "l" else row


def _arrows(T: int, states: tuple[str, ...]) -> list[tuple[tuple[str, int], tuple[str, int], float]]:
    """(from, to, bend) of every forward arrow but those from the weights and to L."""
    arrows: list[tuple[tuple[str, int], tuple[str, int], float]] = []
    for t in range(1, T + 1):
        if "c" in states:
            arrows += [(("x", t), ("c", t), 0.0), (("x", t), ("h", t), 0.4), (("c", t), ("h", t), 0.0)]
            arrows += [(("c", t - 1), ("c", t), 0.0), (("h", t - 1), ("c", t), 0.0)]
        else:
            arrows.append((("x", t), ("h", t), 0.0))
        arrows += [(("h", t - 1), ("h", t), 0.0), (("h", t), ("o", t), 0.0), (("o", t), ("l", t), 0.0)]
    return arrows


def _node(ax: Axes, place: Place, text: str, face: str) -> None:
    ax.text(
        *place,
        text,
        fontsize=13,
        ha="center",
        va="center",
        zorder=4,
        bbox={"boxstyle": "circle,pad=0.22", "facecolor": face, "edgecolor": BLACK, "linewidth": 1.0},
    )


def _arrow(ax: Axes, start: Place, end: Place, bend: float, backward: bool) -> None:
    """An arrow forward, and beside it one back where an adjoint walks it."""
    shared: dict[str, Any] = {"mutation_scale": 11, "shrinkA": 15, "shrinkB": 15, "zorder": 2}
    ax.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", connectionstyle=f"arc3,rad={bend}", color=BLACK, **shared)
    )
    if backward:
        curve = f"arc3,rad={0.28 + abs(bend)}"
        ax.add_patch(
            FancyArrowPatch(
                end, start, arrowstyle="-|>", connectionstyle=curve, color=VERMILLION, linestyle=(0, (4, 2)), **shared
            )
        )


def _weights(ax: Axes, places: dict[tuple[str, int], Place], T: int, name: str, row: str) -> None:
    """A square at each step, joined by a line: the same numbers."""
    squares = []
    for t in range(1, T + 1):
        x, y = places[row, t]
        squares.append((x - 0.27, y - 0.5))
        box = {"boxstyle": "square,pad=0.25", "facecolor": "white", "edgecolor": GREY, "linewidth": 1.0}
        ax.text(*squares[-1], f"${name}$", fontsize=11, ha="center", va="center", zorder=4, bbox=box)
        _arrow(ax, squares[-1], places[row, t], 0.0, backward=True)
    ax.plot([x for x, _ in squares], [y for _, y in squares], color=GREY, linestyle=":", linewidth=1.4, zorder=1)
