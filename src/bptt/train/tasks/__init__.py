"""What can be learned: the tasks, by the name that `Config.task` has."""

from __future__ import annotations

from ..config import Config
from .classification import Classification as Classification
from .series import Series as Series
from .task import Task as Task
from .task import record_window as record_window
from .text import Text as Text

__all__ = ["TASKS", "Classification", "Series", "Task", "Text", "prepare", "record_window", "task_of"]

TASKS: dict[str, type[Task]] = {"text": Text, "series": Series, "classify": Classification}
"""Every task there is: the one registry."""


def task_of(config: Config) -> type[Task]:
    """The task that a configuration is for."""
    return TASKS[config.task]


def prepare(config: Config) -> Task:
    """Read, split and number the data of a configuration.

    Raises InputError when they are missing, cannot be read, or are too few for one batch.
    """
    return task_of(config).prepare(config)
