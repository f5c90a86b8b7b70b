"""Forecasts by `bptt train --series` beside those of torch.nn.LSTM, on three public series that statsmodels ships.

    pip install --target DIR --no-deps statsmodels
    python benchmarks/series.py DIR/statsmodels/datasets --out benchmarks/results/series.json

Both are the same network on the same windows: ours from the package's `fit`, the peer a plain training loop on
torch.nn.LSTM with the state detached between windows, the same optimiser, clipping, initial weights' distribution,
number of steps, and selection of the best weights by the held-out loss. So differences are those of the seeds, and the
time is the layers'. Each seed is measured at its own best step; the mean and the standard deviation are over seeds.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from bptt.train import Config, Series, Trainer, atomic, prepare

SERIES: dict[str, tuple[str, dict[str, Any]]] = {
    "sunspots": ("sunspots/sunspots.csv", {"time": "YEAR", "horizon": 6, "season": 11, "seq_length": 32}),
    "co2": ("co2/co2.csv", {"target": "co2", "time": "date", "horizon": 13, "season": 52, "seq_length": 64}),
    "macrodata": ("macrodata/macrodata.csv", {"horizon": 4, "season": 4, "seq_length": 24}),
}
"""File, and the options of each. macrodata: four of its columns, chosen for their different courses."""

COLUMNS = ("realgdp", "realinv", "unemp", "tbilrate")

COMMON: dict[str, Any] = {
    "cell": "lstm",
    "hidden": 32,
    "batch": 8,
    "learning_rate": 0.005,
    "heldout": 0.2,
    "threads": 1,
}


def table(folder: Path, name: str, scratch: Path) -> Path:
    """The file to read; of macrodata its columns alone."""
    source = folder / SERIES[name][0]
    if name != "macrodata":
        return source
    made = scratch / "macrodata.csv"
    with source.open() as read, made.open("w") as write:
        writer = csv.writer(write)
        writer.writerow(COLUMNS)
        writer.writerows([row[column] for column in COLUMNS] for row in csv.DictReader(read))
    return made


def on_torch(trainer: Trainer) -> None:
    """Give a trainer torch.nn.LSTM, with the very weights, in the place of our layer."""
    ours = trainer.model.recurrent
    theirs = torch.nn.LSTM(ours.input_size, ours.hidden_size)
    theirs.load_state_dict(ours.state_dict())
    trainer.model.recurrent = _Resetting(theirs)
    trainer.optimiser = torch.optim.Adam(trainer.model.parameters(), lr=trainer.config.learning_rate)


class _Resetting(torch.nn.Module):
    """torch.nn.LSTM, called once for every stretch without a reset, as it has to be."""

    def __init__(self, layer: torch.nn.LSTM) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor, state: Any = None, resets: torch.Tensor | None = None) -> Any:
        cuts = [0, len(x)]
        if resets is not None:
            cuts = sorted({*cuts, *resets.any(1).nonzero()[:, 0].tolist()})
        parts = []
        for start, stop in pairwise(cuts):
            if resets is not None and state is not None:
                kept = (~resets[start]).to(x)[None, :, None]
                state = tuple(s * kept for s in state)
            y, state = self.layer(x[start:stop], state)
            parts.append(y)
        return torch.cat(parts), state


def plain(trainer: Trainer, steps: int, every: int) -> tuple[float, dict[str, float], float]:
    """The peer: (best held-out loss, its measures, seconds of CPU)."""
    best, began = (float("inf"), {}), time.process_time()
    state, spent = None, 0.0
    epoch = index = 0
    for step in range(1, steps + 1):
        window = trainer.batches.window(epoch, index)
        trainer.model.train()
        trainer.optimiser.zero_grad()
        weight = next(trainer.model.parameters())
        output = trainer.model(*trainer.task.arguments(window, None if window.fresh else state, weight))
        (trainer.task.loss(output, window) / trainer.batches.full).backward()
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), trainer.config.clip)
        trainer.optimiser.step()
        state = tuple(s.detach() for s in output[1])
        index += 1
        if index == trainer.batches.windows(epoch):
            epoch, index = epoch + 1, 0
        if step % every == 0:
            spent += time.process_time() - began
            best = min(best, trainer.measure(trainer.task.heldout), key=lambda found: found[0])
            began = time.process_time()
    return *best, spent


def ours(trainer: Trainer, steps: int, every: int) -> tuple[float, dict[str, float], float]:
    """The package's own steps, likewise, the doctor watching."""
    best, spent = (float("inf"), {}), 0.0
    for step in range(1, steps + 1):
        began = time.process_time()
        trainer.advance()
        spent += time.process_time() - began
        if step % every == 0:
            best = min(best, trainer.measure(trainer.task.heldout), key=lambda found: found[0])
    return *best, spent


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="statsmodels/datasets")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--every", type=int, default=20, help="steps between held-out measurements")
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, (_, options) in SERIES.items():
            found: dict[str, list[Any]] = {"bptt": [], "torch.nn.LSTM": []}
            for seed in range(given.seeds):
                path = table(given.folder, name, Path(scratch))
                config = Config(series=str(path), seed=seed, steps=given.steps, **COMMON, **options)
                task = prepare(config)
                assert isinstance(task, Series)
                found["bptt"].append(ours(Trainer(config, task), given.steps, given.every))
                peer = Trainer(config, task)
                peer.doctor.remove()
                on_torch(peer)
                found["torch.nn.LSTM"].append(plain(peer, given.steps, given.every))
            row: dict[str, Any] = {"series": name, "rows": sum(len(x) for x, _ in task.train), **options}
            row |= {"naive_mase": task.naive[0], "seasonal_naive_mase": task.naive[1], "seeds": given.seeds}
            for who, results in found.items():
                mase = [measures["mase"] for _, measures, _ in results]
                row[who] = {
                    "mase": statistics.mean(mase),
                    "sd": statistics.stdev(mase) if len(mase) > 1 else 0.0,
                    "cpu_seconds": statistics.median(seconds for *_, seconds in results),
                }
            rows.append(row)
            print(json.dumps(row))
    about = {"steps": given.steps, "every": given.every, "options": COMMON, "torch": torch.__version__}
    about |= {"machine": platform.machine(), "python": platform.python_version()}
    atomic.write(given.out, (json.dumps({**about, "rows": rows}, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
