"""What a gradient policy costs: forward + backward of a layer against torch.nn's, in one process.

    python benchmarks/policies.py [--threads N]

Nothing is timed before it has passed: every cell under every kind of policy is compared with the NumPy equations (what
`bptt check` does), and every layer with torch.nn on the same weights and inputs (outputs, and for `full` every
gradient). Times are medians of interleaved runs.
"""

from __future__ import annotations

import statistics
from time import perf_counter
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import bptt
from bptt.cli.comparison import compare

SHAPES = [(100, 1, 32, 32), (100, 32, 128, 128), (35, 32, 256, 256)]  # T, B, I, H
CELLS = ["RNN", "GRU", "LSTM"]
POLICIES = ["full", "chunked:10", "truncated:10", "truncated:20/10", "randomized:0.9"]
RUNS = 7


def step(layer: torch.nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Output and parameter gradients of one forward and backward call."""
    y, _ = layer(x)
    return y, list(torch.autograd.grad(y, list(layer.parameters()), dy))


def check(ours: torch.nn.Module, theirs: torch.nn.Module, x: Tensor, dy: Tensor, full: bool) -> None:
    """Raise AssertionError where ours disagrees with torch.nn."""
    (y, grads), (expected, expected_grads) = step(ours, x, dy), step(theirs, x, dy)
    pairs = [(y, expected), *(zip(grads, expected_grads, strict=True) if full else ())]
    for actual, wanted in pairs:
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5 * float(wanted.detach().abs().max()))


def main(threads: Annotated[int, typer.Option(help="CPU threads")] = 1) -> None:
    """Print the table."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if wrong := [f"{row.net} {row.policy}" for row in compare() if not row.agrees]:
        raise SystemExit(f"not timed, since these disagree with the equations: {', '.join(wrong)}; see bptt check")
    table = Table("T, B, I, H", "cell", "torch.nn ms", *POLICIES, title=f"times torch.nn's, {threads} thread(s)")
    for T, B, inputs, H in SHAPES:
        x, dy = torch.randn(T, B, inputs), torch.randn(T, B, H)
        for cell in CELLS:
            theirs = getattr(torch.nn, cell)(inputs, H)
            layers = [theirs]
            for policy in POLICIES:
                ours = getattr(bptt.nn, cell)(inputs, H, gradient=policy)
                ours.load_state_dict(theirs.state_dict())
                check(ours, theirs, x, dy, full=policy == "full")
                layers.append(ours)
            times: list[list[float]] = [[] for _ in layers]
            for _ in range(RUNS):
                for layer, taken in zip(layers, times, strict=True):
                    start = perf_counter()
                    step(layer, x, dy)
                    taken.append(perf_counter() - start)
            base, *rest = map(statistics.median, times)
            table.add_row(f"{T}, {B}, {inputs}, {H}", cell, f"{base * 1e3:.1f}", *(f"{t / base:.2f}" for t in rest))
    console = Console()
    console.print(table)
    console.print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}")


if __name__ == "__main__":
    typer.run(main)
