"""The options of a run, which task it must be of, and what of them may change: all that needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from .config import FILES, Config
from .corpus import read_file
from .errors import InputError
from .found import CONFIG, found_run
from .options import USES

__all__ = ["CHANGEABLE", "changed", "options_of"]

CHANGEABLE = (
    *("steps", "epochs", "threads", "device", "log_every", "eval_every", "save_every", "keep", *FILES, "corpus"),
    *("on_nonfinite", "patience"),
)
"""Options that may change when a run is resumed; the others would make it another run."""


def options_of(run: Path, *tasks: str) -> Config:
    """The options of the run in a directory. tasks: the only ones that will do; none: all.

    Raises InputError for a directory that is no run's, and for a run of another task, with what it is good for.
    """
    found_run(run)
    config = Config.from_toml(read_file(run / CONFIG, "configuration"), str(run / CONFIG))
    if tasks and config.task not in tasks:
        raise InputError(
            f"{run} must be a run with task={' or '.join(tasks)}: got task={config.task}; "
            + USES[config.task].format(run=run)
        )
    return config


def changed(old: Config, changes: Mapping[str, Any]) -> Config:
    """The options of a run that goes on with some of them changed. Raises InputError for one out of `CHANGEABLE`."""
    config = old.override(**changes)
    for entry in fields(Config):
        was, now = getattr(old, entry.name), getattr(config, entry.name)
        if was != now and entry.name not in CHANGEABLE:
            raise InputError(
                f"{entry.name} cannot change when a run is resumed: it was {was!r}, got {now!r}; "
                f"only {', '.join(CHANGEABLE)} can"
            )
    return config
