"""Adaptive truncation on the copy task: test perplexity by window, beside the numbers published for it.

    python benchmarks/adaptive.py [--settings 5,10,0.9] [--seeds 1] [--epochs 75] [--threads 1]

Aicher, Foti and Fox 2019 (arXiv 1905.07473), section 5: copy sequences of m = 10 symbols out of 6, one-hot, through a
linear layer into an LSTM of two layers of 50 units; 64 lanes of 4000 steps to train on, 1000 to test; SGD with learning
rate sqrt(K), weight decay 1e-5, the gradient clipped to a norm of 1/K. One update per K losses, whose errors walk back
to K - 1 steps before the first of them. A setting below 1 is a bound on the relative bias, by which K is chosen anew
after every 5000 steps of the text, from 2 to 100.

They trained for up to 210 epochs, nine times; here it is what --epochs and --seeds say. Other differences: symbols are
drawn anew; K is measured on the losses of the last 8 steps of each lane, not the last one; the decay is fitted on the
second half of the lags, not on all.

To know where symbols must come but not which is worth exp(9/20 log 4) = 1.866, where K = 5 stays. In the published code
every lane that is drawn shifts those before it once more, which repeats their last steps: fewer of the test's steps ask
for a symbol, and by a simulation of it the same guess has 1.65 to 1.70. So their 1.646 is most likely this guess too.

Ctrl-C stops after the update at hand and keeps what has been measured. Runs in the file of results that have had as
many epochs are not run again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

import bptt
from bptt.bench import Machine
from bptt.cli.inventory import processor
from bptt.flow import adapted
from bptt.policies import Adaptive
from bptt.train import atomic
from bptt.train.interrupt import StopRequest

SYMBOLS, COPIED, LANES, TRAIN, TEST, HIDDEN = 6, 10, 64, 4000, 1000, 50
LEAST, MOST, FIRST = 2, 100, 15
"""Windows K allowed, and the one an adaptive run starts with."""

BETWEEN, BURN_IN = 5000, 20
"""Steps of the text between measurements; steps read before a measurement, for a state to start from."""

PUBLISHED = {"5": (1.646, 0.012), "10": (1.036, 0.005), "15": (1.039, None), "20": (1.040, None), "30": (1.043, None),
             "0.9": (1.022, 0.006), "0.5": (1.027, None), "0.1": (1.030, None)}  # fmt: skip
"""Test perplexity and its standard deviation over nine runs."""

RESULTS = Path(__file__).parent / "results" / "adaptive.json"

State = tuple[Tensor, Tensor]


@dataclass
class Run:
    """One training run.

    machine: where, see `bptt.bench.Machine`. seconds: of training alone. trace: (epoch, test perplexity, K until then,
    estimated relative bias of the next K) at every measurement.
    """

    setting: str
    seed: int
    machine: dict[str, Any]
    epochs: float = 0.0
    updates: int = 0
    seconds: float = 0.0
    trace: list[tuple[float, float, int, float | None]] = field(default_factory=list)

    @property
    def perplexity(self) -> float:
        """On the test text: the median of the last ten measurements, since single ones jump."""
        return median(entry[1] for entry in self.trace[-10:]) if self.trace else math.nan


class Net(torch.nn.Module):
    """One-hot symbols through a linear layer into two LSTM layers, to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = torch.nn.Linear(SYMBOLS, HIDDEN)
        self.recurrent = bptt.nn.LSTM(HIDDEN, HIDDEN, num_layers=2)
        self.decoder = torch.nn.Linear(HIDDEN, SYMBOLS)
        for p in self.parameters():
            bound = (3 / max(p.shape)) ** 0.5 if p.dim() > 1 else 0.0
            torch.nn.init.uniform_(p, -bound, bound)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        y, state = self.recurrent(self.encoder(x), state)
        return self.decoder(y), state


