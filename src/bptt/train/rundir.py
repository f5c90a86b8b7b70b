"""The run directory: what a training run leaves on disk.

config.toml           every option
vocabulary.json       tokens by index, with their counts in the training text
metrics.jsonl         one JSON object per record
findings.jsonl        one per finding of the doctor, with its step; not there where nothing was found
state.pt              all that resuming needs, weights included: the one file a resumed run trusts
weights.safetensors   the weights for everybody else, written after state.pt
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..flow import Finding
from . import atomic
from .config import Config
from .corpus import read_file
from .errors import InputError, NonFiniteError
from .extras import require
from .records import Record
from .vocabulary import Vocabulary

__all__ = ["RunDirectory"]

FORMAT = 1
"""Of state.pt; a larger number is from a newer version and is refused."""


class RunDirectory:
    """One run's files. `create` makes a new one, `open` an existing one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.toml"
        self.vocabulary_file = path / "vocabulary.json"
        self.metrics_file = path / "metrics.jsonl"
        self.findings_file = path / "findings.jsonl"
        self.state_file = path / "state.pt"
        self.weights_file = path / "weights.safetensors"

    @classmethod
    def vacant(cls, path: Path, overwrite: bool) -> RunDirectory:
        """A place for a new run; nothing is written yet.

        Raises InputError where something else already lies. With `overwrite`, an earlier run may.
        """
        run = cls(path)
        if path.exists() and not path.is_dir():
            raise InputError(f"out {path} is a file: give a directory")
        if path.is_dir() and any(path.iterdir()):
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

    def create(self, config: Config, vocabulary: Vocabulary) -> None:
        """Begin a run here; an earlier run's files go."""
        config_text = config.to_toml()
        self.path.mkdir(parents=True, exist_ok=True)
        for file in (self.state_file, self.weights_file, self.metrics_file, self.findings_file):
            file.unlink(missing_ok=True)
        self.write_config(config_text)
        atomic.write(self.vocabulary_file, vocabulary.to_json().encode())

    def discard(self) -> None:
        """Remove the run's files, and the directory if nothing else is in it."""
        logs = (self.metrics_file, self.findings_file)
        for file in (self.config_file, self.vocabulary_file, *logs, self.state_file, self.weights_file):
            file.unlink(missing_ok=True)
        if self.path.is_dir() and not any(self.path.iterdir()):
            self.path.rmdir()

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
        """Drop what was logged behind `step`: the resumed run writes it again."""
        for file, entries in ((self.metrics_file, self.metrics()), (self.findings_file, self.findings())):
            if file.exists() or file == self.metrics_file:
                kept = [json.dumps(entry) + "\n" for entry in entries if entry["step"] <= step]
                atomic.write(file, "".join(kept).encode())

    def save(self, state: dict[str, Any]) -> None:
        """Write a checkpoint. Raises NonFiniteError, the old one kept, when a weight is not finite."""
        weights: dict[str, Tensor] = state["model"]
        if bad := [name for name, weight in weights.items() if not bool(torch.isfinite(weight).all())]:
            raise NonFiniteError(f"weight {bad[0]} is not finite: the last checkpoint is kept")
        if (
            self.metrics_file.exists()
        ):  # records up to this step reach the disk before the checkpoint that counts on them
            with self.metrics_file.open("rb+") as file:
                os.fsync(file.fileno())
        buffer = io.BytesIO()
        torch.save({"format": FORMAT, **state}, buffer)
        atomic.write(self.state_file, buffer.getvalue())
        flat = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
        metadata = {"step": str(state["position"]["step"])}
        atomic.write(self.weights_file, require("safetensors.torch", "cli").save(flat, metadata=metadata))

    def state(self) -> dict[str, Any]:
        """The last checkpoint. Raises InputError where there is none that can be read."""
        if not self.state_file.exists():
            raise InputError(f"{self.path} has no checkpoint: it lacks {self.state_file.name}")
        try:
            state: dict[str, Any] = torch.load(self.state_file, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"{self.state_file} cannot be read: {reason}") from None
        if not isinstance(state, dict) or not isinstance(state.get("format"), int):
            raise InputError(f"{self.state_file} is not a checkpoint of bptt train")
        if state["format"] > FORMAT:
            raise InputError(f"{self.state_file} has format {state['format']}, newer than {FORMAT}: upgrade bptt")
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
