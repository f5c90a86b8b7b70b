"""Peak memory and time of one forward and backward against T, by what is kept for the backward pass.

    python benchmarks/memory.py [--cell lstm] [--shape T,B,I,H]... [--gradient POLICY] [--repeats 3] [--json FILE]

By default T goes from a thousand to a million, and T = 10,000 is measured once more under truncated:20.

Contenders: torch.nn, torch.nn with torch.utils.checkpoint over segments of sqrt(T) steps, bptt with memory "gates",
"states" and Checkpoints, bptt.stream_gradients; only bptt's under other policies than full. Each runs on one thread in
a process of its own, since peak memory is a process's. Needs Linux with glibc 2.33 or newer.

peak: resident memory beyond that of the same process after a short call; x, y, the loss's own temporaries and all that
the backward pass writes included. kept: what the forward call leaves for the backward one beyond x, y and the
parameters, in bytes that malloc has in use: the nodes of autograd's graph are counted, as saved-tensor hooks do not
(torch.utils.checkpoint keeps a node for every operation of a segment), Python's small objects are not. Of a stream,
whose two passes are one call: its checkpoints. segment: the tape of the longest segment in work, of bptt the tensors
that its program returns as its tape. tape: kept and segment together; for "gates" and "states" that of h stands in y.

Nothing counts before its gradient at that T agrees with torch.nn's in float64, by autograd, every block of losses from
the state before its first step. It may be 1e-4 of a tensor's largest entry off, or four times as far as torch.nn's own
float32 where that is further: rounding grows with T, and other orders of the same sums round differently.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import bptt
from bptt import policies
from bptt.bench import Case, Machine
from bptt.cli.inventory import processor
from bptt.engine import Checkpointed, Stack
from bptt.train import InputError, atomic

SHAPES = ((1_000, 16, 32, 128), (10_000, 16, 32, 128), (100_000, 1, 16, 64), (1_000_000, 1, 16, 64))
TRUNCATED = ((10_000, 16, 32, 128), "truncated:20")
REFERENCE = "reference"
THEIRS = ("torch.nn", "torch checkpoint")  # first, for the rounding error of torch.nn
OURS = ("gates", "states", "checkpoints", "stream")
VALUES = {"rnn": 1, "gru": 5, "lstm": 6}  # taped per unit and step
SHORT = 64  # steps of the short call
ROWS = 2**14  # T * B that the reference works on at a time
MIB = 2**20

# In a process of its own ----------------------------------------------------------------------------------------------


class Malloc(ctypes.Structure):
    """What mallinfo2 returns."""

    _fields_ = [
        *[(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd")],
        *[(name, ctypes.c_size_t) for name in ("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")],
    ]


def left_by(call: Callable[[], Tensor]) -> int:
    """Bytes that malloc has in use after a call and had not before, the result still there."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = Malloc
    gc.collect()
    before = mallinfo()
    result = call()
    gc.collect()
    after = mallinfo()
    del result
    return after.uordblks + after.hblkhd - before.uordblks - before.hblkhd


