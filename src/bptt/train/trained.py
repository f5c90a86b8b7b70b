"""The network of a run, ready for use."""

from __future__ import annotations

from typing import Any

from .config import Config
from .errors import InputError
from .model import Network
from .network import build_model
from .rundir import RunDirectory
from .runs import options_of
from .tasks import TASKS

__all__ = ["load"]


def load(run: RunDirectory, device: str = "cpu", task: str | None = None) -> tuple[Any, Any, Config]:
    """(its network in eval mode, what it keeps of its data, its options).

    task: the only one that will do. Raises InputError for a run of another, and for files that do not belong together.
    """
    config = options_of(run.path, *([] if task is None else [task])).override(device=device)
    stored = run.stored()
    model: Network = build_model(config, stored)
    try:
        model.load_state_dict(run.weights(stored))
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        what = TASKS[config.task].what
        raise InputError(f"{run.weights_file} does not fit its configuration and {what}: {reason}") from None
    return model.eval(), stored, config
