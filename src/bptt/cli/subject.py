"""What `bptt flow` and `bptt compare` measure: the network of a run, or a fresh layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..flow import Recording, Scanned, record, record_scan
from ..flow.language import say
from ..nn import init
from ..train import InputError, RunDirectory
from ..train.config import Config
from ..train.inspection import record_data
from ..train.options import LANES, has_kernels
from ..train.recurrence import recurrent_layers
from .subject_options import check_subject

__all__ = ["Subject", "subject"]

FRESH_STEPS = 100


@dataclass(frozen=True, eq=False)
class Subject:
    """What is measured.

    name: for titles. directory: where results go unless said otherwise. records: of the run's training, if it is one.
    data, seed: what it is measured on, and what that was drawn with, in words. notes: what the verdict is to say of the
    way it is measured.
    """

    recording: Recording | Scanned
    name: str
    directory: Path
    records: list[dict[str, Any]]
    data: str
    seed: str
    notes: tuple[str, ...] = ()

    def with_note(self, note: str) -> Subject:
        """The same with one more note."""
        return replace(self, notes=(*self.notes, note))


def subject(run: Path | None, steps: int | None, lanes: int | None, **fresh: Any) -> Subject:
    """A run's network on its own data, or a fresh layer on noise. fresh: cell, hidden, layers, nonlinearity, radius,
    seed, each None where it was not given.

    Raises InputError for both or neither, and for values that no layer can have.
    """
    check_subject(run, steps, lanes, **fresh)
    if run is not None:
        directory = RunDirectory.open(run)
        try:
            recording, data = record_data(directory, steps, lanes)
        except (ValueError, NotImplementedError) as error:  # a net that cannot be measured
            raise InputError(str(error)) from None
        config = directory.config()
        name, seed = f"{run.name}: {_described(config)}", say("{seed}, the run's", seed=config.seed)
        return Subject(recording, name, run / "flow", directory.metrics(), data, seed)
    return _fresh(steps, lanes, **{name: value for name, value in fresh.items() if value is not None})


def _described(config: Config) -> str:
    layers = say("{count} layers of ", count=config.layers) if config.layers > 1 else ""
    text = "{cell}, {layers}{units} units, trained with gradient={policy}"
    return say(text, cell=config.cell, layers=layers, units=config.hidden, policy=config.gradient)


def _fresh(
    steps: int | None,
    lanes: int | None,
    cell: str,
    hidden: int = 64,
    layers: int = 1,
    nonlinearity: str | None = None,
    radius: float | None = None,
    seed: int = 0,
) -> Subject:
    """A layer as torch draws it, on normal input, with errors of norm 1 in random directions."""
    T, B = FRESH_STEPS if steps is None else steps, LANES if lanes is None else lanes
    cell = Config.check("cell", cell)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = recurrent_layers(cell, hidden, hidden, layers=layers, nonlinearity=nonlinearity)
        try:
            if radius is not None:
                init.radius_(layer, radius)
        except ValueError as error:
            raise InputError(str(error)) from None
        noise = torch.randn(T, B, hidden)
        recording = record(layer, noise) if has_kernels(cell) else record_scan(layer, noise)
    scaled = "" if radius is None else say(", spectral radius {radius}", radius=f"{radius:g}")
    kind = cell if nonlinearity is None else f"{cell} ({nonlinearity})"
    stacked = say("{count} layers of ", count=layers) if layers > 1 else ""
    name = say("fresh {cell}, {layers}{units} units{radius}", cell=kind, layers=stacked, units=hidden, radius=scaled)
    drawn = say("{seed}, of weights and input", seed=seed)
    return Subject(recording, name, Path("flow"), [], say("normal noise as input"), drawn)
