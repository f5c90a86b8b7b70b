"""Pictures as files, and those that a task makes of what was measured at the end of a training."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..train import atomic

if TYPE_CHECKING:
    from ..train.tasks import Task

__all__ = ["write_picture", "write_pictures"]


def write_picture(figure: Any, path: Path) -> Path:
    """Write a figure of matplotlib's as PNG, whole or not at all. Returns the path. Raises OSError, which names it."""
    content = BytesIO()
    figure.savefig(content, format="png")
    atomic.write(path, content.getbuffer())
    return path


def write_pictures(task: Task, counts: list[float], directory: Path) -> Iterator[Path]:
    """Write them as PNG, and yield where; none where nothing was measured, and without matplotlib."""
    if counts and importlib.util.find_spec("matplotlib") is not None:
        for name, figure in task.pictures(counts):
            yield write_picture(figure, directory / f"{name}.png")
