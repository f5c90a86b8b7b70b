"""Tables from files: CSV, Parquet and NumPy's own, as named columns, and which rows of one belong together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from .arrays import arrays_of
from .columns import check_column, opened_csv
from .errors import InputError
from .headers import parquet_names
from .numerals import number_of
from .times import kind_of, moment

__all__ = ["Numbers", "Table", "read_table"]

Numbers = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Table:
    """Columns of equal lengths by name, as they were read. path: for messages. lines: of rows in a file of text."""

    path: Path
    columns: dict[str, list[Any]]
    lines: Sequence[int] = ()

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def column(self, name: str, option: str) -> list[Any]:
        """A column as it was read. option: what names it, for the message."""
        check_column(self.path, list(self.columns), name, option)
        return self.columns[name]

    def numbers(self, name: str, option: str) -> Numbers:
        """A column as float64, NaN where a value is missing. Raises InputError for what is no finite number."""
        values = self.column(name, option)
        result = np.empty(len(values))
        for i, value in enumerate(values):
            number = number_of(value)
            if number is None:
                raise InputError(
                    f"{option} {name} of {self.path} must be finite numbers: {self.place(i)} has {value!r}"
                )
            result[i] = number
        return result

    def texts(self, name: str, option: str) -> list[str]:
        """A column as text, "" where a value is missing."""
        values = self.column(name, option)
        missing = (value is None or (isinstance(value, float) and value != value) for value in values)
        return ["" if none else str(value).strip() for value, none in zip(values, missing, strict=True)]

    def rows_of(self, group: str | None, time: str | None) -> dict[str, list[int]]:
        """The rows of each group, by its name, in the order in which they first appear; "" has all if group is None.

        Raises InputError for a row of no group, and where the times of one do not rise, or are neither numbers nor
        dates.
        """
        rows: dict[str, list[int]] = {}
        for i, key in enumerate([""] * len(self) if group is None else self.texts(group, "group")):
            rows.setdefault(key, []).append(i)
        if group is not None and "" in rows:
            raise InputError(
                f"group {group} of {self.path} must name the group of every row: {self.place(rows[''][0])} has none"
            )
        if time is None:
            return rows
        times = self.column(time, "time")
        read = [moment(value) for value in times]
        if None in read:
            i = read.index(None)
            raise InputError(
                f"time {time} of {self.path} must be numbers or ISO dates: {self.place(i)} has {times[i]!r}"
            )
        known: list[Any] = [value for value in read if value is not None]
        kinds = [kind_of(value) for value in known]
        other = next((i for i, kind in enumerate(kinds) if kind != kinds[0]), None)
        if other is not None:
            raise InputError(
                f"time {time} of {self.path} must be all numbers, all dates, or all dates with a time zone: "
                f"{self.place(0)} has {times[0]!r}, {self.place(other)} has {times[other]!r}"
            )
        for key, own in rows.items():
            for before, i in pairwise(own):
                if known[i] <= known[before]:
                    of = "" if group is None else f" of group {key}"
                    what = "twice" if known[i] == known[before] else "out of order"
                    raise InputError(f"time {time}{of} of {self.path} is {what}: {self.place(i)} has {times[i]!r}")
        return rows

    def place(self, row: int) -> str:
        """Where a row stands, in words."""
        return f"line {self.lines[row]}" if self.lines else f"row {row}"


def read_table(path: Path) -> Table:
    """The table in a file: `.csv` (also `.tsv`), `.parquet`, `.npy` or `.npz`, by its ending; any other is CSV.

    A CSV file's first line names its columns. The columns of a `.npy` file of one or two dimensions are 0, 1, ...; each
    array `[n]` of a `.npz` file is one. Raises InputError for a file that cannot be read, is empty or has ragged rows.
    """
    read = {".parquet": _parquet, ".npy": _numpy, ".npz": _numpy}.get(path.suffix.lower(), _csv)
    try:
        table = read(path)
    except OSError as error:
        raise InputError(f"cannot read table {path}: {error.strerror or error}") from None
    if not len(table):
        raise InputError(f"table {path} is empty: it must have at least one row")
    return table


def _csv(path: Path) -> Table:
    with opened_csv(path) as (names, rows):
        columns: list[list[Any]] = [[] for _ in names]
        lines = []
        for row in rows:
            if not row:
                continue
            if len(row) != len(names):
                raise InputError(
                    f"table {path} must have {len(names)} values in every row: line {rows.line_num} has {len(row)}"
                )
            lines.append(rows.line_num)
            for column, value in zip(columns, row, strict=True):
                column.append(value)
    return Table(path, dict(zip(names, columns, strict=True)), lines)


def _parquet(path: Path) -> Table:
    if not path.is_file():
        raise InputError(f"cannot read table {path}: No such file")
    parquet_names(path)
    try:
        try:
            from pyarrow import parquet

            table = parquet.read_table(path, coerce_int96_timestamp_unit="us")
            return Table(path, {name: _listed(table[name]) for name in table.column_names})
        except ModuleNotFoundError:
            import polars

            return Table(path, polars.read_parquet(path).to_dict(as_series=False))
    except Exception as error:  # each library has errors of its own
        raise InputError(f"table {path} is no Parquet: {' '.join(str(error).split())}") from None


def _numpy(path: Path) -> Table:
    arrays = {
        name: np.char.decode(array, "latin-1") if array.dtype.kind == "S" else array
        for name, array in arrays_of(path, "table").items()
    }
    if list(arrays) == [""]:
        array = arrays[""]
        if array.ndim not in (1, 2):
            raise InputError(f"table {path} must be an array [n] or [n, columns]: got {list(array.shape)}")
        array = array[:, None] if array.ndim == 1 else array
        return Table(path, {str(i): array[:, i].tolist() for i in range(array.shape[1])})
    shapes = {name: list(array.shape) for name, array in arrays.items()}
    if len({tuple(shape) for shape in shapes.values()}) != 1 or any(len(shape) != 1 for shape in shapes.values()):
        raise InputError(f"table {path} must hold arrays [n] of one length: got {shapes}")
    return Table(path, {name: array.tolist() for name, array in arrays.items()})


def _listed(column: Any) -> list[Any]:
    """A column of Arrow's; Python's dates end at microseconds, so that finer ones are cut off there."""
    from pyarrow import timestamp, types

    if types.is_timestamp(column.type) and column.type.unit == "ns":
        column = column.cast(timestamp("us", column.type.tz), safe=False)
    values: list[Any] = column.to_pylist()
    return values
