"""A run from its beginning or its last checkpoint to its end: the loop, with its directory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from ..flow import Finding
from .config import Config
from .dataset import prepare
from .errors import InputError, NonFiniteError
from .interrupt import StopRequest
from .loop import Trainer
from .records import Record, Step
from .rundir import RunDirectory

__all__ = ["CHANGEABLE", "fit", "located", "postponed", "resume", "start"]

CHANGEABLE = (
    *("steps", "epochs", "threads", "device", "log_every", "eval_every", "save_every", "keep", "text", "corpus"),
    "on_nonfinite",
)
"""Options that may change when a run is resumed; the others would make it another run."""

_waiting: ContextVar[list[tuple[RunDirectory, Callable[[], None]]] | None] = ContextVar("_waiting", default=None)
"""The directories that wait inside `postponed`, each with what writes to it."""


def start(config: Config, path: Path, *, overwrite: bool = False) -> tuple[Trainer, RunDirectory]:
    """A new run in a directory. Everything is checked before the directory is touched; step 0 is saved at once.

    This process then is the only one that may write there, until `fit` or the process ends. An earlier run that is to
    be overwritten stays as it was until step 0 of the new one is saved, whatever fails before.

    Raises InputError for a text, an option or a directory that cannot be used.
    """
    run = RunDirectory.vacant(path, overwrite)
    trainer = Trainer(located(config), prepare(config))
    run.occupy(overwrite)
    _write(run, partial(run.begin, trainer.config, trainer.dataset.vocabulary, trainer.state(), config.keep))
    return trainer, run


def resume(path: Path, **changes: Any) -> tuple[Trainer, RunDirectory]:
    """The run in a directory, at its last checkpoint. changes: options out of `CHANGEABLE`.

    A damaged checkpoint is passed over for the one before it, which is logged. This process then is the only one that
    may write there, until `fit` or the process ends.

    Raises InputError, the directory untouched, for a change it cannot take (fewer steps than it has had among them),
    and where another live process has the directory.
    """
    run = RunDirectory.open(path)
    run.acquire()
    try:
        run.settle()
        trainer, write = _resume(run, changes)
    except BaseException:
        run.release()
        raise
    _write(run, write)
    return trainer, run


@contextmanager
def postponed() -> Iterator[Callable[[], None]]:
    """Inside `with`, `start` and `resume` check everything and take the directory, but write nothing to it.

    What this yields does that, once all else has gone well. Where it is not called, or raises, the directory is at the
    end as it was.
    """
    waiting: list[tuple[RunDirectory, Callable[[], None]]] = []

    def write() -> None:
        while waiting:
            waiting[-1][1]()
            waiting.pop()

    token = _waiting.set(waiting)
    try:
        yield write
    finally:
        _waiting.reset(token)
        for run, _ in waiting:
            run.abandon()


def _write(run: RunDirectory, write: Callable[[], None]) -> None:
    """Write to a directory that this process has taken: now, or at the end of `postponed`."""
    waiting = _waiting.get()
    if waiting is not None:
        waiting.append((run, write))
        return
    try:
        write()
    except BaseException:
        run.abandon()
        raise


def _resume(run: RunDirectory, changes: dict[str, Any]) -> tuple[Trainer, Callable[[], None]]:
    """The trainer, and what writes to the directory that the run goes on."""
    old = run.config()
    config = old.override(**changes)
    for entry in fields(Config):
        was, now = getattr(old, entry.name), getattr(config, entry.name)
        if was != now and entry.name not in CHANGEABLE:
            raise InputError(
                f"{entry.name} cannot change when a run is resumed: it was {was!r}, got {now!r}; "
                f"only {', '.join(CHANGEABLE)} can"
            )
    state = run.state()
    dataset = prepare(config)
    trainer = Trainer(located(config), dataset)
    trainer.restore(state)
    if dataset.vocabulary != run.vocabulary():
        raise InputError(f"{run.vocabulary_file} is not the vocabulary of the text this run began with")
    if trainer.step >= trainer.total and (config.steps, config.epochs) != (old.steps, old.epochs):
        name = "epochs" if config.steps is None else "steps"
        raise InputError(
            f"already at step {trainer.step}; give more {name}: got {name}={getattr(config, name)}"
            + (f", {trainer.total} steps" if name == "epochs" else "")
        )

    def write() -> None:
        run.tidy(trainer.step, config.keep)
        run.rewind(trainer.step)
        run.publish(state)  # a run killed between its last checkpoint and its weights has no other occasion
        if trainer.config != old:
            run.write_config(trainer.config.to_toml())

    return trainer, write


def fit(
    trainer: Trainer,
    run: RunDirectory,
    *,
    on_step: Callable[[Step], None] = lambda step: None,
    on_record: Callable[[Record], None] = lambda record: None,
    on_finding: Callable[[int, Finding], None] = lambda step, finding: None,
) -> int | None:
    """Train to the end, logging and saving on the way. on_finding: what the doctor finds, with the step.

    The directory is this process's alone meanwhile, and given up at the end, whatever the end is. Of several processes
    that train together all call this, and only the first touches the directory.

    Returns None, or the number of the signal (SIGINT, SIGTERM) after which it saved and stopped. Raises
    NonFiniteError, the last checkpoint kept; InputError where another process has the directory.
    """
    config, processes = trainer.config, trainer.processes

    def note(step: int, tell: Callable[[int, Finding], None] = on_finding) -> None:
        for finding in trainer.take_findings():
            if processes.first:
                run.append_finding(step, finding)
            tell(step, finding)

    with run.held() if processes.first else nullcontext(), StopRequest() as request:
        while not trainer.finished:
            try:
                step = trainer.advance()
            except NonFiniteError as error:
                note(trainer.step + 1, tell=lambda step, finding: None)  # the error says it
                raise NonFiniteError(f"{error} (the last checkpoint in {run.path} is kept)") from error
            on_step(step)
            note(step.step)
            measure = trainer.finished or step.step % config.eval_every == 0
            if measure or step.step % config.log_every == 0:
                record = trainer.record(heldout=measure)
                note(step.step)
                with processes.together():
                    if processes.first:
                        run.append(record)
                on_record(record)
            signal = processes.largest(request.signal or 0)  # all stop at the same step
            if trainer.finished or signal or step.step % config.save_every == 0:
                state = trainer.state()
                with processes.together():
                    if processes.first:
                        run.save(state, config.keep)
            if signal:
                break
    return None if trainer.finished else signal


def located(config: Config) -> Config:
    """The text's place made absolute, so that the run can be resumed from another directory."""
    return config if config.text is None else config.override(text=str(Path(config.text).absolute()))
