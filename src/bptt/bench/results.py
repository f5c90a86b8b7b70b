"""What was measured, with where and on what: rows that can be saved, loaded and judged."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..clock import Timing, disturbed
from .cases import Case
from .contest import TOLERANCE

__all__ = ["Machine", "Results", "Row", "geometric_mean"]


@dataclass(frozen=True)
class Row:
    """One contest, measured.

    table: which table it belongs to. threads: that every contender had. errors: of each contender, see
    `contest.largest_error`. times: of those that passed their check, in the contest's order. gemm: the machine's rate
    beside it, float32 FLOP/s of a 2048 x 2048 x 2048 product on as many threads. cores: how many of the machine's that
    product got, less than `threads` where other programs took their part. first: of each that was timed, the seconds
    that its first call took beyond the median of later ones. missing: of each contender that refused, its reason.
    commit: of the code that was measured. parts: what bounds the subject, timed beside it, see `bounds.PARTS`.
    """

    table: str
    case: Case
    threads: int
    errors: dict[str, float]
    times: dict[str, Timing]
    gemm: float
    cores: float
    first: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    commit: str | None = None
    parts: dict[str, Timing] = field(default_factory=dict)

    @property
    def place(self) -> tuple[str, Case, int]:
        """What was measured: results have one row of it."""
        return self.table, self.case, self.threads

    @property
    def wrong(self) -> list[str]:
        """The contenders that failed their check."""
        return [name for name, error in self.errors.items() if not error <= TOLERANCE]

    @property
    def disturbed(self) -> bool:
        """Whether other programs took so much of the machine that the times say little."""
        return disturbed(self.cores, self.threads)

    @property
    def subject(self) -> str:
        """The contender that the others are compared with."""
        return next(iter(self.errors))

    @property
    def rivals(self) -> list[str]:
        """The others."""
        return list(self.errors)[1:]

    def ratio(self, rival: str) -> float | None:
        """How many times as long as the subject a rival takes; None where one of the two was not timed."""
        if rival not in self.times or self.subject not in self.times:
            return None
        return self.times[rival].median / self.times[self.subject].median

    def alike(self, rival: str) -> bool:
        """Whether the medians of a rival and the subject, both timed, differ by less than the quartiles of one do."""
        one, other = self.times[self.subject], self.times[rival]
        return abs(one.median - other.median) < max(one.high - one.low, other.high - other.low)

    @property
    def share(self) -> float | None:
        """The subject's useful FLOP/s over the machine's rate; None where it was not timed, or is more than a layer."""
        if self.table != "layers" or self.subject not in self.times:
            return None
        return self.case.flop / self.times[self.subject].median / self.gemm


@dataclass(frozen=True)
class Machine:
    """Where and with what was measured. jax: None where it was not installed. commit: None outside the repository."""

    processor: str
    instructions: str
    cores: int
    python: str
    bptt: str
    torch: str
    numpy: str
    jax: str | None
    commit: str | None
    date: str

    def differs(self, other: Machine) -> list[str]:
        """The fields in which two differ beside the commit and the date: then their rows stand in no one table."""
        one, two = asdict(self), asdict(other)
        return [name for name in one if name not in ("commit", "date") and one[name] != two[name]]

    @classmethod
    def here(cls, processor: str, cores: int) -> Machine:
        """The present machine, today. processor: its name. cores: that the measurement may use."""
        return cls(
            processor=processor,
            instructions=torch.backends.cpu.get_cpu_capability(),
            cores=cores,
            python=platform.python_version(),
            bptt=__version__,
            torch=torch.__version__,
            numpy=importlib.metadata.version("numpy"),
            jax=_version("jax"),
            commit=_commit(),
            date=date.today().isoformat(),
        )


@dataclass(frozen=True)
class Results:
    """One measurement. kernel: which of bptt's was asked for."""

    machine: Machine
    kernel: str
    rows: tuple[Row, ...]

    def extended(self, rows: Iterable[Row]) -> Results:
        """With more rows: one of the same place takes the other's."""
        by_place = {row.place: row for row in (*self.rows, *rows)}
        return replace(self, rows=tuple(by_place.values()))

    def to_json(self) -> str:
        """The text form that `from_json` reads."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Results:
        """The inverse of `to_json`."""
        entries = json.loads(text)
        machine = Machine(**entries["machine"])
        return cls(machine, entries["kernel"], tuple(_row({"commit": machine.commit} | row) for row in entries["rows"]))


def geometric_mean(values: Iterable[float]) -> float:
    """exp of the mean logarithm: ratios that are each other's inverse cancel.

    >>> round(geometric_mean([2.0, 8.0]), 12)
    4.0
    """
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms))


def _row(entry: dict[str, Any]) -> Row:
    times, parts = ({name: Timing(**timing) for name, timing in entry.get(of, {}).items()} for of in ("times", "parts"))
    return Row(**entry | {"case": Case(**entry["case"]), "times": times, "parts": parts})


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checked-out commit of this package's own repository, marked where files differ from it."""
    here = Path(__file__)
    tracked = ["git", "-C", str(here.parent), "ls-files", "--error-unmatch", here.name]
    describe = ["git", "-C", str(here.parent), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        subprocess.run(tracked, capture_output=True, check=True)
        return subprocess.run(describe, capture_output=True, check=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
