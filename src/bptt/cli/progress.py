"""What is shown while training: a live line on a terminal, occasional plain lines elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from time import monotonic
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..flow import Finding
from ..train import Record, RunDirectory, Step, Trainer, fit

__all__ = ["TrainingProgress", "describe", "describe_briefly", "train_with_progress"]

PLAIN_SECONDS = 2.0
"""Least time between two plain lines, lines with a held-out measurement excepted."""

WIDE = 110
"""Columns of a terminal that has room for a bar."""


def describe(record: Record, units: str = "tokens") -> str:
    """One record in one line. units: what is predicted.

    >>> describe(Record(50, 1, 10, 1.0, 2.718281828, None, None, None, 0.25, 0.5, 12345.6))
    'loss 1.000  perplexity 2.72  grad norm 0.25  clipped 50%  12,346 tokens/s'
    """
    held = _heldout(record, "  ")
    perplexity = "" if record.perplexity is None else f"perplexity {record.perplexity:.2f}  "
    measured = (
        f"{held}all steps skipped"
        if record.loss is None
        else (
            f"loss {record.loss:.3f}  {perplexity}{held}grad norm {record.grad_norm:.2f}  clipped {record.clipped:.0%}"
        )
    )
    skipped = f"  skipped {record.skipped}" if record.skipped else ""
    least = "" if record.horizon_settled else "at least "
    horizon = "" if record.horizon is None else f"  horizon {least}{record.horizon}"
    window = "" if record.window is None else f"  window {record.window}"
    return f"{measured}{skipped}{horizon}{window}  {record.tokens_per_second:,.0f} {units}/s"


def _heldout(record: Record, after: str) -> str:
    """The held-out measurement of a record, if it has one: perplexity, else the loss and the task's own measures."""
    if record.heldout_perplexity is not None:
        return f"held-out {record.heldout_perplexity:.2f}{after}"
    if record.heldout_loss is None:
        return ""
    measures = {name: value for name, value in (record.measures or {}).items() if "/" not in name}
    more = "".join(f" {name} {value:.4g}" for name, value in measures.items() if math.isfinite(value))
    return f"held-out {record.heldout_loss:.3f}{more}{after}"


def describe_briefly(record: Record, heldout: str, units: str = "tok") -> str:
    """The same for the live line, which must leave room for the count in 80 columns. heldout: the last measurement.

    >>> describe_briefly(Record(50, 1, 50, 1.0, 2.718281828, None, None, None, 0.25, 0.5, 12345.6), "held-out 3.10 ")
    'loss 1.000 ppl 2.72 held-out 3.10 |g| 0.25 clip 50% 12,346 tok/s'
    """
    if record.loss is None:
        return f"{heldout}all {record.skipped} steps skipped"
    perplexity = "" if record.perplexity is None else f"ppl {record.perplexity:.2f} "
    return (
        f"loss {record.loss:.3f} {perplexity}{heldout}"
        f"|g| {record.grad_norm:.2f} clip {record.clipped:.0%} {record.tokens_per_second:,.0f} {units[:3]}/s"
    )


class TrainingProgress:
    """Inside `with`, shows steps and records on a console."""

    def __init__(self, console: Console, total: int, done: int, units: str = "tokens") -> None:
        self.console, self.total, self.units = console, total, units
        self.heldout = ""  # the last measurement stays in the live line
        self.last = -PLAIN_SECONDS
        self.told: set[tuple[str, ...]] = set()
        bar = [BarColumn(bar_width=20)] if console.width >= WIDE else []
        self.bar = Progress(
            MofNCompleteColumn(),
            *bar,
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[text]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("train", total=total, completed=done, text="")

    def __enter__(self) -> TrainingProgress:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def step(self, step: Step, total: int) -> None:
        """Move the live line. total: the steps of the whole run, which of drawn epochs are known when they begin."""
        self.total = total
        self.bar.update(self.task, completed=step.step, total=total)

    def record(self, record: Record) -> None:
        """Show a record. On a terminal those with a held-out measurement also stay, as a line above the live one."""
        measured = record.heldout_loss is not None
        if measured:
            self.heldout = _heldout(replace(record, measures=None), " ")
        self.bar.update(self.task, text=describe_briefly(record, self.heldout, self.units))
        if self.console.is_terminal and not measured:
            return
        if measured or monotonic() - self.last >= PLAIN_SECONDS:
            self.last = monotonic()
            line = f"step {record.step}/{self.total}  {describe(record, self.units)}"
            self.console.print(line, highlight=False, soft_wrap=True)

    def finding(self, step: int, finding: Finding) -> None:
        """Show what the doctor found, as a line of its own; the same one at a later step is not shown again."""
        if finding.once not in self.told:
            self.told.add(finding.once)
            self.console.print(f"step {step}: {finding.message}", highlight=False, markup=False, soft_wrap=True)


def train_with_progress(
    trainer: Trainer, run: RunDirectory, console: Console, also: Callable[[Record], None] | None = None
) -> int:
    """`fit`, shown; the exit status: 0, or 128 + the number of the signal after which it saved and stopped.

    also: what else is called with every record. Of several processes that train together the first shows it.
    """
    if not trainer.processes.first:
        stopped_by = fit(trainer, run)
        return 0 if stopped_by is None else 128 + stopped_by
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    task = trainer.task
    shared = f"; {trainer.processes.world} processes" if trainer.processes.world > 1 else ""
    weights = sum(p.numel() for p in trainer.model.parameters())
    say(f"{run.path}: {task.about()}, {weights:,} weights; {task.baseline()}{shared}")
    for hint in task.hints(trainer.config):
        say(hint)
    with TrainingProgress(console, trainer.total, trainer.step, task.units) as progress:

        def on_record(record: Record) -> None:
            progress.record(record)
            if also is not None:
                also(record)

        stopped_by = fit(
            trainer,
            run,
            on_step=lambda step: progress.step(step, trainer.total),
            on_record=on_record,
            on_finding=progress.finding,
        )
    if trainer.skipped:
        say(f"{trainer.skipped} of {trainer.step} steps were not finite and skipped: see {run.findings_file}")
    if stopped_by is None:
        return 0
    say(f"saved at step {trainer.step}; to go on: bptt train --resume {run.path}")
    return 128 + stopped_by
