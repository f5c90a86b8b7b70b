"""A run from its beginning or its last checkpoint to its end: the loop, with its directory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any, overload

from ..flow import Finding
from .config import FILES, Config
from .errors import InputError, NonFiniteError
from .interrupt import StopRequest
from .loop import Trainer
from .records import Record, Step
from .rundir import RunDirectory
from .runs import changed
from .tasks import Task, prepare

__all__ = ["fit", "located", "postponed", "resume", "start"]

_waiting: ContextVar[list[tuple[RunDirectory, Callable[[], None]]] | None] = ContextVar("_waiting", default=None)
"""The directories that wait inside `postponed`, each with what writes to it."""


def start(
    config: Config, path: Path, *, overwrite: bool = False, task: Task | None = None
) -> tuple[Trainer, RunDirectory]:
    """A new run in a directory. Everything is checked before the directory is touched; step 0 is saved at once.

    task: data that are read already; None: what the configuration names is read.

    This process then is the only one that may write there, until `fit` or the process ends. An earlier run that is to
    be overwritten stays as it was until step 0 of the new one is saved, whatever fails before.

    Raises InputError for data, an option or a directory that cannot be used.
    """
    run = RunDirectory.vacant(path, overwrite)
    trainer = Trainer(located(config), prepare(config) if task is None else task)
    run.occupy(overwrite)
    _write(run, partial(run.begin, trainer.config, trainer.task.stored, trainer.state(), config.keep))
    return trainer, run


def resume(path: Path, *, task: Task | None = None, **changes: Any) -> tuple[Trainer, RunDirectory]:
    """The run in a directory, at its last checkpoint. changes: options out of `runs.CHANGEABLE`. task: as for `start`.

    A damaged checkpoint is passed over for the one before it, which is logged. This process then is the only one that
    may write there, until `fit` or the process ends.

    Raises InputError, the directory untouched, for a change it cannot take (fewer steps than it has had among them),
    and where another live process has the directory.
    """
    run = RunDirectory.open(path)
    run.acquire()
    try:
        run.settle()
        trainer, write = _resume(run, changes, task)
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


def _resume(run: RunDirectory, changes: dict[str, Any], task: Task | None) -> tuple[Trainer, Callable[[], None]]:
    """The trainer, and what writes to the directory that the run goes on."""
    old = run.config()
    config = changed(old, changes)
    state = run.state()
    task = prepare(config) if task is None else task
    trainer = Trainer(located(config), task)
    trainer.restore(state)
    if task.stored != run.stored():
        raise InputError(f"{run.stored_file} is not the {task.what} of the {task.data} this run began with")
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


@overload
def fit(
    subject: Trainer,
    where: RunDirectory,
    *,
    on_step: Callable[[Step], None] = ...,
    on_record: Callable[[Record], None] = ...,
    on_finding: Callable[[int, Finding], None] = ...,
) -> int | None: ...


@overload
def fit(
    subject: Task,
    where: Config,
    *,
    out: Path | str | None = ...,
    overwrite: bool = ...,
    on_step: Callable[[Step], None] = ...,
    on_record: Callable[[Record], None] = ...,
    on_finding: Callable[[int, Finding], None] = ...,
) -> Trainer: ...


def fit(
    subject: Trainer | Task,
    where: RunDirectory | Config,
    *,
    out: Path | str | None = None,
    overwrite: bool = False,
    on_step: Callable[[Step], None] = lambda step: None,
    on_record: Callable[[Record], None] = lambda record: None,
    on_finding: Callable[[int, Finding], None] = lambda step, finding: None,
) -> Trainer | int | None:
    """Train to the end: `fit(task, config)`, or `fit(trainer, run)` for what `start` and `resume` open.

    on_step, on_record, on_finding: called with each step, with what is logged, and with what the doctor finds and its
    step.

    Of a task and its options it makes a trainer, trains it and returns it; out: the run directory, for what a run
    leaves; None: nothing is written. overwrite: whether a run that is there is replaced.

    A trainer's directory is this process's alone meanwhile, and given up at the end, whatever the end is. It returns
    None, or the number of the signal (SIGINT, SIGTERM) after which it saved and stopped. Of several processes that
    train together all call this, and only the first touches the directory.

    Raises NonFiniteError, the last checkpoint kept; InputError where another process has the directory, and for a task
    that is not the one of the options; TypeError for anything else.

    >>> from bptt.train import Config, fit, prepare
    >>> config = Config(cell="gru", hidden=8, limit=2000, batch=4, steps=3)
    >>> fit(prepare(config), config, on_step=lambda step: print(step.step)).step
    1
    2
    3
    3
    """
    told = on_step, on_record, on_finding
    if isinstance(subject, Trainer) and isinstance(where, RunDirectory):
        if out is not None or overwrite:
            raise TypeError("a trainer has its run directory: leave out `out` and `overwrite`")
        return _fit(subject, where, *told)
    if isinstance(subject, Trainer) or not isinstance(where, Config):
        raise TypeError(
            "fit takes a task and a Config, or a Trainer and its RunDirectory: "
            f"got {type(subject).__name__} and {type(where).__name__}"
        )
    if subject.name != where.task:
        raise InputError(f"the options are for task={where.task}: got the task {subject.name}")
    if out is None:
        trainer = Trainer(where, subject)
        _fit(trainer, None, *told)
    else:
        trainer, run = start(where, Path(out), overwrite=overwrite, task=subject)
        _fit(trainer, run, *told)
    return trainer


def _fit(
    trainer: Trainer,
    run: RunDirectory | None,
    on_step: Callable[[Step], None],
    on_record: Callable[[Record], None],
    on_finding: Callable[[int, Finding], None],
) -> int | None:
    """Train to the end, logging and saving on the way where there is a directory."""
    config, processes = trainer.config, trainer.processes

    def note(step: int, tell: Callable[[int, Finding], None] = on_finding) -> None:
        for finding in trainer.take_findings():
            if run is not None and processes.first:
                run.append_finding(step, finding)
            tell(step, finding)

    held = run.held() if run is not None and processes.first else nullcontext()
    with held, StopRequest() as request:
        while not trainer.finished:
            try:
                step = trainer.advance()
            except NonFiniteError as error:
                note(trainer.step + 1, tell=lambda step, finding: None)  # the error says it
                kept = "" if run is None else f" (the last checkpoint in {run.path} is kept)"
                raise NonFiniteError(f"{error}{kept}") from error
            on_step(step)
            note(step.step)
            measure = trainer.finished or step.step % config.eval_every == 0
            if measure or step.step % config.log_every == 0:
                record = trainer.record(heldout=measure)
                note(step.step)
                with processes.together():
                    if run is not None and processes.first:
                        run.append(record)
                on_record(record)
            signal = processes.largest(request.signal or 0)  # all stop at the same step
            if run is not None and (trainer.finished or signal or step.step % config.save_every == 0):
                state = trainer.state()
                with processes.together():
                    if processes.first:
                        run.save(state, config.keep)
            if signal:
                break
    return None if trainer.finished else signal


def located(config: Config) -> Config:
    """The data's place made absolute, so that the run can be resumed from another directory."""
    places = {name: getattr(config, name) for name in FILES}
    given = {name: str(Path(place).absolute()) for name, place in places.items() if place is not None}
    return config.override(**given) if given else config
