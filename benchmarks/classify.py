"""Sequences classified: `bptt train --classify` against the same network of torch.nn, with the same budget.

    python benchmarks/classify.py TRAIN.ts TEST.ts [--save FILE]

The files are aeon's (its package ships JapaneseVowels). Both networks start from the same weights, read the same
batches in the same order and take the same steps of Adam, in float32 on one thread; times are of the process, for
training alone.
"""

from __future__ import annotations

import json
import platform
from pathlib import Path
from statistics import median
from time import process_time
from typing import Annotated, Any

import torch
import typer
from torch.nn.functional import cross_entropy

import bptt
from bptt.train import Config, prepare
from bptt.train.network import build_model

SIZES: dict[str, Any] = {"hidden": 64, "batch": 16, "epochs": 15, "threads": 1, "learning_rate": 0.002}


def trained(config: Config, task: Any, model: torch.nn.Module) -> tuple[float, float]:
    """(held-out accuracy, seconds of the process)."""
    optimiser = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    batches = task.batches(config)
    started = process_time()
    for epoch in range(SIZES["epochs"]):
        for index in range(batches.windows(epoch)):
            batch = batches.window(epoch, index)
            optimiser.zero_grad()
            loss = cross_entropy(model(batch.x, batch.lengths)[0], batch.labels, reduction="sum")
            (loss / batches.full).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            optimiser.step()
    seconds = process_time() - started
    with torch.no_grad():
        part = task.heldout
        batch = part.batch(torch.arange(len(part)))
        right = model(batch.x, batch.lengths)[0].argmax(1) == batch.labels
    return float(right.double().mean()), seconds


def main(train: Path, test: Path, save: Annotated[Path | None, typer.Option()] = None) -> None:
    """Three seeds of each cell and pooling; the two take turns."""
    torch.set_num_threads(1)
    rows = []
    for cell in ("gru", "lstm"):
        for pool in ("last", "mean"):
            found: dict[str, list[tuple[float, float]]] = {"bptt": [], "torch": []}
            for seed in range(3):
                config = Config(classify=str(train), heldout_file=str(test), cell=cell, pool=pool, seed=seed, **SIZES)
                for who in ("bptt", "torch") if seed % 2 else ("torch", "bptt"):
                    torch.manual_seed(seed)
                    task = prepare(config)
                    model = build_model(config, task.stored).train()
                    if who == "torch":
                        bptt.revert(model)
                        assert isinstance(model.recurrent, torch.nn.RNNBase)
                    found[who].append(trained(config, task, model))
            row = {"cell": cell, "pool": pool}
            for who, runs in found.items():
                row[who] = {
                    "accuracy": [run[0] for run in runs],
                    "seconds": median(run[1] for run in runs),
                }
            rows.append(row)
            print(json.dumps(row), flush=True)
    result = {"data": train.name, **SIZES, "torch": torch.__version__, "machine": platform.machine(), "rows": rows}
    if save is not None:
        save.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
