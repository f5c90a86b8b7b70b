"""The pictures of the page for contributors: what calls what in one training call. They measure nothing."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from bptt.plots.style import BLACK, BLUE, GREY, PALE, VERMILLION, blank, styled

__all__ = ["layers", "segments"]

Place = tuple[float, float]


LEFT, RIGHT = 2.4, 7.6
"""Where the way forward and the way back stand."""


@styled
def layers() -> Figure:
    """One call of two layers whose tape is kept whole: x down through stage 1, dy back up through stages 2 to 4."""
    figure, ax = _paper(10.2)
    _room(ax, 8.62, 1.0, "nn")
    _room(ax, 1.68, 6.72, "engine, which calls kernels and cells")
    _label(ax, (LEFT, 10.05), "x, initial state, weights", BLUE)
    _label(ax, (RIGHT, 10.05), "their gradients", VERMILLION)
    _box(ax, (LEFT, 9.05), "layer(x, hx)", "checks the call, chooses a program", BLUE)
    _box(ax, (LEFT, 7.5), "run(program, *tensors)", "a Net, run as a Stack; autograd sees one node", BLUE)
    _box(ax, (RIGHT, 7.5), "Grads", "of every input, to autograd", VERMILLION)
    for y, name in ((5.85, "layer 0"), (3.45, "layer 1")):
        _box(ax, (LEFT, y), "kernel.forward(...)", f"stage 1 of {name}: cell.gates, cell.advance", BLUE)
        _box(ax, (RIGHT, y + 0.48), "cell.factors", f"stage 4 of {name}: one product a weight, and dx", VERMILLION)
        _box(ax, (RIGHT, y - 0.48), "kernel.sweep(Sweep)", f"stage 3 of {name}: cell.pull", VERMILLION)
        _arrow(ax, (LEFT + 2.25, y), (RIGHT - 2.25, y - 0.4), GREY, dashed=True)
        _label(ax, (5.0, y + 0.25), "tape", GREY)
        _arrow(ax, (RIGHT, y - 0.13), (RIGHT, y + 0.13), VERMILLION, head=9)
        _label(ax, (RIGHT + 0.12, y), "SweepResult", VERMILLION, left=True)
    _box(ax, (RIGHT, 2.1), "program.backward(Saved, Asked)", "called by autograd", VERMILLION)
    _box(
        ax,
        (5.0, 0.62),
        "the caller's loss",
        "stage 2: autograd differentiates what follows the layer",
        BLACK,
        width=9.6,
    )
    for start, end in ((9.85, 9.42), (8.7, 7.87), (7.13, 6.22), (5.48, 3.82), (3.08, 1.0)):
        _arrow(ax, (LEFT, start), (LEFT, end), BLUE)
    for start, end in ((1.0, 1.72), (2.46, 2.6), (4.3, 5.0), (6.7, 7.13), (7.87, 9.85)):
        _arrow(ax, (RIGHT, start), (RIGHT, end), VERMILLION)
    _label(ax, (LEFT + 0.12, 4.65), "y of layer 0", BLUE, left=True)
    _label(ax, (RIGHT + 0.12, 4.65), "error of layer 0", VERMILLION, left=True)
    _label(ax, (LEFT + 0.12, 1.3), "y, final state", BLUE, left=True)
    _label(ax, (RIGHT + 0.12, 1.3), "dy, d(final state)", VERMILLION, left=True)
    return figure


@styled
def segments() -> Figure:
    """The same with checkpoints: stage 1 keeps a state now and then, the way back runs one segment at a time again."""
    figure, ax = _paper(5.6)
    _label(
        ax, (-0.05, 5.6), "Checkpointed.forward keeps the states in circles, and no tape", BLUE, left=True, bold=True
    )
    _label(ax, (-0.05, 3.72), "reversals(...): the last one first", VERMILLION, left=True, bold=True)
    width, apart = 1.8, 2.25
    for i in range(4):
        x = 2.2 + i * apart
        before = x - apart / 2
        _box(ax, (x, 4.85), f"segment {i}", "stage 1", BLUE, width=width)
        _box(ax, (x, 2.95), "Stack.forward", "again, with a tape", BLUE, width=width)
        _box(ax, (x, 1.75), "BackwardPass", "stages 3 and 4", VERMILLION, width=width)
        _arrow(ax, (x, 2.58), (x, 2.12), GREY, dashed=True)
        _arrow(ax, (x, 1.38), (x, 0.68), VERMILLION)
        _arrow(ax, (before - (apart - width) / 2, 4.85), (x - width / 2, 4.85), BLUE, head=9)
        _arrow(ax, (x - width / 2, 1.75), (before - (apart - width) / 2, 1.75), VERMILLION, head=9)
        if i:
            _state(ax, (before, 4.85), f"{i}")
            _arrow(ax, (before, 4.6), (x - width / 2, 3.2), GREY, dashed=True)
    _label(ax, (0.45, 4.85), "x, initial\nstate", BLUE)
    _label(ax, (0.45, 1.75), "d(initial\nstate)", VERMILLION)
    _label(ax, (3.33, 1.12), "adjoints cross:\nblock_sweep", VERMILLION)
    _box(ax, (5.55, 0.32), "Grads", "dx segment by segment; the sums of the weights' gradients", VERMILLION, width=8.7)
    return figure


def _paper(height: float) -> tuple[Figure, Axes]:
    figure, ax = blank(None, (8.0, 0.78 * height))
    ax.set_xlim(-0.1, 10.1)
    ax.set_ylim(-0.1, height + 0.2)
    ax.set_axis_off()
    return figure, ax


def _box(ax: Axes, middle: Place, name: str, does: str, colour: str, *, width: float = 4.4) -> None:
    """A rectangle with a name, and below it what that does."""
    (x, y), height = middle, 0.7
    corner, shape = (x - width / 2, y - height / 2), "round,pad=0.0,rounding_size=0.08"
    ax.add_patch(FancyBboxPatch(corner, width, height, boxstyle=shape, facecolor="white", edgecolor=colour, zorder=3))
    ax.text(x, y + 0.15, name, family="monospace", fontsize=9.5, ha="center", va="center", zorder=4)
    ax.text(x, y - 0.16, does, fontsize=9, ha="center", va="center", zorder=4)


def _room(ax: Axes, y: float, height: float, name: str) -> None:
    shape = "round,pad=0.0,rounding_size=0.1"
    ax.add_patch(FancyBboxPatch((0.0, y), 10.0, height, boxstyle=shape, facecolor=PALE, edgecolor="none", zorder=0))
    ax.text(5.0, y + height - 0.22, name, fontsize=9.5, fontweight="bold", ha="center", va="center", zorder=4)


def _label(ax: Axes, place: Place, text: str, colour: str, *, left: bool = False, bold: bool = False) -> None:
    weight, side = "bold" if bold else "normal", "left" if left else "center"
    ax.text(*place, text, color=colour, fontsize=9.5, fontweight=weight, ha=side, va="center", zorder=4)


def _state(ax: Axes, place: Place, text: str) -> None:
    circle = {"boxstyle": "circle,pad=0.2", "facecolor": PALE, "edgecolor": BLACK, "linewidth": 1.0}
    ax.text(*place, text, fontsize=9, ha="center", va="center", zorder=5, bbox=circle)


def _arrow(ax: Axes, start: Place, end: Place, colour: str, *, dashed: bool = False, head: float = 12.0) -> None:
    line = (0, (4, 2)) if dashed else "-"
    ax.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=head,
            shrinkA=0,
            shrinkB=0,
            color=colour,
            linestyle=line,
            zorder=2,
        )
    )
