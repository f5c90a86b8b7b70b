"""Where torch's own layers are measured to be faster than the compiled walks on a CPU, by cell, sizes and threads.

`kernel="auto"` goes by one table: that of the file which the environment variable `BPTT_CALIBRATION` names, made by
`bptt bench --calibrate`, or of those that are shipped the one of a processor of this kind: Intel's, for which MKL does
the walks' large products, or another. It is read when it is first needed, once in a process, and holds for machines
with the same instruction set and the same version of torch alone: elsewhere nothing is known to be faster.

Legend: T steps, B lanes, I input features, H hidden units.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..cells import CELLS, Cell
from ..memory import Tapes, keeps_gates
from ..policies import Reach
from . import _walks
from .fused import Fused
from .variants import variants

__all__ = ["VARIABLE", "Calibration", "Measured", "PlainSizes", "calibration", "gains", "shipped"]

VARIABLE = "BPTT_CALIBRATION"
"""The environment variable that names a file of `bptt bench --calibrate`; "off" is no table at all."""

SHIPPED = Path(__file__).with_name("calibrations")
"""The folder of the tables that are shipped: what `bptt bench --calibrate --json FILE` wrote, a file a processor."""

MARGIN = 1.05
"""How many times as long the walks must take by the medians."""

NEAR = (3.0, 1.5, 1.5, 1.5)
"""The factors in T, B, I and H within which a measured size is a neighbour of another."""


class PlainSizes(NamedTuple):
    """A call of one layer in one direction, without projection, in which nothing is reset or padded: what it is of."""

    cell: Cell
    dtype: torch.dtype
    T: int
    B: int
    I: int
    H: int


@dataclass(frozen=True)
class Measured:
    """One measurement, float32: seconds of the walks and of torch's layer, each as lower quartile, median and upper
    quartile.

    mode: of the cell. differentiated: forward and backward; else forward alone, without a gradient.

    >>> row = Measured("LSTM", 100, 32, 64, 64, 1, True, (0.019, 0.02, 0.021), (0.015, 0.016, 0.017))
    >>> row.ratio, row.sooner
    (1.25, True)
    """

    mode: str
    T: int
    B: int
    I: int
    H: int
    threads: int
    differentiated: bool
    cpu: tuple[float, float, float]
    fused: tuple[float, float, float]

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """(T, B, I, H)."""
        return self.T, self.B, self.I, self.H

    @property
    def ratio(self) -> float:
        """How many times as long the walks take."""
        return self.cpu[1] / self.fused[1]

    @property
    def sooner(self) -> bool:
        """Whether torch's layer is faster by the margin, and the clock tells the two apart."""
        return self.ratio >= MARGIN and self.cpu[0] > self.fused[2]


@dataclass(frozen=True)
class Calibration:
    """What was measured, and with what: the walks' instruction set, the version of torch, and the processor's name."""

    variant: str
    torch: str
    processor: str
    date: str
    rows: tuple[Measured, ...]

    @property
    def holds(self) -> bool:
        """Whether it is of this instruction set and of this version of torch, 2.13 for 2.13.1."""
        return self.variant == variants()[0] and minor(self.torch) == minor(torch.__version__)

    @property
    def same_kind(self) -> bool:
        """Whether it is of a processor of this machine's kind: one of Intel's, or not."""
        return ("intel" in self.processor.lower()) == _walks.intel()

    def at(self, mode: str, sizes: tuple[int, int, int, int], threads: int, differentiated: bool) -> Measured | None:
        """The measurement by which torch's layer is the faster one for these sizes (T, B, I, H); None where it is not.

        That of these very sizes, if there is one; else the one with the smallest ratio of all neighbours, each of which
        must be faster by the margin.
        """
        rows = [r for r in self.rows if (r.mode, r.threads, r.differentiated) == (mode, threads, differentiated)]
        near = [r for r in rows if r.sizes == sizes] or [r for r in rows if _near(r.sizes, sizes)]
        return min(near, key=lambda r: r.ratio) if near and all(r.sooner for r in near) else None

    def to_json(self) -> str:
        """The text form that `from_json` reads: a measurement a line."""
        head = {name: getattr(self, name) for name in ("variant", "torch", "processor", "date")}
        rows = [
            {name: getattr(r, name) for name in ("mode", "T", "B", "I", "H", "threads", "differentiated")}
            | {name: [float(f"{seconds:.4g}") for seconds in getattr(r, name)] for name in ("cpu", "fused")}
            for r in self.rows
        ]
        lines = ",\n".join(json.dumps(row) for row in rows)
        return f'{json.dumps(head)[:-1]}, "rows": [\n{lines}\n]}}\n'

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        """The inverse of `to_json`. Raises ValueError for another text."""
        try:
            entries: dict[str, Any] = json.loads(text)
            rows = tuple(Measured(**row | {n: _times(row[n]) for n in ("cpu", "fused")}) for row in entries.pop("rows"))
            found = cls(**entries, rows=rows)
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(f"no calibration of bptt bench: {error}") from None
        for row in rows:
            if row.mode not in CELLS or not all(isinstance(n, int) and n > 0 for n in (*row.sizes, row.threads)):
                raise ValueError(f"no calibration of bptt bench: a cell and sizes of at least 1 expected, got {row}")
        return found


@cache
def calibration() -> Calibration | None:
    """The table that `kernel="auto"` goes by, of this process; None where none holds here.

    Raises ValueError where `BPTT_CALIBRATION` names what is not such a file.
    """
    named = os.environ.get(VARIABLE, "")
    if named == "off":
        return None
    if not named:
        return next((table for table in shipped() if table.holds and table.same_kind), None)
    try:
        found = Calibration.from_json(Path(named).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{VARIABLE} must be 'off' or name a file of bptt bench --calibrate: got {named!r}: {error}"
        ) from None
    return found if found.holds else None


def shipped() -> list[Calibration]:
    """The tables that are shipped; none in a package without its data, which still computes."""
    return [Calibration.from_json(file.read_text(encoding="utf-8")) for file in sorted(SHIPPED.glob("*.json"))]


def gains(call: PlainSizes, reach: Reach, memory: Tapes, differentiated: bool, threads: int) -> str | None:
    """Why torch's own layer runs this plain call on the CPU under kernel="auto", in words; None where a walk does.

    It must be measured to be faster, and of a differentiated call the gradient must be the full one, with a tape of
    all that torch keeps.
    """
    cell, dtype, T, B, I, H = call
    if dtype != torch.float32:
        return None
    if differentiated:
        taped = T * B * H * Fused().taped_per_unit(cell, reach) * dtype.itemsize
        if reach.every is not None or not keeps_gates(memory, taped):
            return None
    table = calibration()
    row = None if table is None else table.at(cell.mode, (T, B, I, H), threads, differentiated)
    if row is None:
        return None
    passes = "forward and backward" if differentiated else "without a gradient"
    return (
        f"takes {row.ratio:.2f} times as long as 'fused', measured at (T, B, I, H) = {row.sizes} {passes} on "
        f"{threads} thread{'s' * (threads > 1)}"
    )


def _near(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return all(a <= b * f and b <= a * f for a, b, f in zip(one, other, NEAR, strict=True))


def _times(values: Any) -> tuple[float, float, float]:
    low, median, high = map(float, values)
    if not 0 < low <= median <= high:
        raise ValueError(f"a lower quartile, a median and an upper one expected, got {values}")
    return low, median, high


def minor(version: str) -> list[str]:
    """The first two numbers of a version."""
    return version.split("+")[0].split(".")[:2]
