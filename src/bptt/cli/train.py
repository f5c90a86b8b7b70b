"""`bptt train`: a language model on a text."""

from __future__ import annotations

from contextlib import nullcontext
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..train import Config, InputError, RunDirectory, Trainer, resume, start
from ..train.config import read_entries
from ..train.corpus import read_file
from .options import with_training_options
from .progress import train_with_progress
from .tensorboard import board, require_tensorboard

__all__ = ["train"]


@with_training_options
def train(
    config_file: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="options from a TOML file, out included; flags win")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="run directory (default: runs/TEXT-CELL-TIME)", show_default=False),
    ] = None,
    resume_from: Annotated[
        Path | None, typer.Option("--resume", metavar="DIR", help="go on with a run, exactly where it was saved")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the run in --out")] = False,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="write curves and (t, lag) maps to RUN/tensorboard")
    ] = False,
    **options: Any,
) -> int:
    """Train a character or word language model on a text.

    Perplexity is exp(total NLL / predicted tokens). Ctrl-C finishes the step, saves, and says how to go on.
    """
    if tensorboard:
        require_tensorboard()
    given = {name: value for name, value in options.items() if value is not None}
    if resume_from is not None:
        if out is not None or config_file is not None or overwrite:
            raise InputError(
                "--resume takes its directory and options from the run: leave out --out, --config, --overwrite"
            )
        trainer, run = resume(resume_from, **given)
    else:
        config, named = _read(config_file, given)
        trainer, run = start(config, out or named or _default_directory(config), overwrite=overwrite)
    with board(trainer, run) if tensorboard else nullcontext() as also:
        status = train_with_progress(trainer, run, Console(stderr=True), also)
    if status == 0:
        typer.echo(_summary(run, trainer))
    return status


def _read(file: Path | None, flags: dict[str, Any]) -> tuple[Config, Path | None]:
    """The options of a new run, and the directory that the file names for it."""
    if file is None:
        return Config(**flags), None
    entries = read_entries(read_file(file, "configuration"), str(file), also=["out"])
    out = entries.pop("out", None)
    if out is not None and (not isinstance(out, str) or not out or "\0" in out):
        raise InputError(f"{file}: out must be a directory name: got {out!r}")
    return Config.from_entries(entries, str(file), **flags), None if out is None else Path(out)


def _default_directory(config: Config) -> Path:
    name = Path(config.text).stem if config.text else config.corpus
    return Path("runs") / f"{name}-{config.cell}-{datetime.now():%Y%m%d-%H%M%S}"


def _summary(run: RunDirectory, trainer: Trainer) -> str:
    measured = ""
    for last in run.metrics()[-1:]:  # a run that was resumed at its end may have lost its metrics
        if last["perplexity"] is None or (trainer.config.epochs is not None and last["epoch_perplexity"] is None):
            measured = ": the last ones were all skipped"
        elif trainer.config.epochs is not None:
            measured = f": training perplexity {last['epoch_perplexity']:.4g} over the last epoch"
        else:
            over = "step" if last["steps"] == 1 else f"{last['steps']} steps"
            measured = f": training perplexity {last['perplexity']:.4g} over the last {over}"
        if last["heldout_perplexity"] is not None:
            measured += f"; held-out perplexity {last['heldout_perplexity']:.4g} at the end"
    return (
        f"{trainer.step} steps{measured}\n"
        f"{run.path}: config.toml, metrics.jsonl, vocabulary.json, weights.safetensors, state.pt\n"
        f"sample from it: bptt sample {run.path}"
    )
