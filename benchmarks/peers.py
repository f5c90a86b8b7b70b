"""The table of peers: a small training in each framework, once with torch's layers and once with ours.

    python benchmarks/peers.py [--out peers.json] [--only Lightning --only skorch] [--steps 48] [--repeats 5]

Run it with the frameworks, as `make peers` installs them (`build/peers/venv/bin/python`). A framework that is not
installed is named and left out. Both trainings of a row have the same seed, initial weights, data and number of
updates, so that every loss must agree: the largest relative difference of any update's loss is told, and one above
1e-3 is an error. The two run in turn, after a first run of each that is not timed; times are of the whole call, set-up
and the framework's own work included, in seconds of processor time on one thread, which other work on the machine does
not lengthen. A ratio is the peer's median over ours, with the quartiles of the ratios of neighbours.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import statistics
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from datetime import date
from pathlib import Path
from time import process_time
from typing import Annotated, Any

import torch
import typer
from frameworks import episodes, exported, forecasting, loops
from frameworks.training import Row
from rich.console import Console
from rich.table import Table

import bptt

ROWS: list[Row] = [*loops.ROWS, *episodes.ROWS, *forecasting.ROWS, *exported.ROWS]

TOLERANCE = 1e-3
"""Of losses in float32, relative, at the end of a training: rounding grows from one update to the next."""


def measured(row: Row, steps: int, repeats: int) -> dict[str, Any]:
    """Both trainings of a row, compared and timed."""
    losses = {ours: row.losses(ours, steps) for ours in (False, True)}
    if len(losses[True]) != len(losses[False]) or not losses[True]:
        raise ValueError(f"{row.name}: {len(losses[True])} losses of ours, {len(losses[False])} of the peer's")
    difference = max(abs(a - b) / abs(b) for a, b in zip(losses[True], losses[False], strict=True))
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(repeats):
        for ours in (False, True) if turn % 2 else (True, False):
            began = process_time()
            row.losses(ours, steps)
            seconds[ours].append(process_time() - began)
    ratios = [theirs / own for theirs, own in zip(seconds[False], seconds[True], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    medians = {ours: statistics.median(taken) for ours, taken in seconds.items()}
    return {
        "row": row.name,
        "package": row.package,
        "version": importlib.metadata.version(row.package),
        "what": row.what,
        "losses": len(losses[True]),
        "first loss": losses[True][0],
        "last loss": losses[True][-1],
        "largest relative difference": difference,
        "seconds of the peer": medians[False],
        "seconds of bptt": medians[True],
        "ratio": medians[False] / medians[True],
        "quartiles": [low, high],
    }


def shown(found: list[dict[str, Any]]) -> Table:
    """The table."""
    table = Table("peer", "version", "what was run", "losses differ by", "peer / bptt", "quartiles", "seconds of bptt")
    for row in found:
        low, high = row["quartiles"]
        cells = [row["row"], row["version"], row["what"], f"{row['largest relative difference']:.0e}"]
        cells += [f"{row['ratio']:.2f}", f"{low:.2f} to {high:.2f}", f"{row['seconds of bptt']:.2f}"]
        table.add_row(*cells)
    return table


def main(
    out: Annotated[Path | None, typer.Option(help="Where to write the numbers, as JSON.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Rows whose name begins with this; may be repeated.")] = None,
    steps: Annotated[int, typer.Option(min=16, help="Updates of a training.")] = 48,
    repeats: Annotated[int, typer.Option(min=2, help="Timed runs of each.")] = 5,
) -> None:
    """Train, compare, time and print."""
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    console, found, missing = Console(file=sys.stdout), [], []
    for row in ROWS:
        if only and not any(row.name.startswith(name) for name in only):
            continue
        lacking = [name for name in row.needs if importlib.util.find_spec(name) is None]
        if lacking:
            missing.append(f"{row.name}: not installed: {', '.join(lacking)}")
            continue
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            found.append(measured(row, steps, repeats))
        console.print(f"{row.name}: {found[-1]['ratio']:.2f}, {found[-1]['largest relative difference']:.0e}")
    if not console.is_terminal:  # a log has no width of its own; rich would assume 80 and cut columns off
        console.width = 200
    console.print(shown(found), *missing, sep="\n")
    if out is not None:
        of = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
        of |= {"bptt": bptt.__version__, "python": platform.python_version(), "date": str(date.today())}
        of |= {"steps": steps, "repeats": repeats, "threads": 1}
        out.write_text(json.dumps({**of, "rows": found, "missing": missing}, indent=2) + "\n", encoding="utf-8")
    wrong = [row["row"] for row in found if not row["largest relative difference"] <= TOLERANCE]
    if wrong:
        console.print(f"losses differ by more than {TOLERANCE:g}: {', '.join(wrong)}")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
