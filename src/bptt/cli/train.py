"""`bptt train`: a language model, a forecast, or a classifier."""

from __future__ import annotations

import os
from contextlib import nullcontext
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..train import Config, InputError, NonFiniteError
from ..train.options import USES
from ..train.runs import changed, options_of
from .checked_options import check_found, config_of, directory_of
from .options import with_training_options

if TYPE_CHECKING:
    from ..train import RunDirectory, Trainer
    from ..train.processes import Processes

__all__ = ["train"]


@with_training_options()
def train(
    config_file: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="options from a TOML file, out included; flags win")
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="run directory (default: runs/DATA-CELL-TIME)", show_default=False),
    ] = None,
    resume_from: Annotated[
        str | None, typer.Option("--resume", metavar="DIR", help="go on with a run, exactly where it was saved")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the run in --out")] = False,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="write curves and (t, lag) maps to RUN/tensorboard")
    ] = False,
    **options: Any,
) -> int:
    """Train a language model on a text, a forecast on a series, or a classifier of sequences.

    Perplexity is exp(total NLL / predicted tokens). Ctrl-C finishes the step, saves, and says how to go on.

    Several processes share the lanes of every batch and take the steps that one would: torchrun --nproc-per-node N
    -m bptt train ... (gloo on CPUs, nccl on GPUs). With --max-restarts and --out, a process that dies costs the steps
    since the last checkpoint.
    """
    given = {name: value for name, value in options.items() if value is not None}

    @cache
    def asked() -> tuple[Config, Path | None]:
        """The options of a new run and its directory, if one is named, as far as they can be checked without torch."""
        directory = None if out is None else directory_of("out", out)
        config, named = config_of(config_file, given)
        return config, directory or named

    if resume_from is not None and (out is not None or config_file is not None or overwrite):
        raise InputError(
            "--resume takes its directory and options from the run: leave out --out, --config, --overwrite"
        )
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # of several processes the first says it, once they are connected
        if resume_from is None:
            asked()
        else:
            check_found(changed(options_of(directory_of("resume", resume_from)), given))

    from rich.console import Console

    from ..train import resume
    from ..train.distributed import begin, start_or_resume
    from ..train.processes import ElsewhereError, joined, may_restart
    from .pictures import write_pictures
    from .progress import train_with_progress
    from .tensorboard import board, require_tensorboard

    def opened(processes: Processes) -> tuple[Trainer, RunDirectory]:
        if tensorboard:
            require_tensorboard()
        if resume_from is not None:
            return resume(directory_of("resume", resume_from), **given)
        config, directory = asked()
        if directory is None and may_restart():
            raise InputError("--max-restarts needs a directory where the run is found again: give --out DIR")
        return start_or_resume(processes, config, directory or _default_directory(config), overwrite=overwrite)

    console = Console(stderr=True)
    with joined() as processes:
        try:
            with console.status("reading the data") if processes.first else nullcontext():
                trainer, run = begin(processes, lambda: opened(processes))
            finished = resume_from is not None and trainer.finished
            with board(trainer, run) if tensorboard and processes.first else nullcontext() as also:
                status = train_with_progress(trainer, run, console, also)
        except ElsewhereError:  # that process says it
            return 2
        except NonFiniteError:  # on all processes
            if processes.first:
                raise
            return 1
        if status == 0 and processes.first:
            if finished:
                more = "--steps" if trainer.config.epochs is None else "--epochs"
                had = f"had taken all of its {trainer.step} steps"
                if trainer.out_of_patience:
                    more, had = "--patience", f"had run out of patience at step {trainer.step}"
                typer.echo(f"{run.path} {had}: to go on longer, give more {more}")
            typer.echo(_summary(run, trainer))
            for picture in write_pictures(trainer.task, trainer.counts, run.path):
                typer.echo(f"{picture}")
    return status


def _default_directory(config: Config) -> Path:
    return Path("runs") / f"{Path(config.source).stem}-{config.cell.replace(':', '.')}-{datetime.now():%Y%m%d-%H%M%S}"


def _summary(run: RunDirectory, trainer: Trainer) -> str:
    measured = ""
    for last in run.metrics()[-1:]:  # a run that was resumed at its end may have lost its metrics
        by_epoch = trainer.config.epochs is not None
        perplexity = last["epoch_perplexity" if by_epoch else "perplexity"]
        if perplexity is not None:
            over = "epoch" if by_epoch else "step" if last["steps"] == 1 else f"{last['steps']} steps"
            measured = f": training perplexity {perplexity:.4g} over the last {over}"
        elif last["loss"] is None:
            measured = ": the last ones were all skipped"
        elif trainer.task.perplexity(0.0) is None:
            measured = f": training loss {last['loss']:.4g}"
        else:
            measured = f": training loss {last['loss']:.4g}, a perplexity beyond all numbers"
        if last["heldout_perplexity"] is not None:
            measured += f"; held-out perplexity {last['heldout_perplexity']:.4g} at the end"
        elif last["heldout_loss"] is not None:
            named = {"loss": last["heldout_loss"], **(last["measures"] or {})}
            told = ", ".join(f"{n} {value:.4g}" for n, value in named.items() if "/" not in n and value is not None)
            measured += f"; held-out {told} at the end"
    if trainer.best is not None:
        best = f"held-out loss {trainer.best['loss']:.4g}"
        measured += f"; kept: the weights of step {trainer.best['step']}, the best, {best}"
    if short := _shortfall(run, trainer):
        measured += f"\n{short}"
    return (
        f"{trainer.step} steps{', out of patience' if trainer.out_of_patience else ''}{measured}\n"
        f"{run.path}: config.toml, metrics.jsonl, {trainer.task.file}, weights.safetensors, checkpoints\n"
        f"{USES[trainer.task.name].format(run=run.path)}; how far its gradients travel: bptt flow {run.path}"
    )


def _shortfall(run: RunDirectory, trainer: Trainer) -> str:
    """What the weights that were kept did not beat on the held-out data, in words."""
    kept = trainer.step if trainer.best is None else trainer.best["step"]
    for record in run.metrics():
        if record["step"] == kept and record["heldout_loss"] is not None:
            return trainer.task.shortfall(record["heldout_loss"], record["measures"] or {})
    return ""
