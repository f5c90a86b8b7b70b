"""A trained network under measurement: one window of its text, recorded for `bptt.flow`."""

from __future__ import annotations

import torch

from ..flow import Recording
from .config import LANES
from .corpus import DEFAULT
from .dataset import in_order, prepare, token_count
from .errors import InputError
from .loop import Trainer
from .model import record_window
from .rundir import RunDirectory
from .sampling import load

__all__ = ["record_next", "record_run", "record_text"]

UNITS = {"char": "characters", "word": "words"}
"""What a text is counted in, by what a token is."""


def record_run(run: RunDirectory, steps: int | None = None, lanes: int | None = None, device: str = "cpu") -> Recording:
    """A window of the run's held-out text (of its training text, if none is held out), read by its last checkpoint.

    steps: default the run's `seq_length`. lanes: default 8, or the run's `batch` if that is less. Where the run carries
    its state, and the text is long enough, the state comes from the window before.

    Raises InputError for a text too short for a window, and for files that do not belong together.
    """
    return record_text(run, steps, lanes, device)[0]


def record_text(
    run: RunDirectory, steps: int | None = None, lanes: int | None = None, device: str = "cpu"
) -> tuple[Recording, str]:
    """(what `record_run` gives, what it was measured on in words)."""
    model, vocabulary, config = load(run, device)
    dataset = prepare(config)
    if dataset.vocabulary != vocabulary:
        raise InputError(f"{run.vocabulary_file} is not the vocabulary of the text this run began with")
    part = dataset.train if dataset.heldout is None else dataset.heldout
    tokens = token_count(part)
    steps = config.seq_length if steps is None else steps
    lanes = min(LANES, config.batch) if lanes is None else lanes
    if steps < 1 or lanes < 1:
        raise InputError(f"steps and lanes must be at least 1: got steps={steps} and lanes={lanes}")
    if tokens < steps * lanes + 1:
        raise InputError(
            f"the text to measure on is too short: {tokens} tokens, of which {lanes} lanes of {steps} steps need "
            f"{steps * lanes + 1}; give fewer --steps or --lanes"
        )
    which = "text" if dataset.heldout is None else "held-out part"
    said = f"{config.corpus or config.text or DEFAULT}, its {which} of {tokens:,} {UNITS[config.tokens]}"
    windows = in_order(part, lanes, steps)
    first = windows.window(0, 0)
    if config.batching != "sequential" or tokens < 2 * steps * lanes + 1 or windows.windows(0) < 2:
        return record_window(model, first, None), said
    with torch.no_grad():
        _, state = model(first.inputs.to(device), None, None if first.resets is None else first.resets.to(device))
    return record_window(model, windows.window(0, 1), state), said


def record_next(trainer: Trainer) -> Recording:
    """The window a trainer comes to next, from the state it carries, without dropout. Training goes on as it would."""
    window = trainer.batches.window(trainer.epoch, trainer.index)
    trainer.model.eval()
    return record_window(trainer.model, window, None if window.fresh else trainer.carry)
