"""What the tasks over long streams share: which of a stream's windows is measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..batches import Batches
from ..config import Config
from ..errors import InputError
from ..options import LANES
from .task import Task

__all__ = ["inspected"]


def inspected(
    config: Config,
    steps: int | None,
    lanes: int | None,
    windows_of: Callable[[int, int], Batches],
    there: int,
    task: Task,
    carries: bool,
) -> list[Any]:
    """The window to measure, after the one whose state it starts from where that is carried and there is room.

    windows_of: the windows in order, from lanes and steps. there: how many `task.units` they are of.
    """
    steps = config.seq_length if steps is None else steps
    lanes = min(LANES, config.batch) if lanes is None else lanes
    if steps < 1 or lanes < 1:
        raise InputError(f"steps and lanes must be at least 1: got steps={steps} and lanes={lanes}")
    if there < steps * lanes + 1:
        raise InputError(
            f"the {task.data} to measure on is too short: {there} {task.units}, of which {lanes} lanes of {steps} "
            f"steps need {steps * lanes + 1}; give fewer --steps or --lanes"
        )
    windows = windows_of(lanes, steps)
    if not carries or there < 2 * steps * lanes + 1 or windows.windows(0) < 2:
        return [windows.window(0, 0)]
    return [windows.window(0, 0), windows.window(0, 1)]
