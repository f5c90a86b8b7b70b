"""Tables from files: CSV, Parquet and NumPy's own, as named columns, and which rows of one belong together."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np

from .arrays import arrays_of
from .errors import InputError

__all__ = ["MISSING", "Numbers", "Table", "column_names", "number_of_time", "read_table"]

MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "?"})
"""What stands for a missing value, in small letters."""

SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars", ",": "commas"}
"""What other programs put between columns, in words."""

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
        if name not in self.columns:
            raise InputError(
                f"{option} must be a column of {self.path}: got {name!r}; it has {', '.join(self.columns)}"
            )
        return self.columns[name]

    def numbers(self, name: str, option: str) -> Numbers:
        """A column as float64, NaN where a value is missing. Raises InputError for what is no finite number."""
        values = self.column(name, option)
        result = np.empty(len(values))
        for i, value in enumerate(values):
            text = value.strip() if isinstance(value, str) else value
            if text is None or (isinstance(text, str) and text.lower() in MISSING):
                result[i] = np.nan
                continue
            try:
                result[i] = float(text)
            except (TypeError, ValueError):
                result[i] = np.inf
            if np.isinf(result[i]):
                raise InputError(
                    f"{option} {name} of {self.path} must be finite numbers: {self.place(i)} has {value!r}"
                )
        return result

    def texts(self, name: str, option: str) -> list[str]:
        """A column as text, "" where a value is missing."""
        return ["" if value is None else str(value).strip() for value in self.column(name, option)]

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
        numbers = [number_of_time(value) for value in times]
        for i, number in enumerate(numbers):
            if number is None or not math.isfinite(number):
                raise InputError(
                    f"time {time} of {self.path} must be numbers or ISO dates: {self.place(i)} has {times[i]!r}"
                )
        for key, own in rows.items():
            for before, i in pairwise(own):
                now, then = cast(float, numbers[i]), cast(float, numbers[before])
                if now <= then:
                    of = "" if group is None else f" of group {key}"
                    what = "twice" if now == then else "out of order"
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


def column_names(option: str, text: str) -> tuple[str, ...]:
    """The columns that an option names, with commas between. Raises InputError where one has no name, or two the same.

    >>> column_names("target", "y, z")
    ('y', 'z')
    """
    names = tuple(name.strip() for name in text.split(","))
    if not all(names) or len(set(names)) < len(names):
        raise InputError(f"{option} must be different columns with commas between: got {text!r}")
    return names


def number_of_time(value: Any) -> float | None:
    """A time as a number, in seconds where it is a date; None where it is neither.

    >>> number_of_time("1958.5"), number_of_time("1970-01-02"), number_of_time("soon")
    (1958.5, 86400.0, None)
    """
    try:
        return float(value)
    except (TypeError, ValueError):
        pass
    try:
        when = datetime.fromisoformat(str(value).strip())
    except ValueError:
        return None
    return (when.replace(tzinfo=None) - datetime(1970, 1, 1)).total_seconds()


def _csv(path: Path) -> Table:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
            names = [name.strip() for name in next(rows, [])]
            _check_header(path, names)
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
    except UnicodeDecodeError as error:
        raise InputError(f"table {path} is not UTF-8: byte {error.start} cannot be decoded") from None
    except csv.Error as error:
        raise InputError(f"table {path} is no CSV: {error}") from None
    return Table(path, dict(zip(names, columns, strict=True)), lines)


def _parquet(path: Path) -> Table:
    if not path.is_file():
        raise InputError(f"cannot read table {path}: No such file")
    try:
        try:
            from pyarrow import parquet

            _check_names(path, parquet.read_schema(path).names)
            return Table(path, parquet.read_table(path).to_pydict())
        except ModuleNotFoundError:
            import polars

            _check_names(path, list(polars.read_parquet_schema(path)))
            return Table(path, polars.read_parquet(path).to_dict(as_series=False))
    except ModuleNotFoundError:
        raise InputError("neither pyarrow nor polars is installed: pip install 'bptt[parquet]'") from None
    except InputError:
        raise
    except Exception as error:  # each library has errors of its own
        raise InputError(f"table {path} is no Parquet: {' '.join(str(error).split())}") from None


def _numpy(path: Path) -> Table:
    arrays = arrays_of(path, "table")
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


def _check_names(path: Path, names: Sequence[str]) -> None:
    """Raise InputError for columns that cannot be told apart."""
    if not all(names) or len(set(names)) < len(names):
        raise InputError(f"table {path} must begin with a name of each column, each once: got {list(names)}")


def _check_header(path: Path, names: Sequence[str]) -> None:
    """Raise InputError for a first line of text that does not name the columns."""
    _check_names(path, names)
    if names and all(map(_is_number, names)) and list(names) != [str(i) for i in range(len(names))]:
        raise InputError(
            f"table {path} must begin with the names of its columns: its first line has numbers alone, "
            f"{', '.join(names[:4])}"
        )
    if len(names) == 1 and (between := next((c for c in SEPARATORS if c in names[0]), None)):
        raise InputError(
            f"table {path} must have {'tabs' if path.suffix.lower() == '.tsv' else 'commas'} between its columns: its "
            f"first line has {SEPARATORS[between]}"
        )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
