"""What the forget gate begins with decides what an LSTM can learn to remember: bias 0, bias 1, chrono.

With a forget gate f = sigmoid(b) a cell keeps the fraction f^k of itself, and of an error on its way back, over k
steps: f = 0.5 at b = 0, 0.73 at b = 1. Over 32 steps that leaves 2e-10 and 4e-5 to learn from. Chrono initialisation
draws b for every unit, so that their memories spread evenly up to the longest distance expected. The task is that of
blank.py.

    python examples/forget_bias.py
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import blank
import torch
import typer
from experiment import Out, Quick, Row, Seed, carry_out, figure, in_words, level, line, markdown_table, pick, publish
from experiment import values as each
from matplotlib.figure import Figure

import bptt

NAME = "forget_bias"
BIASES = ("0", "1", "chrono")
DISTANCES = (4, 8, 16, 32, 64)
SHOWN = 16  # distance of the curves on the left
EVERY = 50  # steps between two points of a curve


@dataclass(frozen=True)
class Run:
    """One LSTM: how its forget gate begins, how far back the name lies."""

    bias: str
    distance: int
    seed: int
    steps: int


def measure(run: Run) -> Row:
    """Train it, asking for names on the way. The net is the same for every bias but for the biases themselves."""
    torch.manual_seed(run.seed)
    model = blank.network("lstm")
    if run.bias == "chrono":
        bptt.nn.init.chrono_(model.recurrent, longest=run.distance)
    else:
        bptt.nn.init.forget_bias_(model.recurrent, float(run.bias))
    curve = [
        blank.accuracy(model, run.distance)
        for step in blank.train(model, run.distance, run.steps, run.seed)
        if step % EVERY == 0
    ]
    return asdict(run) | {"accuracy": curve[-1], "curve": curve}


def conclusion(rows: list[Row]) -> str:
    """The figure's title."""
    far = {bias: blank.recalled_up_to(pick(rows, bias=bias)) for bias in each(rows, "bias")}
    words = ", ".join(f"{label(bias)}: {steps}" for bias, steps in far.items())
    return f"Steps over which an LSTM learns to recall a name, by the forget gate it begins with: {words}"


def label(bias: str) -> str:
    """A name for the legend."""
    return bias if bias == "chrono" else f"bias {bias}"


def draw(rows: list[Row]) -> Figure:
    """Learning at one distance, and what was learned at each."""
    drawn, (left, right) = figure(conclusion(rows), 2)
    distances = sorted(each(rows, "distance"))
    shown = SHOWN if SHOWN in distances else distances[-1]
    for look, bias in enumerate(each(rows, "bias")):
        mine = pick(rows, bias=bias)
        if curves := [row["curve"] for row in pick(mine, distance=shown)]:
            steps = [EVERY * (i + 1) for i in range(len(curves[0]))]
            line(left, steps, list(zip(*curves, strict=True)), look, label(bias))
        x = sorted(each(mine, "distance"))
        line(right, x, [[row["accuracy"] for row in pick(mine, distance=d)] for d in x], look, label(bias))
    for ax in (left, right):
        ax.set(ylim=(0, 1.03), ylabel="names recalled (fraction)" if ax is left else "")
        level(ax, blank.CHANCE, "chance")
    left.set(xlabel=f"optimiser steps, distance {shown}")
    right.set(xlabel="distance of the name (steps)", xscale="log")
    right.set_xticks(distances, labels=map(str, distances))
    right.minorticks_off()
    right.legend(loc="center left")
    return drawn


def table(rows: list[Row]) -> str:
    """Accuracy by bias and distance, as Markdown."""
    distances = sorted(each(rows, "distance"))
    lines = [
        [label(bias), *(in_words([r["accuracy"] for r in pick(rows, bias=bias, distance=d)]) for d in distances)]
        for bias in each(rows, "bias")
    ]
    return markdown_table(["forget gate", *(f"{d} steps" for d in distances)], lines)


def main(quick: Quick = False, seed: Seed = 0, out: Out = None) -> None:
    """Forget bias 0, 1 and chrono on a memory task."""
    distances, steps, seeds = ((4,), EVERY, 1) if quick else (DISTANCES, 1000, 3)
    plan = [Run(bias, d, seed + s, steps) for s in range(seeds) for d in distances for bias in BIASES]
    rows, complete = carry_out(plan, measure)
    publish(NAME, blank.SETTINGS, rows, draw, complete=complete, quick=quick, out=out)


if __name__ == "__main__":
    typer.run(main)