def copies(steps: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs one-hot `[steps, LANES, SYMBOLS]` and targets `[steps, LANES]`: a mark and nine symbols, then their copy.

    Each lane starts at a random step of its first sequence.
    """
    period = 2 * COPIED
    count = steps // period + 2
    said = torch.randint(2, SYMBOLS, (count, COPIED, LANES), generator=generator)
    said[:, 0] = 1
    blank = torch.zeros_like(said)
    inputs = torch.cat([said, blank], 1).flatten(0, 1)
    targets = torch.cat([blank, said], 1).flatten(0, 1)
    at = torch.randint(period, (LANES,), generator=generator) + torch.arange(steps)[:, None]
    return one_hot(inputs.gather(0, at), SYMBOLS).float(), targets.gather(0, at)


@torch.no_grad()
def perplexity(net: Net, x: Tensor, target: Tensor) -> float:
    """exp of the mean loss over all steps."""
    return math.exp(cross_entropy(net(x)[0].flatten(0, 1), target.flatten()).item())


def window(net: Net, x: Tensor, target: Tensor, bound: float, generator: torch.Generator) -> tuple[int, float]:
    """K whose estimated relative bias is at most `bound`, and its bias, on a random stretch of every lane."""
    length = BURN_IN + MOST
    at = torch.randint(TRAIN - length, (LANES,), generator=generator) + torch.arange(length)[:, None]
    some, wanted = x.gather(0, at[..., None].expand(-1, -1, SYMBOLS)), target.gather(0, at)[BURN_IN:]
    with torch.no_grad():
        state = net(some[:BURN_IN])[1]

    def loss(output: tuple[Tensor, State]) -> Tensor:
        return cross_entropy(output[0].flatten(0, 1), wanted.flatten())

    found = adapted(net, (some[BURN_IN:], state), loss, policy=Adaptive(bound, MOST))
    return max(LEAST, found.window), found.bias


def train(run: Run, epochs: float, stop: StopRequest) -> Iterator[Run]:
    """Train, from the seed, and yield the run after every measurement."""
    generator = torch.Generator().manual_seed(run.seed)
    torch.manual_seed(run.seed)
    net = Net()
    (x, target), test = copies(TRAIN, generator), copies(TEST, generator)
    bound = float(run.setting) if float(run.setting) < 1 else None
    K = FIRST if bound is not None else int(run.setting)
    optimiser = torch.optim.SGD(net.parameters(), lr=1.0, weight_decay=1e-5)
    steps, since, first, at, state = 0, 0, 0, 0, None  # state: the one before step `at`
    while steps < epochs * TRAIN and stop.signal is None:
        started = perf_counter()
        if first + K > TRAIN:
            first, at, state = 0, 0, None
        start = max(first - K + 1, at)
        if start > at:  # K has shrunk
            with torch.no_grad():
                state = net(x[at:start], state)[1]
        logits, carried = net(x[start : first + 1], state)
        rest, _ = net(x[first + 1 : first + K], carried)
        logits = torch.cat([logits, rest])[first - start :]
        loss = cross_entropy(logits.flatten(0, 1), target[first : first + K].flatten())
        for group in optimiser.param_groups:
            group["lr"] = K**0.5
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1 / K)
        optimiser.step()
        at, state = first + 1, (carried[0].detach(), carried[1].detach())
        first, steps, since = first + K, steps + K, since + K
        run.epochs, run.updates = steps / TRAIN, run.updates + 1
        run.seconds += perf_counter() - started
        if since >= BETWEEN or steps >= epochs * TRAIN:
            since, used, bias = 0, K, None
            if bound is not None:
                K, bias = window(net, x, target, bound, generator)
            run.trace.append((run.epochs, perplexity(net, *test), used, bias))
            yield run


def published(setting: str) -> str:
    value, deviation = PUBLISHED.get(setting, (None, None))
    return "" if value is None else f"{value}" + (f" (sd {deviation})" if deviation is not None else "")


def main(
    settings: Annotated[str, typer.Option(help="windows K, or bounds on the relative bias, by commas")] = "5,10,0.9",
    seeds: Annotated[int, typer.Option(min=1, help="runs of each")] = 1,
    epochs: Annotated[float, typer.Option(min=0.1, help="passes over the training text")] = 75,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads")] = 1,
    out: Annotated[Path, typer.Option(help="where to write the runs")] = RESULTS,
) -> None:
    """Train, print the table, and write every run."""
    torch.set_num_threads(threads)
    machine = asdict(Machine.here(processor(), threads))
    kept = json.loads(out.read_text(encoding="utf-8"))["runs"] if out.exists() else []
    done = [Run(**run) for run in kept if run["epochs"] >= epochs]
    asked = list(product(range(seeds), settings.split(",")))
    others = [run for run in kept if (run["seed"], run["setting"]) not in asked]
    runs: list[Run] = []
    console = Console()
    columns = [*Progress.get_default_columns()[:2], TextColumn("{task.fields[text]}"), TimeElapsedColumn()]
    with StopRequest() as stop, Progress(*columns, console=console) as progress:
        for seed, setting in asked:
            if stop.signal is not None:
                break
            if found := [run for run in done if (run.setting, run.seed) == (setting, seed)]:
                runs += found
                continue
            run = Run(setting, seed, machine)
            runs.append(run)
            task = progress.add_task(f"{setting}, seed {seed}", total=epochs, text="")
            for state in train(run, epochs, stop):
                text = f"perplexity {state.perplexity:.4f}, K = {state.trace[-1][2]}"
                progress.update(task, completed=state.epochs, text=text)
                atomic.write(out, (json.dumps({"runs": [*others, *map(asdict, runs)]}) + "\n").encode())
    table = Table("setting", "seed", "epochs", "updates", "seconds", "mean K", "test perplexity", "published")
    for run in runs:
        K = sum(entry[2] for entry in run.trace) / max(len(run.trace), 1)
        table.add_row(run.setting, str(run.seed), f"{run.epochs:.1f}", f"{run.updates:,}", f"{run.seconds:.0f}",
                      f"{K:.1f}", f"{run.perplexity:.4f}", published(run.setting))  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