def resident(which: str) -> int:
    """Bytes: VmRSS now, VmHWM at most so far. getrusage would give the parent's where that is more."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(which))


def tapes_of(program: type, method: str) -> list[int]:
    """Bytes of each tape that a method of a program returns from now on."""
    sizes: list[int] = []
    original = getattr(program, method)

    def recorded(*args: Any, **options: Any) -> Any:
        result = original(*args, **options)
        sizes.append(sum(t.nbytes for t in result[1]))
        return result

    setattr(program, method, recorded)
    return sizes


def network(case: Case) -> torch.nn.RNNBase:
    torch.manual_seed(0)
    return getattr(torch.nn, case.cell.upper())(case.I, case.H)


def inputs(case: Case, T: int) -> Tensor:
    return torch.randn(T, case.B, case.I, generator=torch.Generator().manual_seed(1))


def called(layer: torch.nn.RNNBase, x: Tensor, *hx: Tensor) -> tuple[Tensor, ...]:
    """y and the final state, h and c side by side."""
    y, final = layer(x, (hx if len(hx) == 2 else hx[0]) if hx else None)
    return y, *(final if isinstance(final, tuple) else (final,))


def in_segments(layer: torch.nn.RNNBase, x: Tensor) -> Tensor:
    """y by torch.utils.checkpoint."""
    steps, ys, hx = math.isqrt(len(x)), [], ()
    for a in range(0, len(x), steps):
        y, *hx = checkpoint(called, layer, x[a : a + steps], *hx, use_reentrant=False)
        ys.append(y)
    return torch.cat(ys)


def contender(name: str, case: Case, repeats: int, most: float, reference: str) -> dict[str, Any]:
    """What one contender takes; or only `expected`, bytes, where that is more than `most`."""
    layer: Any = network(case)
    if name in OURS:
        memory = name if name in ("gates", "states") else "checkpoints"
        layer = bptt.convert(layer, gradient=case.gradient, memory=memory)
    checkpoints, segments = tapes_of(Checkpointed, "forward_segments"), tapes_of(Stack, "forward")

    def forward(x: Tensor) -> Tensor:
        return in_segments(layer, x) if name == "torch checkpoint" else layer(x)[0]

    def run(x: Tensor) -> list[Tensor]:
        if name == "stream":
            return list(bptt.stream_gradients(layer, x, lambda steps, y: y.square().sum()).parameters.values())
        forward(x).square().sum().backward()
        grads = [p.grad for p in layer.parameters()]
        layer.zero_grad()
        return grads

    short = inputs(case, min(case.T, SHORT))
    run(short)
    before = resident("VmRSS")
    expected = 0 if name == "stream" else left_by(lambda: forward(short)) * case.T / len(short)
    if expected > most * 2**30:
        return {"expected": expected}
    x, times = inputs(case, case.T), []
    for _ in range(repeats):
        start = time.perf_counter()
        grads = run(x)
        times.append(time.perf_counter() - start)
    found: dict[str, Any] = {
        "bytes": resident("VmHWM") - before,
        "seconds": sorted(times)[len(times) // 2],
        "error": error(grads, torch.load(reference)),
        "segment": max(segments, default=case.T) if name in ("checkpoints", "stream") else 0,
    }
    if name == "torch checkpoint":
        found["segment"] = left_by(lambda: layer(x[: math.isqrt(case.T)])[0].sum())
    y = 4 * case.T * case.B * case.H
    return found | {"kept": max(checkpoints, default=0) if name == "stream" else left_by(lambda: forward(x)) - y}


def error(grads: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """The largest difference in any of them, as a share of the largest entry of the one expected."""
    shares = [(a - b).abs().max() / b.abs().max().clamp(min=1e-300) for a, b in zip(grads, expected, strict=True)]
    return float(torch.stack(shares).max())  # NaN where one is


def reference(case: Case) -> list[Tensor]:
    """torch.nn's gradients in float64, by autograd: every block of losses from the state before its first step."""
    layer, x = network(case).double(), inputs(case, case.T).double()
    blocks = policies.parse(case.gradient).reach(case.T).blocks(case.T)
    zero = [x.new_zeros(1, case.B, case.H)] * (2 if case.cell == "lstm" else 1)
    states = states_at(layer, x, sorted({first for first, _, _ in blocks}), zero)
    alike = defaultdict(list)  # first steps of the blocks of so many steps and so many losses
    for first, a, b in blocks:
        alike[b + 1 - first, b + 1 - a].append(first)
    for (steps, losses), firsts in alike.items():
        lanes = max(1, ROWS // (steps * case.B))
        for some in (firsts[i : i + lanes] for i in range(0, len(firsts), lanes)):
            side_by_side = torch.cat([x[first : first + steps] for first in some], 1)
            hx = [torch.cat(parts, 1) for parts in zip(*[states[first] for first in some], strict=True)]
            walk_back(layer, side_by_side, hx, losses)
    return [p.grad for p in layer.parameters()]


@torch.no_grad()
def states_at(layer: torch.nn.RNNBase, x: Tensor, steps: Iterable[int], hx: list[Tensor]) -> dict[int, list[Tensor]]:
    """The states before these steps, which ascend."""
    found, at = {}, 0
    for step in steps:
        if step > at:
            _, *hx = called(layer, x[at:step], *hx)
        found[step], at = hx, step
    return found


def walk_back(layer: torch.nn.RNNBase, x: Tensor, hx: list[Tensor], losses: int) -> None:
    """Add to the parameters' gradients that of the last losses, a segment of sqrt(T) steps at a time."""
    steps = math.isqrt(len(x))
    states = states_at(layer, x, range(0, len(x), steps), hx)
    behind: list[Tensor] = []  # dL of the state behind a segment
    for a in reversed(states):
        hx = [state.detach().requires_grad_() for state in states[a]]
        y, *final = called(layer, x[a : a + steps], *hx)
        loss = y[max(0, len(x) - losses - a) :].square().sum()
        for state, grad in zip(final, behind, strict=False):
            loss = loss + (state * grad).sum()
        loss.backward()
        behind = [state.grad for state in hx]


def work() -> None:
    """Do what the parent has put into the arguments, print what was found."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both; the parent ends this process
    torch.set_num_threads(1)
    job = json.loads(sys.argv[1])
    case = Case(**job.pop("case"))
    if job["name"] == REFERENCE:
        torch.save(reference(case), job["reference"])
    else:
        print(json.dumps(contender(case=case, **job)))


# The parent ----------------------------------------------------------------------------------------------------------


def main(
    cell: Annotated[str, typer.Option(help="rnn, gru or lstm")] = "lstm",
    shape: Annotated[
        list[str] | None,
        typer.Option(metavar="T,B,I,H", help=f"may be given again (default: {len(SHAPES)} of them, T from 1e3 to 1e6)"),
    ] = None,
    gradient: Annotated[
        str | None, typer.Option(metavar="POLICY", help="one that draws nothing (default: full)", show_default=False)
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="timings each; the median counts")] = 3,
    most: Annotated[float, typer.Option(help="GiB that a contender may be expected to keep; else left out")] = 8.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="where to save the rows, as they come")] = None,
) -> None:
    """Print the table. Ctrl-C shows what has been measured so far."""
    console = Console(stderr=True)
    try:
        cases = chosen(cell, shape, gradient)
        if json_file is not None and (json_file.is_dir() or not json_file.parent.is_dir()):
            raise InputError(f"json must be a file in a directory that is there: got {str(json_file)!r}")
    except InputError as refused:
        console.print(f"error: {refused}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
    machine = asdict(Machine.here(processor(), cores=1))
    rows: list[dict[str, Any]] = []
    todo = [(case, name) for case in cases for name in (REFERENCE, *(THEIRS if case.gradient == "full" else ()), *OURS)]
    try:
        with tempfile.TemporaryDirectory() as folder:
            file, rounding = Path(folder) / "gradients.pt", 0.0
            for case, name in track(todo, description="measuring", console=console, transient=True):
                job = {"case": asdict(case), "name": name, "repeats": repeats, "most": most, "reference": str(file)}
                found = in_a_process(job)
                if name == REFERENCE:
                    rounding = 0.0
                elif "expected" in found:
                    expected = found["expected"] / 2**30
                    console.print(f"left out: {name}, {case}, which would keep about {expected:.1f} GiB")
                else:
                    rounding = found["error"] if name == "torch.nn" else rounding
                    if not found["error"] <= max(1e-4, 4 * rounding):
                        raise SystemExit(f"not measured: the gradient of {name}, {case}, is {found['error']:.1e} off")
                    whole = 4 * case.T * case.B * case.H * VALUES[cell]
                    rows.append(asdict(case) | {"name": name, "tape": whole} | found)
                    if json_file is not None:
                        text = json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n"
                        atomic.write(json_file, text.encode())
    finally:
        if rows:
            Console(width=140).print(table(rows))


def chosen(cell: str, shapes: list[str] | None, gradient: str | None) -> list[Case]:
    """What the options ask for. Raises InputError."""
    if cell not in VALUES:
        raise InputError(f"cell must be one of {', '.join(VALUES)}: got {cell!r}")
    if shapes is None and gradient is None:
        cases = [Case(cell, *shape) for shape in SHAPES]
        at = SHAPES.index(TRUNCATED[0]) + 1
        return [*cases[:at], Case(cell, *TRUNCATED[0], TRUNCATED[1]), *cases[at:]]
    try:
        policy = policies.parse(gradient or "full")
    except ValueError as error:
        raise InputError(str(error)) from None
    if policy.draw(2, 1) is not None:
        raise InputError(f"gradient must be a policy that draws nothing: got {gradient!r}")
    return [Case(cell, *sizes(text), str(policy)) for text in shapes or [",".join(map(str, s)) for s in SHAPES]]


def sizes(text: str) -> tuple[int, int, int, int]:
    try:
        T, B, I, H = map(int, text.split(","))
    except ValueError:
        T = B = I = H = 0
    if min(T, B, I, H) < 1:
        raise InputError(f"shape must be four whole numbers of at least 1, T,B,I,H: got {text!r}")
    return T, B, I, H


def in_a_process(job: dict[str, Any]) -> dict[str, Any]:
    """What `work` prints of a job; nothing of the reference. The process ends with this call."""
    command = [sys.executable, "-c", "import memory; memory.work()", json.dumps(job)]
    done = subprocess.run(command, cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"not measured: {job['name']}, {Case(**job['case'])}, ended with status {done.returncode}")
    return json.loads(done.stdout or "{}")


def table(rows: list[dict[str, Any]]) -> Table:
    result = Table(
        "T, B, I, H", "memory", "tape, MiB", "of the whole tape", "peak, MiB", "seconds", "times gates", "off"
    )
    gates = {_case(row): row["seconds"] for row in rows if row["name"] == "gates"}
    for n, row in enumerate(rows):
        case, held = _case(row), row["kept"] + row["segment"]
        result.add_row(
            f"{case.T:,}, {case.B}, {case.I}, {case.H}" + (f" {case.gradient}" if case.gradient != "full" else ""),
            row["name"],
            f"{held / MIB:.2f}",
            f"{held / row['tape']:.2%}",
            f"{row['bytes'] / MIB:.1f}",
            f"{row['seconds']:.3g}",
            f"{row['seconds'] / gates[case]:.2f}" if case in gates else "-",
            f"{row['error']:.1e}",
            end_section=n + 1 == len(rows) or _case(rows[n + 1]) != case,
        )
    return result


def _case(row: dict[str, Any]) -> Case:
    return Case(*(row[name] for name in ("cell", "T", "B", "I", "H", "gradient")))


if __name__ == "__main__":
    typer.run(main)
