"""A run of several processes that torchrun started: the first opens it, the others follow; restarts find it again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from .config import Config
from .loop import Trainer
from .processes import Processes
from .rundir import RunDirectory
from .session import located, postponed, resume, start
from .tasks import prepare

__all__ = ["begin", "start_or_resume"]


def begin(processes: Processes, opening: Callable[[], tuple[Trainer, RunDirectory]]) -> tuple[Trainer, RunDirectory]:
    """Open a run for all processes, which then `fit` it together.

    opening: `start` or `resume` with their arguments; called by the first process alone, so that no other needs the run
    directory. All need the data. It is written to once every process is ready.

    Raises what `opening` raises; InputError for data that are not the first one's, or options for fewer processes;
    ElsewhereError on the processes that are not to blame.
    """
    opened = None
    with postponed() as write:
        with processes.together():
            if processes.first:
                opened = opening()
                processes.check(opened[0].config)
        if processes.world > 1 or opened is None:
            opened = _all_ready(processes, opened)
        with processes.together():
            write()
    return opened


def _all_ready(processes: Processes, opened: tuple[Trainer, RunDirectory] | None) -> tuple[Trainer, RunDirectory]:
    """What the first process opened, on every process."""
    whole = None if opened is None else (asdict(opened[0].config), str(opened[1].path), opened[0].state())
    options, path, state = processes.of_first(whole)
    with processes.together():
        if opened is None:
            config = Config(**options)
            processes.take_device(config)
            opened = Trainer(config, prepare(config)), RunDirectory(Path(path))
    trainer, run = opened
    trainer.join(processes)
    with processes.together():
        if not processes.first:
            trainer.restore(state)
    return trainer, run


def start_or_resume(
    processes: Processes, config: Config, path: Path, *, overwrite: bool = False
) -> tuple[Trainer, RunDirectory]:
    """`start`; but `resume`, where torchrun has started the processes again and `path` holds the very run.

    Raises what these raise: InputError, where the directory holds another run and overwrite is False.
    """
    processes.check(config)
    run = RunDirectory(path)
    if processes.restarted and run.config_file.is_file() and run.config() == located(config):
        return resume(path)
    return start(config, path, overwrite=overwrite)
