"""Episodes in one call: a recurrent layer over rollouts that hold episode starts, against the loop over steps.

    python benchmarks/episodes.py [--threads N] [--starts 0.05]

The loop is what recurrent PPO does on torch.nn: one call of the layer per step, the state multiplied by zero (or
replaced by a stored one, as R2D2 stores them) where an episode starts. Forward + backward of the layer, with x's
gradient. Nothing is timed before it has passed: outputs and every gradient of the two agree in float64. Times are
medians of runs in turn, in seconds of processor time, which other work on the machine does not lengthen; ratios are
given with the quartiles of the loop's time over those of the call's.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from copy import deepcopy
from time import process_time
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import bptt

T, I = 128, 64
SHAPES = [(8, 64), (16, 64), (8, 256), (16, 256)]  # B, H
CELLS = ["GRU", "LSTM"]

Run = Callable[[], tuple[Tensor, ...]]
States = tuple[Tensor, ...]


def by_steps(rnn: torch.nn.RNNBase, x: Tensor, hx: States, starts: Tensor, stored: States) -> tuple[Tensor, ...]:
    """(y, *final state), one call of the layer per step. stored: `[T, 1, B, H]` each; none is zero."""
    ys = []
    for t in range(len(x)):
        start = starts[t][None, :, None]
        if stored:
            hx = tuple(torch.where(start, r[t], s) for r, s in zip(stored, hx, strict=True))
        else:
            hx = tuple((1.0 - start.to(s.dtype)) * s for s in hx)
        y, final = rnn(x[t : t + 1], hx if len(hx) == 2 else hx[0])
        hx = final if isinstance(final, tuple) else (final,)
        ys.append(y)
    return (torch.cat(ys), *hx)


def in_one(rnn: torch.nn.RNNBase, x: Tensor, hx: States, starts: Tensor, stored: States) -> tuple[Tensor, ...]:
    """The same in one call."""
    pair = len(hx) == 2
    restart = {"reset_state": stored if pair else stored[0]} if stored else {}
    y, final = rnn(x, hx if pair else hx[0], resets=starts, **restart)
    return (y, *(final if isinstance(final, tuple) else (final,)))


class Problem:
    """A layer of torch.nn and ours with its values, a rollout, and where its episodes start."""

    def __init__(self, cell: str, B: int, H: int, share: float, *, stores: bool, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.theirs = getattr(torch.nn, cell)(I, H, dtype=dtype)
        self.ours = bptt.convert(deepcopy(self.theirs))
        states = 2 if cell == "LSTM" else 1
        self.x = torch.randn(T, B, I, dtype=dtype, requires_grad=True)
        self.hx = tuple(torch.randn(1, B, H, dtype=dtype) for _ in range(states))
        self.starts = torch.rand(T, B) < share
        self.stored = tuple(torch.randn(T, 1, B, H, dtype=dtype) for _ in range(states)) if stores else ()
        self.dy = torch.randn(T, B, H, dtype=dtype)

    def call(self, how: Callable[..., tuple[Tensor, ...]], rnn: torch.nn.RNNBase) -> Run:
        """Forward and backward: the outputs, and the gradients of x and the parameters."""

        def run() -> tuple[Tensor, ...]:
            outputs = how(rnn, self.x, self.hx, self.starts, self.stored)
            return (*outputs, *torch.autograd.grad(outputs[0], [self.x, *rnn.parameters()], self.dy))

        return run


def quartiles(runs: list[Run], samples: int) -> list[list[float]]:
    """[lower quartile, median, upper quartile] of each run's seconds of processor time."""
    taken: list[list[float]] = [[] for _ in runs]
    for turn in range(samples + 1):  # the first one warms up
        for run, times in zip(runs, taken, strict=True):
            start = process_time()
            run()
            if turn > 0:
                times.append(process_time() - start)
    return [statistics.quantiles(times, n=4, method="inclusive") for times in taken]


def main(
    threads: Annotated[int, typer.Option(help="CPU threads")] = 1,
    starts: Annotated[float, typer.Option(help="the share of steps at which an episode starts")] = 0.05,
    samples: Annotated[int, typer.Option(help="runs of each")] = 9,
) -> None:
    """Print the table."""
    torch.set_num_threads(threads)
    title = f"T = {T}, I = {I}, float32, {starts:.0%} episode starts, {threads} thread(s), forward + backward"
    table = Table("cell", "B, H", "restarts from", "loop ms", "one call ms", "ratio", "quartiles", title=title)
    for cell, (B, H), stores in ((c, s, r) for c in CELLS for s in SHAPES for r in (False, True)):
        exact = Problem(cell, B, H, starts, stores=stores, dtype=torch.float64)
        found = exact.call(in_one, exact.ours)()
        for mine, theirs in zip(found, exact.call(by_steps, exact.theirs)(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9 * theirs.abs().max().item())
        problem = Problem(cell, B, H, starts, stores=stores, dtype=torch.float32)
        runs = [problem.call(by_steps, problem.theirs), problem.call(in_one, problem.ours)]
        (low, loop, high), (least, one, most) = quartiles(runs, samples)
        table.add_row(
            cell,
            f"{B}, {H}",
            "stored states" if stores else "zero",
            f"{loop * 1e3:.1f}",
            f"{one * 1e3:.2f}",
            f"{loop / one:.1f}",
            f"{low / most:.1f} to {high / least:.1f}",
        )
    console = Console(width=110)
    console.print(table)
    console.print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}")


if __name__ == "__main__":
    typer.run(main)
