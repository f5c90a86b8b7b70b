"""Whether `bptt train` holds its memory: one long run, its resident memory over time, and a line fitted to it.

    python benchmarks/soak.py [--minutes 30] [--threads 1] [--documents] [--out FILE]

A small network on the built-in text (with --documents on its lines, each a document, two windows a step), through
`start` and `fit` with everything that is on in training: the doctor, records, measurements on held-out text,
checkpoints of which the last three stay, each many hundreds of times. Memory is read every second from
/proc/self/statm, open files are counted with it. The run ends as Ctrl-C ends one, is resumed once, and the bytes it
left on disk are counted.

The first quarter, in which caches and the allocator fill, is left out. What remains is averaged in 24 blocks, and a
line is fitted to them by least squares; its error is the standard error of the slope. Memory is called flat where the
slope, two standard errors added to its size, makes less than 1 % of the memory over the whole run, and the number of
open files stays the same. Exit status 1 where it is not.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from time import monotonic
from typing import Annotated

import numpy as np
import torch
import typer

from bptt.bench import Machine
from bptt.cli.inventory import processor
from bptt.train import Config, Step, atomic, fit, resume, start
from bptt.train.corpus import load

RESULTS = Path(__file__).parent / "results" / "soak.json"
BLOCKS = 24
MIB = 2**20


class Soak:
    """Called after every step: samples once a second, ends the run when its time is over.

    samples: (seconds, resident bytes, open files, step).
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.begun = monotonic()
        self.samples: list[tuple[float, int, int, int]] = []

    def __call__(self, step: Step) -> None:
        now = monotonic() - self.begun
        if not self.samples or now - self.samples[-1][0] >= 1:
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            self.samples.append((now, resident, len(os.listdir("/proc/self/fd")), step.step))
            if len(self.samples) % 60 == 1:
                print(f"{now:6.0f} s  step {step.step:8,}  {resident / MIB:.2f} MiB", flush=True)
        if now >= self.seconds:
            os.kill(os.getpid(), signal.SIGINT)


def slope(times: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """The slope of a least-squares line through the means of `BLOCKS` blocks, and its standard error."""
    x, y = (np.array([block.mean() for block in np.array_split(z, BLOCKS)]) for z in (times, values))
    spread = ((x - x.mean()) ** 2).sum()
    result = float(((x - x.mean()) * (y - y.mean())).sum() / spread)
    residuals = y - y.mean() - result * (x - x.mean())
    return result, float(np.sqrt((residuals**2).sum() / (BLOCKS - 2) / spread))


def main(
    minutes: Annotated[float, typer.Option(help="how long to train")] = 30.0,
    threads: Annotated[int, typer.Option(help="CPU threads")] = 1,
    documents: Annotated[bool, typer.Option("--documents", help="lines as documents, read from their file")] = False,
    out: Annotated[Path, typer.Option(help="file of results")] = RESULTS,
) -> None:
    """Train, print memory over time and its slope, write the results."""
    machine = Machine.here(processor(), threads)
    config = Config(
        cell="lstm", hidden=32, embedding=16, batch=8, seq_length=32, dropout=0.1, steps=2**40,
        threads=threads, log_every=20, eval_every=1000, save_every=200,
    )  # fmt: skip
    soak = Soak(minutes * 60)
    with tempfile.TemporaryDirectory() as folder:
        if documents:
            text = Path(folder) / "text.txt"
            text.write_text(load(None, None, "none")[:60_000], encoding="utf-8")
            config = config.override(text=str(text), documents="lines", accumulate=2)
        else:
            config = config.override(limit=60_000)
        trainer, run = start(config, Path(folder) / "run")
        fit(trainer, run, on_step=soak)
        again, run = resume(run.path)
        if again.step != trainer.step:
            raise SystemExit(f"resumed at step {again.step}, not {trainer.step}")
        left = sorted(path.name for path in run.checkpoints.iterdir())
        disk = sum(path.stat().st_size for path in run.path.rglob("*") if path.is_file())
        run.release()
    times, resident, files, _ = (np.array(column, dtype=np.float64) for column in zip(*soak.samples, strict=True))
    settled = times >= times[-1] / 4
    if settled.sum() < 2 * BLOCKS:
        raise SystemExit(f"too short to fit a line: {int(settled.sum())} samples, at least {2 * BLOCKS} are needed")
    per_second, error = slope(times[settled], resident[settled])
    grown, level = per_second * times[-1], resident[settled].mean()
    flat = bool(abs(grown) + 2 * error * times[-1] < 0.01 * level and files[settled].max() == files[settled].min())
    print(
        f"{trainer.step:,} steps in {times[-1] / 60:.1f} min, {trainer.step // 200:,} checkpoints, "
        f"{trainer.step // 1000:,} evaluations: {level / MIB:.1f} MiB resident, "
        f"slope {per_second * 3600 / MIB:+.3f} +- {error * 3600 / MIB:.3f} MiB/h, {'flat' if flat else 'NOT FLAT'}; "
        f"open files {files[settled].min():.0f} to {files[settled].max():.0f}; on disk {len(left)} checkpoints"
    )
    thinned = soak.samples[:: max(1, len(soak.samples) // 360)]
    results = {
        "machine": asdict(machine),
        "minutes": times[-1] / 60,
        "steps": trainer.step,
        "threads": torch.get_num_threads(),
        "config": {name: value for name, value in asdict(config).items() if value is not None},
        "resident_bytes": level,
        "slope_bytes_per_hour": per_second * 3600,
        "slope_error_bytes_per_hour": error * 3600,
        "flat": flat,
        "open_files": [files[settled].min(), files[settled].max()],
        "checkpoints_left": left,
        "disk_bytes": disk,
        "samples": [{"seconds": round(t, 1), "resident_bytes": r, "step": s} for t, r, _, s in thinned],
    }
    atomic.write(out, (json.dumps(results, indent=1) + "\n").encode())
    if not flat:
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
