"""A trained network under measurement: one window of its data, recorded for `bptt.flow`."""

from __future__ import annotations

import torch

from ..flow import Recording, Scanned
from ..flow.language import say
from ..nn import Recurrent
from .errors import InputError
from .loop import Trainer
from .rundir import RunDirectory
from .tasks import prepare, record_window
from .trained import load

__all__ = ["record_data", "record_next", "record_run"]


def record_run(
    run: RunDirectory, steps: int | None = None, lanes: int | None = None, device: str = "cpu"
) -> Recording | Scanned:
    """A window of the run's held-out data (of its training data, if none are held out), read by its last checkpoint.

    steps: default the run's `seq_length`. lanes: default 8, or the run's `batch` if that is less. Where the run carries
    its state, and the text is long enough, the state comes from the window before. Of a cell that `bptt.scan` runs it
    is the scan of its layers.

    Raises InputError for a text too short for a window, and for files that do not belong together.
    """
    return record_data(run, steps, lanes, device)[0]


def record_data(
    run: RunDirectory, steps: int | None = None, lanes: int | None = None, device: str = "cpu"
) -> tuple[Recording | Scanned, str]:
    """(what `record_run` gives, what it was measured on in words)."""
    model, stored, config = load(run, device)
    task = prepare(config)
    if task.stored != stored:
        raise InputError(f"{run.stored_file} is not the {task.what} of the {task.data} this run began with")
    (*before, window), said = task.inspected(config, steps, lanes)
    state = None
    with torch.no_grad():
        for earlier in before:
            _, state = model(*task.arguments(earlier, state, next(model.parameters())))
    if isinstance(model.recurrent, Recurrent) and model.recurrent.bidirectional:
        one = model.recurrent.num_layers == 1
        text = "; of its two directions the forward one"
        said += say(text if one else "; of its top layer's two directions the forward one")
    return record_window(task, model, window, state), said


def record_next(trainer: Trainer) -> Recording | Scanned:
    """The window a trainer comes to next, from the state it carries, without dropout. Training goes on as it would."""
    window = trainer.batches.window(trainer.epoch, trainer.index)
    trainer.model.eval()
    return record_window(trainer.task, trainer.model, window, None if window.fresh else trainer.carry)
