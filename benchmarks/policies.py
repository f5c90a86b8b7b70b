"""What a gradient policy costs: forward + backward of a layer against torch.nn's, in one process.

    python benchmarks/policies.py [--threads N]

Nothing is timed before it has passed: every cell under every kind of policy is compared with the NumPy equations (what
`bptt check` does), and every layer with torch.nn in float64 on the same weights and inputs (outputs, and for `full`
every gradient). Times are medians of interleaved runs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from bptt.bench import NAMES, TOLERANCE, Case, Problem, largest_error, layer_call
from bptt.cli.comparison import compare
from bptt.clock import interleaved

SHAPES = [(100, 1, 32, 32), (100, 32, 128, 128), (35, 32, 256, 256)]  # T, B, I, H
CELLS = ["rnn", "gru", "lstm"]
POLICIES = ["full", "chunked:10", "truncated:10", "truncated:20/10", "randomized:0.9"]


def main(
    threads: Annotated[int, typer.Option(help="CPU threads")] = 1,
    seconds: Annotated[float, typer.Option(help="time for each row, about")] = 3.0,
) -> None:
    """Print the table."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if wrong := [f"{row.net} {row.policy}" for row in compare() if not row.agrees]:
        raise SystemExit(f"not timed, since these disagree with the equations: {', '.join(wrong)}; see bptt check")
    table = Table("T, B, I, H", "cell", "torch.nn ms", *POLICIES, title=f"times torch.nn's, {threads} thread(s)")
    for case in (Case(cell, *shape) for shape in SHAPES for cell in CELLS):
        problem = Problem.of(case)
        truth = problem.truth()
        layers = {"torch.nn": problem.layer}
        layers |= {policy: replace(problem, case=replace(case, gradient=policy)).ours() for policy in POLICIES}
        calls = {name: layer_call(layer, problem.x, problem.dy) for name, layer in layers.items()}
        for name, call in calls.items():
            known = len(NAMES) if name in ("torch.nn", "full") else 1
            error, tensor = largest_error(call()[:known], truth[:known], NAMES[:known])
            if error > TOLERANCE:
                raise SystemExit(f"not timed: {name} of {case} is off by {error:.1e} in {tensor}")
        base, *rest = (timing.median for timing in interleaved(calls, seconds).values())
        table.add_row(
            ", ".join(map(str, case.shape)), case.cell.upper(), f"{base * 1e3:.1f}", *(f"{t / base:.2f}" for t in rest)
        )
    console = Console()
    console.print(table)
    console.print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}")


if __name__ == "__main__":
    typer.run(main)
