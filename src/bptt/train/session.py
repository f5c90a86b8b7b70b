"""A run from its beginning or its last checkpoint to its end: the loop, with its directory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..flow import Finding
from . import generators
from .config import Config
from .dataset import prepare
from .errors import InputError, NonFiniteError
from .interrupt import StopRequest
from .loop import Trainer
from .records import Record, Step
from .rundir import RunDirectory

__all__ = ["CHANGEABLE", "fit", "located", "resume", "start"]

CHANGEABLE = (
    *("steps", "epochs", "threads", "device", "log_every", "eval_every", "save_every", "keep", "text", "corpus"),
    "on_nonfinite",
)
"""Options that may change when a run is resumed; the others would make it another run."""


def start(config: Config, path: Path, *, overwrite: bool = False) -> tuple[Trainer, RunDirectory]:
    """A new run in a directory. Everything is checked before the directory is touched; step 0 is saved at once.

    This process then is the only one that may write there, until `fit` or the process ends.

    Raises InputError for a text, an option or a directory that cannot be used.
    """
    run = RunDirectory.vacant(path, overwrite)
    trainer = Trainer(located(config), prepare(config))
    path.mkdir(parents=True, exist_ok=True)
    try:
        run.acquire()
        RunDirectory.vacant(path, overwrite)  # still so, now that nobody else can change it
    except BaseException:
        run.release()
        if not any(path.iterdir()):
            path.rmdir()
        raise
    try:
        run.create(trainer.config, trainer.dataset.vocabulary)
        run.save(_state(trainer), trainer.config.keep)
    except BaseException:  # a full disk, Ctrl-C: half a run is of no use to anybody
        run.discard()
        raise
    return trainer, run


def resume(path: Path, **changes: Any) -> tuple[Trainer, RunDirectory]:
    """The run in a directory, at its last checkpoint. changes: options out of `CHANGEABLE`.

    A damaged checkpoint is passed over for the one before it, which is logged. A run that was killed before it could
    save its beginning begins. This process then is the only one that may write there, until `fit` or the process ends.

    Raises InputError, the directory untouched, for a change it cannot take (fewer steps than it has had among them),
    and where another live process has the directory.
    """
    run = RunDirectory.open(path)
    run.acquire()
    try:
        return _resume(run, changes), run
    except BaseException:
        run.release()
        raise


def _resume(run: RunDirectory, changes: dict[str, Any]) -> Trainer:
    old = run.config()
    config = old.override(**changes)
    for entry in fields(Config):
        was, now = getattr(old, entry.name), getattr(config, entry.name)
        if was != now and entry.name not in CHANGEABLE:
            raise InputError(
                f"{entry.name} cannot change when a run is resumed: it was {was!r}, got {now!r}; "
                f"only {', '.join(CHANGEABLE)} can"
            )
    begun = run.has_trained()
    state = run.state() if begun else None
    dataset = prepare(config)
    trainer = Trainer(located(config), dataset)
    if state is not None:
        trainer.restore(state)
        if dataset.vocabulary != run.vocabulary():
            raise InputError(f"{run.vocabulary_file} is not the vocabulary of the text this run began with")
    if trainer.step >= trainer.total and (config.steps, config.epochs) != (old.steps, old.epochs):
        name = "epochs" if config.steps is None else "steps"
        raise InputError(
            f"already at step {trainer.step}; give more {name}: got {name}={getattr(config, name)}"
            + (f", {trainer.total} steps" if name == "epochs" else "")
        )
    if state is None:
        run.create(trainer.config, dataset.vocabulary)
        run.save(_state(trainer), config.keep)
    else:
        generators.restore(state.get("generators", {}))
        run.tidy(trainer.step, config.keep)
        run.rewind(trainer.step)
        run.publish(state)  # a run killed between its last checkpoint and its weights has no other occasion
        if trainer.config != old:
            run.write_config(trainer.config.to_toml())
    return trainer


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
                state = _state(trainer)
                with processes.together():
                    if processes.first:
                        run.save(state, config.keep)
            if signal:
                break
    return None if trainer.finished else signal


def _state(trainer: Trainer) -> dict[str, Any]:
    """All of a checkpoint: what the trainer holds, and the generators that it has no part in."""
    return {**trainer.state(), "generators": generators.state()}


def located(config: Config) -> Config:
    """The text's place made absolute, so that the run can be resumed from another directory."""
    return config if config.text is None else config.override(text=str(Path(config.text).absolute()))
