"""Peak memory and time of one forward and backward against T, by what the tape keeps.

    python benchmarks/memory.py [--cell lstm] [--steps 1000,10000] [--repeats 3] [--json FILE]

Contenders: bptt with memory "gates", "states" and Checkpoints, bptt.stream_gradients, torch.nn, and torch.nn with
torch.utils.checkpoint over segments of sqrt(T) steps. Each runs in a process of its own, since peak memory is a
process's. peak: resident memory beyond that of the same process after a short call; x, y, the loss's own temporaries
and all that the backward pass writes included. tape: what the forward call leaves for the backward one beyond x, y and
the parameters, and the tape of the segment in work; for "gates" and "states" that of h stands in y. Nothing counts
before its gradient agrees with torch.nn's.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bptt.bench import Machine
from bptt.cli.info import processor
from bptt.memory import Checkpoints

CONTENDERS = ["gates", "states", "checkpoints", "stream", "torch.nn", "torch checkpoint"]

SCRIPT = """
import json, math, resource, sys, time
import torch, bptt
from torch.utils.checkpoint import checkpoint

name, cell, T, B, I, H, repeats = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:8])
torch.set_num_threads(1)
torch.manual_seed(0)
theirs = getattr(torch.nn, cell.upper())(I, H)
memory = name if name in ("gates", "states") else "checkpoints"
ours = bptt.convert(getattr(torch.nn, cell.upper())(I, H), memory=memory)
ours.load_state_dict(theirs.state_dict())

def segments(x):
    s, y, hx = max(1, math.isqrt(len(x))), [], None
    for a in range(0, len(x), s):
        out, hx = checkpoint(theirs, x[a : a + s], hx, use_reentrant=False)
        y.append(out)
    return torch.cat(y)

def run(x):
    if name == "stream":
        return list(bptt.stream_gradients(ours, x, lambda steps, y: y.square().sum()).parameters.values())
    layer = theirs if name.startswith("torch") else ours
    y = segments(x) if name == "torch checkpoint" else layer(x)[0]
    y.square().sum().backward()
    grads = [p.grad for p in layer.parameters()]
    for p in layer.parameters():
        p.grad = None
    return grads

def kept(x):
    # Bytes that a forward call leaves for the backward one, beyond x, y and the parameters.
    if name == "stream":
        return None
    layer, found = theirs if name.startswith("torch") else ours, {}

    def pack(t):
        found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes(), t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = segments(x) if name == "torch checkpoint" else layer(x)[0]
    own = {t.untyped_storage().data_ptr() for t in (x, y, *layer.parameters())}
    return sum(size for at, (size, _) in found.items() if at not in own)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

small = torch.randn(64, B, I)
mine = run(small)
theirs(small)[0].square().sum().backward()
worst = max(float((a - p.grad).norm() / p.grad.norm()) for a, p in zip(mine, theirs.parameters()))
for p in theirs.parameters():
    p.grad = None
del mine
before = peak()
x = torch.randn(T, B, I)
times = []
for _ in range(repeats):
    start = time.perf_counter()
    run(x)
    times.append(time.perf_counter() - start)
whole = peak()
print(json.dumps({"kept": kept(x), "bytes": whole - before, "seconds": sorted(times)[len(times) // 2], "error": worst}))
"""


def main(
    cell: Annotated[str, typer.Option(help="rnn, gru or lstm")] = "lstm",
    steps: Annotated[str, typer.Option(help="T, several by commas")] = "1000,10000,100000",
    batch: Annotated[int, typer.Option(help="B")] = 16,
    inputs: Annotated[int, typer.Option(help="I")] = 32,
    hidden: Annotated[int, typer.Option(help="H")] = 128,
    repeats: Annotated[int, typer.Option(help="timings each; the median counts")] = 3,
    most: Annotated[float, typer.Option(help="GiB a run may be expected to need")] = 8.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="where to save the rows")] = None,
) -> None:
    """Print the table."""
    rows = []
    values = {"rnn": 1, "gru": 5, "lstm": 6}[cell]  # taped per unit and step
    sizes = (batch, inputs, hidden)
    todo = [(T, name) for T in map(int, steps.split(",")) for name in CONTENDERS]
    for T, name in track(todo, description="measuring", console=Console(stderr=True), transient=True):
        whole = 4 * T * batch * hidden * values
        if whole * 3 > most * 2**30 and name in ("gates", "states", "torch.nn"):
            continue
        command = [sys.executable, "-c", SCRIPT, name, cell, *map(str, (T, *sizes, repeats))]
        found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        if found["error"] > 1e-4:
            raise SystemExit(f"not measured: the gradient of {name} is {found['error']:.1e} off")
        rows.append({"cell": cell, "T": T, "B": batch, "I": inputs, "H": hidden, "name": name, "tape": whole, **found})
    table = Table("T", "memory", "tape, MiB", "of the whole tape", "peak, MiB", "seconds", "times gates")
    for row in rows:
        gates = next((r for r in rows if (r["T"], r["name"]) == (row["T"], "gates")), None)
        times = "-" if gates is None else f"{row['seconds'] / gates['seconds']:.2f}"
        tape = ["-", "-"]
        if row["kept"] is not None:
            held = row["kept"] + segment(row, values)
            tape = [f"{held / 2**20:.2f}", f"{held / row['tape']:.2%}"]
        table.add_row(str(row["T"]), row["name"], *tape, f"{row['bytes'] / 2**20:.1f}", f"{row['seconds']:.3g}", times)
    Console(width=110).print(table)
    if json_file is not None:
        machine = asdict(Machine.here(processor(), cores=1))
        json_file.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def segment(row: dict[str, Any], values: int) -> int:
    """Bytes of the tape of the segment in work, beside what is kept."""
    if row["name"] not in ("checkpoints", "torch checkpoint"):
        return 0
    state = 4 * row["B"] * row["H"]
    steps = Checkpoints().cut(row["T"], state, values * state).steps
    return values * state * (steps if row["name"] == "checkpoints" else math.isqrt(row["T"]))


if __name__ == "__main__":
    typer.run(main)
