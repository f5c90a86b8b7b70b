"""The strategies compared on a text: equal steps, equal first weights, only the gradient's reach differs.

Full, chunked, truncated and randomized gradients train the same language model side by side, LEG steps each in turn, so
that whatever else the machine does slows all of them alike.

    python examples/strategies.py
    python examples/strategies.py --text timemachine.txt    # letters and spaces of any UTF-8 file
"""

from __future__ import annotations

import statistics
from typing import Any

import typer
from experiment import (
    LOOKS,
    Out,
    Quick,
    Row,
    Seed,
    Text,
    carry_out,
    figure,
    in_words,
    level,
    line,
    markdown_table,
    named,
    pick,
    publish,
    reading,
)
from experiment import values as each
from matplotlib.figure import Figure

from bptt.train import Config, InputError, Trainer, prepare

NAME = "strategies"
STRATEGIES = ("full", "chunked:8", "truncated:8", "truncated:8/4", "randomized:0.9")
LEG = 50  # steps between two measurements


class Race:
    """One trainer for every strategy, with the same seed and so the same first weights and the same text."""

    def __init__(self, config: Config) -> None:
        self.seed, dataset = config.seed, prepare(config)
        self.trainers = {gradient: Trainer(config.override(gradient=gradient), dataset) for gradient in STRATEGIES}

    def leg(self, steps: int) -> Row:
        """Every strategy takes so many steps. Perplexities, and the median time of a step in milliseconds."""
        row: Row = {"seed": self.seed, "training": {}, "heldout": {}, "milliseconds": {}}
        for gradient, trainer in self.trainers.items():
            times = [trainer.advance().seconds for _ in range(steps)]
            record = trainer.record(heldout=True)
            seen, held = record.perplexity, record.heldout_perplexity
            assert seen is not None  # some step was taken
            assert held is not None  # there is held-out text
            row["step"] = record.step
            row["training"][gradient] = round(seen, 4)
            row["heldout"][gradient] = round(held, 4)
            row["milliseconds"][gradient] = round(1000 * statistics.median(times), 3)
        return row


def last(rows: list[Row], quantity: str, gradient: str) -> list[float]:
    """A quantity at the last step that every seed has reached, by seed."""
    final = min(max(each(pick(rows, seed=seed), "step")) for seed in each(rows, "seed"))
    return [row[quantity][gradient] for row in pick(rows, step=final)]


def cost(rows: list[Row], gradient: str) -> float:
    """The time of a step over that of a step with the full gradient, median over legs."""
    return statistics.median(row["milliseconds"][gradient] / row["milliseconds"]["full"] for row in rows)


def conclusion(rows: list[Row]) -> str:
    """The figure's title."""
    mean = {gradient: statistics.fmean(last(rows, "heldout", gradient)) for gradient in STRATEGIES}
    best, worst = min(mean, key=mean.__getitem__), max(mean, key=mean.__getitem__)
    step = min(max(each(pick(rows, seed=seed), "step")) for seed in each(rows, "seed"))
    dearest = max(STRATEGIES, key=lambda gradient: cost(rows, gradient))
    return (
        f"After {step} steps held-out perplexity lies between {mean[best]:.2f} ({best}) and {mean[worst]:.2f} "
        f"({worst}); a step of {dearest} takes {cost(rows, dearest):.1f} times as long as a full one"
    )


def draw(rows: list[Row]) -> Figure:
    """Held-out perplexity by step, also as its distance from that of the full gradient, and the time of a step."""
    drawn, (left, right) = figure(conclusion(rows), 2)
    within = left.inset_axes((0.46, 0.5, 0.54, 0.48))
    steps = [s for s in sorted(each(rows, "step")) if len(pick(rows, step=s)) == len(each(rows, "seed"))]
    for look, gradient in enumerate(STRATEGIES):
        pairs = [[(row["heldout"][gradient], row["heldout"]["full"]) for row in pick(rows, step=s)] for s in steps]
        line(left, steps, [[own for own, _ in pair] for pair in pairs], look, gradient)
        if gradient != "full":
            line(within, steps, [[100 * (own / full - 1) for own, full in pair] for pair in pairs], look, gradient)
        right.barh(look, cost(rows, gradient), color=LOOKS[look]["color"], alpha=0.8)
        right.text(cost(rows, gradient), look, f" {milliseconds(rows, gradient):.1f} ms", va="center", fontsize=9)
    left.set(xlabel="optimiser steps", ylabel="held-out perplexity per character", yscale="log")
    low, high = left.get_ylim()
    left.set_ylim(low / (high / low) ** 0.35, high)  # room for the legend
    ticks = [t for t in (4, 5, 6, 7, 8, 10, 12, 15, 20, 30) if low <= t <= high]
    left.set_yticks(ticks, labels=map(str, ticks))
    left.minorticks_off()
    left.legend(fontsize=9, loc="lower left")
    level(within, 0.0, "")
    within.set_title("% above full", fontsize=9, fontweight="normal", pad=3)
    within.tick_params(labelsize=9)
    right.set_yticks(range(len(STRATEGIES)), labels=STRATEGIES)
    right.set(xlabel="time of a step, full gradient = 1", xlim=(0, 1.3 * max(cost(rows, g) for g in STRATEGIES)))
    right.invert_yaxis()
    return drawn


def milliseconds(rows: list[Row], gradient: str) -> float:
    """The median time of a step."""
    return statistics.median(row["milliseconds"][gradient] for row in rows)


def table(rows: list[Row]) -> str:
    """Perplexities at the end and the time of a step, as Markdown."""
    lines = [
        [
            f"`{gradient}`",
            in_words(last(rows, "training", gradient)),
            in_words(last(rows, "heldout", gradient)),
            f"{milliseconds(rows, gradient):.1f}",
            f"{cost(rows, gradient):.2f}",
        ]
        for gradient in STRATEGIES
    ]
    return markdown_table(
        ["strategy", f"training perplexity, last {LEG} steps", "held-out perplexity", "ms a step", "times full"], lines
    )


def main(quick: Quick = False, seed: Seed = 0, out: Out = None, text: Text = None) -> None:
    """Full, chunked, truncated and randomized gradients on a text, at equal steps."""
    common: dict[str, Any] = {"cell": "gru", "hidden": 128, "embedding": 32, "seq_length": 64, "batch": 32}
    steps, seeds, leg = (4, 1, 2) if quick else (600, 3, LEG)
    if quick:
        common |= {"hidden": 16, "limit": 4000, "batch": 8}
    races: dict[int, Race] = {}

    def measure(leg_of: tuple[int, int]) -> Row:
        start, at = leg_of
        if start not in races:
            races.clear()  # the last seed's nets are done
            races[start] = Race(Config(**common, **reading(text), steps=steps, seed=start))
        return races[start].leg(at)

    try:
        rows, complete = carry_out([(seed + s, leg) for s in range(seeds) for _ in range(steps // leg)], measure)
    except InputError as error:
        raise typer.BadParameter(str(error)) from None
    settings = common | {"text": named(text), "window": 8}
    publish(NAME, settings, rows, draw, complete=complete, quick=quick, out=out)


if __name__ == "__main__":
    typer.run(main)
