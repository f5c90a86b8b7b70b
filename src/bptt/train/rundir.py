"""The run directory: what a training run leaves on disk.

config.toml           every option
vocabulary.json       tokens by index, with their counts in the training text
metrics.jsonl         one JSON object per record
findings.jsonl        one per finding of the doctor, with its step; not there where nothing was found
checkpoints/          all that resuming needs, weights included, a file for each of the last steps saved
weights.safetensors   the weights for everybody else, written after the checkpoint
run.lock              while a process trains here, or where one was killed: its number and host
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..flow import Finding
from . import atomic, checkpoints, lock
from .config import Config
from .corpus import read_file
from .errors import InputError, NonFiniteError
from .extras import require
from .records import Record
from .vocabulary import Vocabulary

__all__ = ["RunDirectory"]

LOG = logging.getLogger(__name__)


class RunDirectory:
    """One run's files. `create` makes a new one, `open` an existing one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.toml"
        self.vocabulary_file = path / "vocabulary.json"
        self.metrics_file = path / "metrics.jsonl"
        self.findings_file = path / "findings.jsonl"
        self.checkpoints = path / "checkpoints"
        self.old_state_file = path / "state.pt"  # of version 0.1
        self.weights_file = path / "weights.safetensors"

    @classmethod
    def vacant(cls, path: Path, overwrite: bool) -> RunDirectory:
        """A place for a new run; nothing is written yet.

        Raises InputError where something else already lies. With `overwrite`, an earlier run may.
        """
        run = cls(path)
        if path.exists() and not path.is_dir():
            raise InputError(f"out {path} is a file: give a directory")
        if path.is_dir() and any(not _left_over(file) for file in path.iterdir()):
            if not run.config_file.exists():
                raise InputError(f"out {path} is not empty and not a run directory: give another")
            if not overwrite:
                raise InputError(f"out {path} holds a run: give --resume {path}, --overwrite, or another --out")
        return run

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """The run in a directory. Raises InputError where there is none."""
        run = cls(path)
        if not run.config_file.is_file():
            raise InputError(f"{path} is not a run directory: it has no {run.config_file.name}")
        return run

    def acquire(self) -> None:
        """Make this process the one that writes here, until `release` or its end.

        Raises InputError where another live process is. Readers need no lock: files are replaced whole.
        """
        lock.acquire(self.path)

    def release(self) -> None:
        """Let other processes write here."""
        lock.release(self.path)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside `with`, this process is the one that writes here; at its end others may."""
        self.acquire()
        try:
            yield
        finally:
            self.release()

    def create(self, config: Config, vocabulary: Vocabulary) -> None:
        """Begin a run here; an earlier run's files go, its configuration last."""
        config_text = config.to_toml()
        self.path.mkdir(parents=True, exist_ok=True)
        self._clear()
        self.write_config(config_text)
        atomic.write(self.vocabulary_file, vocabulary.to_json().encode())
        self.checkpoints.mkdir(exist_ok=True)
        atomic.flush_directory(self.path)

    def discard(self) -> None:
        """Remove the run's files, and the directory if nothing else is in it."""
        self._clear()
        for file in (self.config_file, self.vocabulary_file):
            file.unlink(missing_ok=True)
        self.release()
        if self.path.is_dir() and not any(self.path.iterdir()):
            self.path.rmdir()

    def _clear(self) -> None:
        """Remove what training wrote."""
        self.sweep()
        states = (self.old_state_file, *checkpoints.listing(self.checkpoints))
        for file in (*states, self.weights_file, self.metrics_file, self.findings_file):
            file.unlink(missing_ok=True)
        if self.checkpoints.is_dir() and not any(self.checkpoints.iterdir()):
            self.checkpoints.rmdir()

    def tidy(self, step: int, keep: int) -> None:
        """Do what a process killed at its work, or a disk that failed, left undone at `step`."""
        self.sweep()
        checkpoints.prune(self.checkpoints, step, keep)

    def sweep(self) -> None:
        """Remove half-written files that a killed process left."""
        for folder in (self.path, self.checkpoints):
            atomic.sweep(folder)

    def write_config(self, text: str) -> None:
        """Replace the configuration."""
        atomic.write(self.config_file, text.encode())

    def config(self) -> Config:
        """The run's options."""
        return Config.from_toml(read_file(self.config_file, "configuration"), str(self.config_file))

    def vocabulary(self) -> Vocabulary:
        """The run's vocabulary."""
        return Vocabulary.from_json(read_file(self.vocabulary_file, "vocabulary"))

    def append(self, record: Record) -> None:
        """Add one line to the metrics."""
        _append(self.metrics_file, asdict(record))

    def append_finding(self, step: int, finding: Finding) -> None:
        """Add one line to the findings. A value that JSON has no number for is written as text: "nan", "inf"."""
        value = finding.value
        written = value if value is None or math.isfinite(value) else str(value)
        _append(self.findings_file, {**asdict(finding), "value": written, "t": finding.step, "step": step})

    def metrics(self) -> list[dict[str, Any]]:
        """The records so far; a last line cut short by a crash is left out."""
        return _lines(self.metrics_file, "metrics")

    def findings(self) -> list[dict[str, Any]]:
        """What the doctor found so far, likewise. step: of the training; t: in the window."""
        return _lines(self.findings_file, "findings")

    def rewind(self, step: int) -> None:
        """Drop what was logged behind `step`: the resumed run writes it again.

        A line that cannot be read, as a loss of power may leave, ends what is kept; that is logged.
        """
        for file in (self.metrics_file, self.findings_file):
            if not file.exists() and file != self.metrics_file:
                continue
            kept: list[bytes] = []
            lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
            for number, line in enumerate(lines, start=1):
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line + b"\n")
                except (ValueError, KeyError, TypeError):
                    LOG.warning("%s: line %d cannot be read; it and what follows it is dropped", file, number)
                    break
            atomic.write(file, *kept)

    def save(self, state: dict[str, Any], keep: int = 3) -> None:
        """Write a checkpoint, of which the last `keep` stay, then the weights.

        Raises NonFiniteError, the old ones kept, when a weight is not finite; OSError, likewise, when the disk is full.
        """
        weights: dict[str, Tensor] = state["model"]
        if bad := [name for name, weight in weights.items() if not bool(torch.isfinite(weight).all())]:
            raise NonFiniteError(f"weight {bad[0]} is not finite: the last checkpoint is kept")
        for file in (self.metrics_file, self.findings_file):  # on disk before the checkpoint that counts on them
            if file.exists():
                with file.open("rb+") as opened:
                    os.fsync(opened.fileno())
        self.checkpoints.mkdir(exist_ok=True)
        atomic.flush_directory(self.path)
        checkpoints.save(self.checkpoints, state, keep)
        self.old_state_file.unlink(missing_ok=True)
        self.publish(state)

    def publish(self, state: dict[str, Any]) -> None:
        """Make weights.safetensors those of a state; the file is left alone where it holds them already."""
        weights: dict[str, Tensor] = state["model"]
        flat = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
        metadata = {"step": str(state["position"]["step"])}
        data: bytes = require("safetensors.torch", "cli").save(flat, metadata=metadata)
        if not self.weights_file.is_file() or self.weights_file.read_bytes() != data:
            atomic.write(self.weights_file, data)

    def has_trained(self) -> bool:
        """Whether there is anything of training here, readable or not: a checkpoint, weights, records."""
        files = (self.old_state_file, self.weights_file, self.metrics_file)
        return bool(checkpoints.listing(self.checkpoints)) or any(file.exists() for file in files)

    def state(self) -> dict[str, Any]:
        """The last checkpoint that is whole; damaged ones passed over are logged (`checkpoints.latest`).

        Raises InputError where there is none that can be read.
        """
        state = checkpoints.latest(self.checkpoints)
        if state is None and self.old_state_file.exists():
            state = checkpoints.read_plain(self.old_state_file)
        if state is None:
            raise InputError(f"{self.path} has no checkpoint: begin it again with --overwrite")
        return state

    def weights(self) -> dict[str, Tensor]:
        """The weights of the last checkpoint. Raises InputError where there are none that can be read."""
        safetensors = require("safetensors", "cli")
        if not self.weights_file.exists():
            raise InputError(f"{self.path} has no weights: it lacks {self.weights_file.name}")
        try:
            weights: dict[str, Tensor] = require("safetensors.torch", "cli").load_file(self.weights_file)
        except safetensors.SafetensorError as error:
            raise InputError(f"{self.weights_file} cannot be read: {error}") from None
        return weights


def _left_over(path: Path) -> bool:
    """Whether a process killed before it began has left this."""
    return path.name == lock.NAME or path.name.endswith(atomic.SUFFIX)


def _append(file: Path, entry: dict[str, Any]) -> None:
    with file.open("a", encoding="utf-8") as opened:
        opened.write(json.dumps(entry) + "\n")


def _lines(file: Path, what: str) -> list[dict[str, Any]]:
    """The entries of a log; a last line cut short is left out."""
    if not file.exists():
        return []
    lines = read_file(file, what).split("\n")
    try:
        return [json.loads(line) for line in lines[:-1]]
    except ValueError as error:
        raise InputError(f"{file} has a line that is not JSON: {error}") from None
