"""The farther the name, the worse the prediction: accuracy against distance, by cell and by window.

Trains a net for every cell and distance to fill in a blank (see blank.py), with the full gradient; then one cell again
with windows. `Truncated(k)` lets the loss reach the k last steps, its own included, so that the name `distance` steps
back is within reach only while distance < k. `Chunked(k)` lets it reach as far only from the end of a chunk: at a
distance that is a multiple of k the blank begins a chunk, and the loss reaches its own step alone.

    python examples/recall_distance.py
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import blank
import torch
import typer
from experiment import (
    LOOKS,
    Out,
    Quick,
    Row,
    Seed,
    carry_out,
    figure,
    in_words,
    level,
    line,
    markdown_table,
    pick,
    publish,
)
from experiment import values as each
from matplotlib.figure import Figure

CELLS = ("rnn", "gru", "lstm")
WINDOWED = "gru"  # the cell that goes farthest with the full gradient
WINDOWS = ("truncated:4", "truncated:8", "truncated:16", "chunked:8")
DISTANCES = (3, 4, 6, 8, 12, 16, 24, 32, 64)


@dataclass(frozen=True)
class Run:
    """One net: what recurs, how far its gradient reaches, how far back the name lies."""

    cell: str
    gradient: str
    distance: int
    seed: int
    steps: int


def measure(run: Run) -> Row:
    """Train it, then ask for names it has not seen in these sentences."""
    torch.manual_seed(run.seed)
    model = blank.network(run.cell, run.gradient)
    for _ in blank.train(model, run.distance, run.steps, run.seed):
        pass
    return asdict(run) | {"accuracy": blank.accuracy(model, run.distance)}


def conclusion(rows: list[Row]) -> str:
    """The figure's title."""
    full = pick(rows, gradient="full")
    cells = ", ".join(f"{cell.upper()} {blank.recalled_up_to(pick(full, cell=cell))}" for cell in each(full, "cell"))
    windowed = [row for row in rows if row["gradient"] != "full"]
    windows = ", ".join(
        f"{blank.recalled_up_to(pick(windowed, gradient=gradient))} with {gradient}"
        for gradient in each(windowed, "gradient")
    )
    words = f"Names are recalled at every distance up to: {cells}"
    return f"{words}; {WINDOWED.upper()} {windows}" if windows else words


def draw(rows: list[Row]) -> Figure:
    """Accuracy against distance: cells on the left, windows on the right."""
    drawn, (left, right) = figure(conclusion(rows), 2)
    shown = {left: [(cell, "full", cell.upper()) for cell in each(rows, "cell")]}
    shown[right] = [(WINDOWED, gradient, gradient) for gradient in each(pick(rows, cell=WINDOWED), "gradient")]
    distances = sorted(each(rows, "distance"))
    for ax, nets in shown.items():
        for look, (cell, gradient, label) in enumerate(nets):
            mine = pick(rows, cell=cell, gradient=gradient)
            x = sorted(each(mine, "distance"))
            line(ax, x, [[row["accuracy"] for row in pick(mine, distance=d)] for d in x], look, label)
            if gradient.startswith("truncated"):
                ax.axvline(int(gradient.split(":")[1]), color=LOOKS[look]["color"], linewidth=0.8, alpha=0.6)
        level(ax, blank.CHANCE, "chance")
        ax.set(xscale="log", xlabel="distance of the name (steps)", ylim=(0, 1.03))
        ax.set_xticks(distances, labels=map(str, distances), fontsize=9)
        ax.minorticks_off()
        heading = "full gradient" if ax is left else WINDOWED.upper()
        ax.legend(fontsize=9, loc="center left", title=heading, title_fontsize=9)
    left.set_ylabel("names recalled (fraction)")
    return drawn


def table(rows: list[Row]) -> str:
    """Accuracy by net and distance, as Markdown."""
    distances = sorted(each(rows, "distance"))[1::2]
    nets = dict.fromkeys((row["cell"], row["gradient"]) for row in rows)
    lines = []
    for cell, gradient in nets:
        cells = [[r["accuracy"] for r in pick(rows, cell=cell, gradient=gradient, distance=d)] for d in distances]
        shown = [in_words(a) if a else "" for a in cells]
        lines.append(
            [
                f"{cell.upper()}, `{gradient}`",
                str(blank.recalled_up_to(pick(rows, cell=cell, gradient=gradient))),
                *shown,
            ]
        )
    return markdown_table(["net", "recalled up to", *(f"{d} steps" for d in distances)], lines)


def main(quick: Quick = False, seed: Seed = 0, out: Out = None) -> None:
    """Accuracy against distance, for every cell and for several windows."""
    distances, steps, seeds = ((3, 6), 30, 1) if quick else (DISTANCES, 800, 3)
    nets = [(cell, "full") for cell in CELLS] + [(WINDOWED, window) for window in WINDOWS]
    plan = [Run(*net, d, seed + s, steps) for s in range(seeds) for net in nets for d in distances]
    rows, complete = carry_out(plan, measure)
    publish("recall_distance", blank.SETTINGS, rows, draw, complete=complete, quick=quick, out=out)


if __name__ == "__main__":
    typer.run(main)
