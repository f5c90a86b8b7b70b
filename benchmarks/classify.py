"""Sequences classified: `bptt train --classify` against the same network of torch.nn, with the same budget.

    python benchmarks/classify.py TRAIN.ts TEST.ts [--save FILE]      # after what FILE holds

The files are aeon's (its package ships JapaneseVowels), or any that `bptt train --classify` reads, such as those of
`benchmarks/digits.py`. Both networks start from the same weights, read the same
batches in the same order and take the same steps of Adam, in float32 on one thread; times are of the process, for
training alone. Under another gradient than the full one, which torch.nn does not have, its accuracy is another too.
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


def trained(config: Config, task: Any, model: torch.nn.Module) -> tuple[float, float]:
    """(held-out accuracy, seconds of the process)."""
    optimiser = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    batches = task.batches(config)
    started = process_time()
    for epoch in range(config.epochs):
        for index in range(batches.windows(epoch)):
            batch = batches.window(epoch, index)
            optimiser.zero_grad()
            loss = cross_entropy(model(batch.x, batch.lengths)[0], batch.labels, reduction="sum")
            (loss / batches.full).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            optimiser.step()
    seconds = process_time() - started
    with torch.no_grad():
        right = 0
        for rows in torch.arange(len(task.heldout)).split(256):
            batch = task.heldout.batch(rows)
            right += int((model(batch.x, batch.lengths)[0].argmax(1) == batch.labels).sum())
    return right / len(task.heldout), seconds


def main(
    train: Path,
    test: Path,
    cells: str = "gru,lstm",
    pools: str = "last,mean",
    seeds: int = 3,
    hidden: int = 64,
    batch: int = 16,
    epochs: int = 15,
    learning_rate: float = 0.002,
    gradient: str = "full",
    chrono: float = 0,
    save: Annotated[Path | None, typer.Option()] = None,
) -> None:
    """Some seeds of each cell and pooling, on one thread; the two networks take turns.

    chrono: if not 0, the gates' biases begin with memories of up to so many steps (`bptt.nn.init.chrono_`), in both.
    """
    torch.set_num_threads(1)
    sizes: dict[str, Any] = {"hidden": hidden, "batch": batch, "epochs": epochs, "learning_rate": learning_rate}
    sizes["gradient"] = gradient
    rows = []
    for cell in cells.split(","):
        for pool in pools.split(","):
            found: dict[str, list[tuple[float, float]]] = {"bptt": [], "torch": []}
            for seed in range(seeds):
                which: dict[str, Any] = {"cell": cell, "pool": pool, "seed": seed}
                config = Config(classify=str(train), heldout_file=str(test), threads=1, **which, **sizes)
                for who in ("bptt", "torch") if seed % 2 else ("torch", "bptt"):
                    torch.manual_seed(seed)
                    task = prepare(config)
                    model = build_model(config, task.stored).train()
                    if chrono:
                        bptt.nn.init.chrono_(model.recurrent, chrono)
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
    result = {
        "data": train.name,
        "shape": list(task.train.batch(torch.arange(1)).x.shape),
        "sequences": [len(task.train), len(task.heldout)],
        **sizes,
        **({"chrono": chrono} if chrono else {}),
        "threads": 1,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "rows": rows,
    }
    if save is not None:
        found_before = json.loads(save.read_text()) if save.exists() else []
        save.write_text(json.dumps([*found_before, result], indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
