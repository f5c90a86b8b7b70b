"""The run directory: what a training run leaves on disk.

config.toml           every option
vocabulary.json       of a text: tokens by index, with their counts in the training text; another task has a file of its
                      own in this place (`Task.file`)
metrics.jsonl         one JSON object per record
findings.jsonl        one per finding of the doctor, with its step; not there where nothing was found
checkpoints/          all that resuming needs, weights included, a file for each of the last steps saved
weights.safetensors   the weights for everybody else, written after the checkpoint
run.lock              while a process trains here, or where one was killed: its number and host
.beginning, .begun    where a process was killed as it began a run: that run, in part or whole
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import cached_property
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
from .found import CONFIG, found_run
from .records import Record
from .tasks import TASKS, Task, task_of
from .tasks.task import Stored

__all__ = ["RunDirectory"]

LOG = logging.getLogger(__name__)


class RunDirectory:
    """One run's files. `occupy` and `begin` make a new one, `open` an existing one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / CONFIG
        self.metrics_file = path / "metrics.jsonl"
        self.findings_file = path / "findings.jsonl"
        self.checkpoints = path / "checkpoints"
        self.old_state_file = path / "state.pt"  # of version 0.1
        self.weights_file = path / "weights.safetensors"
        self.beginning = path / ".beginning"  # a new run, of which not all is there yet
        self.begun = path / ".begun"  # a new run, saved whole, on its way to take the place of what is here
        self._made: list[Path] = []  # directories

    @classmethod
    def vacant(cls, path: Path, overwrite: bool) -> RunDirectory:
        """A place for a new run; nothing is written yet.

        Raises InputError where something else already lies. With `overwrite`, an earlier run may.
        """
        run = cls(path)
        if path.exists() and not path.is_dir():
            raise InputError(f"out {path} is a file: give a directory")
        if path.is_dir() and any(not run._left_over(file) for file in path.iterdir()):
            if not run.config_file.exists():
                raise InputError(f"out {path} is not empty and not a run directory: give another")
            if not overwrite:
                raise InputError(f"out {path} holds a run: give --resume {path}, --overwrite, or another --out")
        return run

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """The run in a directory. Raises InputError where there is none."""
        found_run(path)
        return cls(path)

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

    def occupy(self, overwrite: bool) -> None:
        """Make this process the one that begins a run here, in a new directory if need be; `abandon` undoes that.

        Raises what `vacant` and `acquire` raise.
        """
        try:
            for folder in reversed((self.path, *self.path.parents)):
                if not folder.exists():
                    folder.mkdir(exist_ok=True)
                    self._made.append(folder)
                    atomic.flush_directory(folder.parent)
            self.acquire()
            self.vacant(self.path, overwrite)  # still so, now that nobody else can change it
            self.settle()
        except BaseException:
            self.abandon()
            raise

    def abandon(self) -> None:
        """Give the directory up, and remove those that `occupy` made as far as they are empty."""
        self.release()
        while self._made:
            with suppress(OSError):  # somebody else's files are in it
                self._made.pop().rmdir()

    def begin(self, config: Config, stored: Stored, state: dict[str, Any], keep: int = 3) -> None:
        """Begin a run here with its first checkpoint. An earlier run goes once the new one is on disk whole.

        stored: what the task keeps of its data. On an error before, an earlier run is as it was; without one nothing is
        left.
        """
        earlier, new = self.config_file.exists(), RunDirectory(self.beginning)
        try:
            new.path.mkdir()
            new.write_config(config.to_toml())
            atomic.write(new.path / task_of(config).file, stored.to_json().encode())
            new.save(state, keep)
            os.replace(self.beginning, self.begun)  # from here on it is the run of this directory
            atomic.flush_directory(self.path)
            self._take_place()
        except BaseException:
            shutil.rmtree(self.beginning, ignore_errors=True)
            if not earlier:
                self._clear()
            raise
        self.__dict__.pop("task", None)  # of an earlier run
        self.digest = new.digest

    def settle(self) -> None:
        """Finish what a process killed inside `begin` left undone: a run that was whole takes its place."""
        if self.begun.is_dir() and self.config_file.exists():
            self._take_place()
        for half in (self.beginning, self.begun):
            if half.is_dir():
                shutil.rmtree(half)

    def _take_place(self) -> None:
        """Put the new run's files where an earlier run's are. Each step may be the last, and all may be done again."""
        new = RunDirectory(self.begun)
        names = {task.file for task in TASKS.values()}
        for here, there in (
            (new.config_file, self.config_file),  # the first: what is in `begun` counts only beside it
            *((new.path / name, self.path / name) for name in sorted(names)),
            (new.weights_file, self.weights_file),
        ):
            if here.exists():
                os.replace(here, there)
        for name in names - {self.task.file}:  # an earlier run's of another task
            (self.path / name).unlink(missing_ok=True)
        for file in (self.old_state_file, self.metrics_file, self.findings_file):
            file.unlink(missing_ok=True)
        self.checkpoints.mkdir(exist_ok=True)
        for first in checkpoints.listing(new.checkpoints):
            checkpoints.prune(self.checkpoints, -1, 0)
            os.replace(first, self.checkpoints / first.name)
        self.sweep()
        for folder in (self.checkpoints, self.path):
            atomic.flush_directory(folder)
        shutil.rmtree(self.begun)

    def _clear(self) -> None:
        """Remove all that `begin` writes."""
        for folder in (self.begun, self.checkpoints):
            shutil.rmtree(folder, ignore_errors=True)
        data = (self.path / task.file for task in TASKS.values())
        for file in (self.config_file, *data, self.weights_file):
            file.unlink(missing_ok=True)

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

    @cached_property
    def task(self) -> type[Task]:
        """What the run learns."""
        return task_of(self.config())

    @property
    def stored_file(self) -> Path:
        """Where the run keeps what its task stores of the data."""
        return self.path / self.task.file

    def stored(self) -> Any:
        """What the run keeps of its data: of a text the `Vocabulary`."""
        return self.task.read(read_file(self.stored_file, self.task.what))

    @cached_property
    def digest(self) -> str:
        """What tells the run's stored data from others."""
        return _digest(self.stored())

    def append(self, record: Record) -> None:
        """Add one line to the metrics. A number that JSON has not (the perplexity of a large loss) is null."""
        entries = asdict(record)
        measures = entries["measures"]
        _append(self.metrics_file, {**_finite(entries), "measures": None if measures is None else _finite(measures)})

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
        """Drop what was logged after `step`: the resumed run writes it again.

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
        """Make weights.safetensors those of a state, with patience the best ones; left alone if it holds them."""
        best = state.get("best")
        weights: dict[str, Tensor] = state["model"] if best is None else best["model"]
        flat = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
        about = {"step": state["position"]["step"] if best is None else best["step"], "vocabulary": self.digest}
        metadata = {"bptt": json.dumps(about)}  # one entry: safetensors writes several in any order
        data: bytes = require("safetensors.torch", "cli").save(flat, metadata=metadata)
        if not self.weights_file.is_file() or self.weights_file.read_bytes() != data:
            atomic.write(self.weights_file, data)

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

    def weights(self, stored: Stored | None = None) -> dict[str, Tensor]:
        """The weights of the last checkpoint. stored: what `stored` gave, to use them with.

        Raises InputError where there are none that can be read, and where they were trained with another vocabulary, or
        what stands in its place (which weights of version 0.1 do not tell).
        """
        safetensors = require("safetensors", "cli")
        if not self.weights_file.exists():
            raise InputError(f"{self.path} has no weights: it lacks {self.weights_file.name}")
        try:
            with safetensors.safe_open(self.weights_file, "pt") as file:
                trained_with = json.loads((file.metadata() or {}).get("bptt", "{}")).get("vocabulary")
                weights: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
        except (safetensors.SafetensorError, ValueError, AttributeError, RecursionError) as error:
            raise InputError(f"{self.weights_file} cannot be read: {error}") from None
        if stored is not None and trained_with not in (None, _digest(stored)):
            raise InputError(f"{self.stored_file} is not the {self.task.what} that {self.weights_file.name} knows")
        return weights

    def _left_over(self, path: Path) -> bool:
        """Whether a process killed before it began has left this."""
        return path in (self.beginning, self.begun, self.path / lock.NAME) or path.name.endswith(atomic.SUFFIX)


def _digest(stored: Stored) -> str:
    return hashlib.sha256(stored.to_json().encode("utf-8", "surrogatepass")).hexdigest()


def _finite(entries: dict[str, Any]) -> dict[str, Any]:
    """The same with None for numbers that JSON has not."""
    return {name: None if isinstance(n, float) and not math.isfinite(n) else n for name, n in entries.items()}


def _append(file: Path, entry: dict[str, Any]) -> None:
    with file.open("a", encoding="utf-8") as opened:
        opened.write(json.dumps(entry) + "\n")


def _lines(file: Path, what: str) -> list[dict[str, Any]]:
    """The entries of a log; a last line cut short is left out, and None stands for what is not a finite number."""
    if not file.exists():
        return []
    lines = read_file(file, what).split("\n")
    try:
        return [json.loads(line, parse_constant=lambda name: None) for line in lines[:-1]]
    except ValueError as error:
        raise InputError(f"{file} has a line that is not JSON: {error}") from None
