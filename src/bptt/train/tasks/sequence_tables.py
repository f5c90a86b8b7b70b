"""Sequences in a table of long form: a row is a step, and says which sequence it belongs to, and of which class."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from ..corpus import read_file
from ..errors import InputError
from .sequences import Floats, Sequences, Whole

__all__ = ["MISSING", "Columns", "read_csv"]

MISSING = {"", "nan", "na", "n/a", "null", "none", "?"}
"""Ways to say in a table that there is no number, in small letters."""
GROUP, TIME, TARGET = "id", "time", "label"
"""The names of columns where none are given; there need be no time."""


class Columns:
    """A table's columns by name, as text, and which lines of the file they come from.

    Raises InputError for a file without a header or rows, names that are empty or given twice, and rows of another
    length than the header's.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        rows: list[list[str]] = []
        self.lines: list[int] = []
        reader = csv.reader(io.StringIO(read_file(path, "table"), newline=""), strict=True)
        try:
            for row in reader:
                if row:
                    rows.append(row)
                    self.lines.append(reader.line_num)
        except csv.Error as error:
            raise InputError(f"{path}, line {reader.line_num}, is not CSV: {error}") from None
        if len(rows) < 2:
            raise InputError(f"{path} is empty: it must have a header and a row for each step")
        self.names = [name.strip() for name in rows[0]]
        if not all(self.names) or len({*self.names}) < len(self.names):
            raise InputError(f"{path} must have a header of names, each once: got {', '.join(rows[0])}")
        self.lines = self.lines[1:]
        for line, row in zip(self.lines, rows[1:], strict=True):
            if len(row) != len(self.names):
                raise InputError(f"{path}, line {line}, must have {len(self.names)} columns: got {len(row)}")
        self.columns = dict(zip(self.names, map(list, zip(*rows[1:], strict=True)), strict=True))

    def text(self, name: str, option: str) -> list[str]:
        """A column, as it stands. option: what names it, for the message where there is none."""
        if name not in self.columns:
            raise InputError(f"{self.path} has no column {name!r} ({option}): it has {', '.join(self.names)}")
        return [value.strip() for value in self.columns[name]]

    def numbers(self, name: str, option: str) -> Floats:
        """A column of numbers, NaN where one is missing."""
        texts = self.text(name, option)
        try:
            return np.array([np.nan if text.lower() in MISSING else float(text) for text in texts])
        except ValueError:
            pass
        for line, text in zip(self.lines, texts, strict=True):
            try:
                float("nan" if text.lower() in MISSING else text)
            except ValueError:
                raise InputError(f"{self.path}, line {line}: column {name!r} must be numbers: got {text!r}") from None
        raise AssertionError("one of them is no number")

    def times(self, name: str, option: str) -> Floats:
        """A column of numbers, or of dates in the form of ISO 8601, as numbers that rise with it."""
        texts = self.text(name, option)
        for read in (float, _seconds):
            try:
                found = np.array([read(text) for text in texts])
            except (ValueError, TypeError):
                continue
            if np.isfinite(found).all():
                return found
        raise InputError(f"{self.path}: column {name!r} must be all numbers, or all dates as 2026-01-31T12:00")


def read_csv(
    path: Path,
    *,
    group: str | None = None,
    time: str | None = None,
    inputs: Sequence[str] | None = None,
    target: str | None = None,
    labelled: bool = True,
) -> Sequences:
    """The sequences of a CSV file of long form, in the order in which they begin.

    group: the column that tells sequences apart; default `id`. time: rises from row to row within each; default `time`,
    if there is one. target: of the label, the same in all rows of one; default `label`. inputs: the features; default
    all other columns. labelled: False, a file without the target is read too.

    Raises InputError for a column that is missing, or not of numbers, and for what `Columns` and `Sequences` refuse.
    """
    table = Columns(path)
    group, target = group or GROUP, target or TARGET
    time = TIME if time is None and TIME in table.columns else time
    special = {group, target, time}
    chosen = [name for name in table.names if name not in special] if inputs is None else list(inputs)
    if not chosen:
        raise InputError(f"{path} has no features beside {', '.join(table.names)}")
    if taken := special & {*chosen}:
        raise InputError(f"inputs must not hold the group, the time or the target: got {', '.join(map(str, taken))}")
    ids = table.text(group, "group")
    if "" in ids:
        raise InputError(f"{path}, line {table.lines[ids.index('')]}: column {group!r} must say which sequence it is")
    names = list(dict.fromkeys(ids))
    numbers = {name: number for number, name in enumerate(names)}
    of = np.array([numbers[name] for name in ids])
    order = np.argsort(of, kind="stable")
    lengths = np.bincount(of)
    if time is not None:
        _rising(table, time, order, of)
    labels = None
    if labelled or target in table.columns:
        labels = _one_each(table, target, order, lengths, names)
    values = np.stack([table.numbers(name, "inputs") for name in chosen], axis=1)[order]
    return Sequences.of(values, lengths, labels=labels, names=names, features=chosen, source=str(path))


def _rising(table: Columns, name: str, order: Whole, of: Whole) -> None:
    times = table.times(name, "time")[order]
    wrong = (np.diff(times) <= 0) & (np.diff(of[order]) == 0)
    if wrong.any():
        row = int(order[int(wrong.argmax()) + 1])
        twice = "twice" if times[int(wrong.argmax())] == times[int(wrong.argmax()) + 1] else "out of order"
        what = f"column {name!r} must rise within a sequence: {table.columns[name][row]!r} stands {twice}"
        raise InputError(f"{table.path}, line {table.lines[row]}: {what}")


def _one_each(table: Columns, target: str, order: Whole, lengths: Whole, names: list[str]) -> list[str]:
    """The label of each sequence. A file may give it in one of its rows, or in all."""
    found = np.array(table.text(target, "target"))[order]
    labels = []
    for name, part in zip(names, np.split(found, lengths.cumsum()[:-1]), strict=True):
        kinds = {*part.tolist()} - {""}
        if len(kinds) > 1:
            both = " and ".join(sorted(kinds)[:2])
            raise InputError(f"{table.path}: sequence {name} must have one label: got {both} in column {target!r}")
        labels.append(next(iter(kinds), ""))
    return labels


def _seconds(text: str) -> float:
    read = datetime.fromisoformat(text)
    return (read if read.tzinfo else read.replace(tzinfo=UTC)).timestamp()
