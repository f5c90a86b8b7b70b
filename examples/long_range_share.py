"""Training that stops using long-range terms: how much of the gradient comes from far, while a net learns a text.

dL/dW_hh is a sum over lags: what the loss at t says about the use of W_hh at t - lag. Short lags dominate, the update
follows them, and the question is whether it leads to where the long ones no longer count. Measured on one held-out
batch, at a few steps of training: the relative error of a gradient without the lags of FAR steps and more,
|G - G_near| / |G|. Nets that begin with a long memory show what becomes of it.

    python examples/long_range_share.py
    python examples/long_range_share.py --text timemachine.txt    # letters and spaces of any UTF-8 file
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import torch
import typer
from experiment import (
    Out,
    Quick,
    Row,
    Seed,
    Text,
    carry_out,
    figure,
    in_words,
    line,
    markdown_table,
    named,
    pick,
    publish,
    reading,
)
from experiment import values as each
from matplotlib.figure import Figure

import bptt
from bptt.train import Config, InputError, Sequential, Trainer, prepare

NAME = "long_range_share"
NETS = ("RNN", "RNN, orthogonal", "LSTM", "LSTM, chrono")
STEPS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
BIN_EDGES = (0, 1, 2, 4, 8, 16, 32)  # lags, in steps
FAR = 8


@dataclass(frozen=True)
class Run:
    """One net, and its seed."""

    net: str
    seed: int


def begin(config: Config, net: str) -> Trainer:
    """A trainer of the net; "orthogonal" and "chrono" give it a long memory to begin with."""
    trainer = Trainer(config, prepare(config))
    recurrent = trainer.model.recurrent
    if net.endswith("orthogonal"):
        bptt.nn.init.orthogonal_(recurrent)
    if net.endswith("chrono"):
        bptt.nn.init.chrono_(recurrent, longest=config.seq_length)
    return trainer


def measure(run: Run, config: Config) -> Row:
    """Train, stopping at STEPS to take the gradient of a held-out batch apart."""
    trainer = begin(config.override(seed=run.seed, cell=run.net.partition(",")[0].lower()), run.net)
    heldout = trainer.task.heldout
    assert heldout is not None
    probe = Sequential(heldout, config.seq_length, config.batch).window(0, 0)

    def loss(output: tuple[torch.Tensor, Any]) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(output[0].flatten(0, 1), probe.targets.flatten())

    row: Row = {"net": run.net, "seed": run.seed, "step": [], "error": [], "total": []}
    for step in (s for s in STEPS if s <= trainer.total):
        while trainer.step < step:
            trainer.advance()
        found = bptt.flow.shares(trainer.model.eval(), (probe.inputs,), loss, bin_edges=BIN_EDGES)
        row["step"].append(step)
        row["error"].append([round(float(e), 5) for e in found.bias[0][:-1]])  # of keeping lags below BIN_EDGES[1:]
        row["total"].append(float(found.total[0]))
    return row | {"heldout": trainer.record(heldout=True).heldout_perplexity}


def course(rows: list[Row], net: str) -> list[list[float]]:
    """By seed: the error of leaving out lags of FAR and more, at every step measured."""
    return [[error[BIN_EDGES.index(FAR) - 1] for error in row["error"]] for row in pick(rows, net=net)]


def lowest(rows: list[Row], net: str) -> int:
    """The index of the step at which far lags count least, in the mean over seeds."""
    means = [statistics.fmean(column) for column in zip(*course(rows, net), strict=True)]
    return min(range(len(means)), key=means.__getitem__)


def moments(rows: list[Row]) -> tuple[str, list[int]]:
    """The net that began with the longest memory, and what to look at: first step, the lowest, the last, by index."""
    net = max(each(rows, "net"), key=lambda net: statistics.fmean(run[0] for run in course(rows, net)))
    return net, sorted({0, lowest(rows, net), len(rows[0]["step"]) - 1})


def conclusion(rows: list[Row]) -> str:
    """The figure's title."""
    net, shown = moments(rows)
    errors = [statistics.fmean(run[i] for run in course(rows, net)) for i in shown]
    after = ", ".join(f"{e:.0%} after {rows[0]['step'][i]} steps" for e, i in zip(errors, shown, strict=True) if i)
    return f"{net}: without lags of {FAR} and more its gradient is off by {errors[0]:.0%} before training, {after}"


def draw(rows: list[Row]) -> Figure:
    """The error over training, and by cut at three moments for the net of the title."""
    drawn, (left, right) = figure(conclusion(rows), 2)
    steps = rows[0]["step"]
    for look, net in enumerate(each(rows, "net")):
        line(left, steps, list(zip(*course(rows, net), strict=True)), look, net)
    left.set_xscale("symlog", linthresh=1, linscale=0.5)
    ticks = [s for s in steps if str(s)[0] in "01"]
    left.set_xticks(ticks, labels=map(str, ticks))
    left.set(xlabel="optimiser steps", ylabel=f"relative error without lags of {FAR} and more", ylim=(0, None))
    left.legend(fontsize=9)
    net, shown = moments(rows)
    for look, at in enumerate(shown):
        errors = [row["error"][at] for row in pick(rows, net=net)]
        line(right, BIN_EDGES[1:], list(zip(*errors, strict=True)), look, f"after {steps[at]} steps")
    right.set(xscale="log", yscale="log", xlabel="lags kept (steps)", ylabel=f"relative error, {net}")
    right.set_xticks(BIN_EDGES[1:], labels=map(str, BIN_EDGES[1:]))
    right.minorticks_off()
    right.legend(fontsize=9)
    return drawn


def table(rows: list[Row]) -> str:
    """The error at the beginning, at its lowest and at the end, as Markdown."""
    steps = rows[0]["step"]
    lines = []
    for net in each(rows, "net"):
        least, runs = lowest(rows, net), course(rows, net)
        first, low, end = (in_words([run[i] for run in runs], ".3f") for i in (0, least, -1))
        perplexity = in_words([row["heldout"] for row in pick(rows, net=net)])
        lines.append([net, first, f"{low} at step {steps[least]}", end, perplexity])
    head = ["net", "before training", "lowest", f"after {steps[-1]} steps", "held-out perplexity then"]
    return markdown_table(head, lines)


def main(quick: Quick = False, seed: Seed = 0, out: Out = None, text: Text = None) -> None:
    """The share of long-range terms in the gradient, over the course of training."""
    common: dict[str, Any] = {"hidden": 128, "embedding": 32, "seq_length": 64, "batch": 32, "gradient": "full"}
    steps, seeds = (2, 1) if quick else (STEPS[-1], 3)
    if quick:
        common |= {"hidden": 16, "limit": 4000, "batch": 8}
    try:
        config = Config(**common, **reading(text), steps=steps)
        plan = [Run(net, seed + s) for s in range(seeds) for net in NETS]
        rows, complete = carry_out(plan, lambda run: measure(run, config))
    except InputError as error:
        raise typer.BadParameter(str(error)) from None
    settings = common | {"text": named(text), "edges": BIN_EDGES}
    publish(NAME, settings, rows, draw, complete=complete, quick=quick, out=out)


if __name__ == "__main__":
    typer.run(main)
