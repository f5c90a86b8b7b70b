"""What `bptt.flow.watch` costs when nothing is wrong: steps of `bptt train` with the doctor and without.

    python benchmarks/doctor.py [--threads N] [--seconds S]

Windows of 64 steps, 32 lanes, 256 units, as `bptt train` has them by default. Nothing is timed before it has passed:
with the doctor and without, ten steps give the same loss and the same weights, bit for bit. Times are medians of
interleaved steps. `examine` is what a measurement of the horizon costs, in steps; `bptt train` does one every
`eval_every` steps.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from bptt.bench.training import TOKENS
from bptt.clock import interleaved
from bptt.flow import Watch
from bptt.train import Config, Text, Trainer, Vocabulary

CELLS = ["rnn", "gru", "lstm"]
WINDOWS = 8


class Absent(Watch):
    """In place of a doctor: the least that a training loop has to look at."""

    def check(self, loss=None, *, grad_norm=None):
        return None if math.isfinite(float(loss) + float(grad_norm)) else super().check(loss, grad_norm=grad_norm)


def trainer(cell: str, watched: bool) -> Trainer:
    config = Config(cell=cell, steps=2**62, seed=1)
    vocabulary = Vocabulary.build(TOKENS, "char")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(len(vocabulary), (WINDOWS * config.seq_length * config.batch + 1,), generator=generator)
    result = Trainer(config, Text(vocabulary, ids, heldout=None, sha256=""))
    if not watched:
        result.doctor.remove()
        result.doctor = Absent(torch.nn.Identity())
    return result


def main(
    threads: Annotated[int, typer.Option(help="CPU threads")] = 1,
    seconds: Annotated[float, typer.Option(help="time for each cell, about")] = 20.0,
) -> None:
    """Print the table."""
    torch.set_num_threads(threads)
    table = Table("cell", "without, ms", "with, ms", "cost", "examine, steps", title=f"{threads} thread(s)")
    for cell in CELLS:
        with_doctor, without = trainer(cell, watched=True), trainer(cell, watched=False)
        for _ in range(10):
            if with_doctor.advance().nll != without.advance().nll:
                raise SystemExit(f"not timed: with the doctor, {cell} trains otherwise than without")
        torch.testing.assert_close(with_doctor.model.state_dict(), without.model.state_dict(), rtol=0, atol=0)
        calls = {"without": without.advance, "with": with_doctor.advance, "examine": with_doctor.doctor.examine}
        time = {name: timing.median for name, timing in interleaved(calls, seconds).items()}
        cost = time["with"] / time["without"] - 1
        table.add_row(
            cell.upper(),
            f"{time['without'] * 1e3:.2f}",
            f"{time['with'] * 1e3:.2f}",
            f"{cost:+.1%}",
            f"{time['examine'] / time['without']:.1f}",
        )
    console = Console()
    console.print(table)
    console.print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}")


if __name__ == "__main__":
    typer.run(main)
