"""The network of a run, ready for use."""

from __future__ import annotations

from typing import Any

from .config import Config
from .errors import InputError
from .model import Network
from .network import build_model
from .rundir import RunDirectory
from .tasks import TASKS

__all__ = ["load", "uses"]


def load(run: RunDirectory, device: str = "cpu", task: str | None = None) -> tuple[Any, Any, Config]:
    """(its network in eval mode, what it keeps of its data, its options).

    task: the only one that will do. Raises InputError for a run of another, and for files that do not belong together.
    """
    config = run.config().override(device=device)
    if task not in (None, config.task):
        raise InputError(f"{run.path} must be a run with task={task}: got task={config.task}; {uses(run)}")
    stored = run.stored()
    model: Network = build_model(config, stored)
    try:
        model.load_state_dict(run.weights(stored))
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        what = TASKS[config.task].what
        raise InputError(f"{run.weights_file} does not fit its configuration and {what}: {reason}") from None
    return model.eval(), stored, config


def uses(run: RunDirectory) -> str:
    """What a run's network is good for, with the command."""
    return run.task.use.format(run=run.path)
