"""The pictures that a task makes of what was measured at the end of a training, or of a prediction."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

from ..train.tasks import Task

__all__ = ["write_pictures"]


def write_pictures(task: Task, counts: list[float], directory: Path) -> Iterator[Path]:
    """Write them as PNG, and yield where; none where nothing was measured, and without matplotlib."""
    if counts and importlib.util.find_spec("matplotlib") is not None:
        for name, figure in task.pictures(counts):
            figure.savefig(directory / f"{name}.png")
            yield directory / f"{name}.png"
