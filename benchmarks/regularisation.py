"""Whether truncation regularises: held-out perplexity under each policy, at its best and at equal training perplexity.

    python benchmarks/regularisation.py [--epochs 40] [--seeds 4] [--json FILE]

Truncated gradients are said to be a mild regulariser: they let a net learn short dependencies alone, which is a simpler
model. A GRU is trained on so little text that it learns it by heart, under the full gradient of each window and under
truncations of it. Everything else is the same, the initial weights and the order of the windows included. A regulariser
would show in two numbers: a better held-out perplexity at the best moment of a run, and a better one at the moment when
the training perplexity is the same. The second tells a regulariser from what merely learns more slowly.

Training perplexity is that of the whole training text, measured at the same moments as the held-out one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from bptt.bench import Machine
from bptt.cli.inventory import processor
from bptt.train import Config, Text, Trainer, atomic, fit, start

POLICIES = ("full", "chunked:16", "chunked:4", "truncated:16/4", "truncated:4", "truncated:1", "randomized:0.9")
LEVEL = 0.75
"""Where runs are compared at equal training perplexity: this far down, on a logarithmic scale, from the worst one
measured to that which all runs reach."""


@dataclass(frozen=True)
class Run:
    """One training: perplexities by the passes over the text that were made."""

    policy: str
    seed: int
    training: list[float]
    heldout: list[float]

    @property
    def best(self) -> float:
        return min(self.heldout)

    def at(self, training: float) -> float:
        """The held-out perplexity when the training perplexity first fell to a level, between two measurements."""
        pairs = list(zip(self.training, self.heldout, strict=True))
        for (before, held_before), (after, held_after) in pairwise(pairs):
            if after <= training <= before:
                share = (math.log(before) - math.log(training)) / max(math.log(before) - math.log(after), 1e-12)
                return math.exp((1 - share) * math.log(held_before) + share * math.log(held_after))
        return math.nan


def trained(policy: str, seed: int, epochs: int) -> Run:
    """A GRU of 128 units on 20,000 characters of Python's documentation, measured after every pass."""
    config = Config(
        cell="gru",
        hidden=128,
        embedding=32,
        corpus="python-docs",
        limit=40_000,
        heldout=0.5,
        gradient=policy,
        batch=8,
        seq_length=64,
        epochs=epochs,
        learning_rate=0.004,
        seed=seed,
        threads=1,
    )
    training: list[float] = []
    heldout: list[float] = []
    with TemporaryDirectory() as folder:
        trainer, run = start(config, Path(folder) / "run")
        windows = math.ceil(trainer.total / epochs)

        def measure(step: int) -> None:
            if step % windows == 0:
                training.append(perplexity(trainer, held=False))
                heldout.append(perplexity(trainer, held=True))

        fit(trainer, run, on_step=lambda step: measure(step.step))
    return Run(policy, seed, training, heldout)


def perplexity(trainer: Trainer, *, held: bool) -> float:
    """Of the whole training or held-out text, read once from its beginning."""
    task = trainer.task
    assert isinstance(task, Text)
    part = task.heldout if held else task.train
    assert isinstance(part, torch.Tensor)
    model = trainer.model
    training = model.training
    model.eval()
    with torch.no_grad():
        logits, _ = model(part[:-1, None])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, -2), part[1:])
    model.train(training)
    return float(loss.exp())


def summary(runs: list[Run]) -> Iterator[dict[str, Any]]:
    """By policy: mean and standard deviation over seeds, and the paired difference from the full gradient."""
    reached = max(min(run.training) for run in runs)
    first = max(run.training[0] for run in runs)
    level = math.exp(math.log(first) + LEVEL * (math.log(reached) - math.log(first)))
    full = {run.seed: run for run in runs if run.policy == "full"}
    for policy in dict.fromkeys(run.policy for run in runs):
        own = [run for run in runs if run.policy == policy]
        yield {
            "policy": policy,
            "level": level,
            "best": _told([run.best for run in own]),
            "best against full": _told([100 * (run.best / full[run.seed].best - 1) for run in own]),
            "at the level": _told([run.at(level) for run in own]),
            "there against full": _told([100 * (run.at(level) / full[run.seed].at(level) - 1) for run in own]),
            "passes to the best": mean(1 + run.heldout.index(run.best) for run in own),
            "training at the end": _told([run.training[-1] for run in own]),
        }


def _told(values: list[float]) -> tuple[float, float]:
    return mean(values), stdev(values) if len(values) > 1 else 0.0


def main(
    epochs: Annotated[int, typer.Option(help="passes over the training text")] = 40,
    seeds: Annotated[int, typer.Option(help="runs of each policy")] = 4,
    file: Annotated[Path | None, typer.Option("--json", help="where the measurements go")] = None,
) -> None:
    """Train, measure, show a table."""
    console = Console()
    runs = []
    for seed in range(seeds):
        for policy in POLICIES:
            runs.append(trained(policy, seed, epochs))
            console.print(f"seed {seed} {policy}: best {runs[-1].best:.3f}", highlight=False)
    rows = list(summary(runs))
    table = Table(title=f"held-out perplexity per character, {seeds} seeds, mean ± standard deviation")
    for name in ("policy", "best", "% of full", f"at {rows[0]['level']:.2f}", "% of full", "passes", "training, end"):
        table.add_column(name, justify="right")
    for row in rows:
        pairs = [row[name] for name in ("best", "best against full", "at the level", "there against full")]
        shown = [f"{middle:.3f} ± {spread:.3f}" for middle, spread in pairs]
        end = row["training at the end"]
        table.add_row(str(row["policy"]), *shown, f"{row['passes to the best']:.1f}", f"{end[0]:.2f} ± {end[1]:.2f}")
    console.print(table)
    if file is not None:
        machine = asdict(Machine.here(processor(), 1))
        found = {"machine": machine, "epochs": epochs, "seeds": seeds, "rows": rows, "runs": [asdict(r) for r in runs]}
        atomic.write(file, json.dumps(found, indent=1).encode() + b"\n")


if __name__ == "__main__":
    typer.run(main)
