"""Which of a table's columns the options name, and the first line of a CSV file: without NumPy and torch."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from .config import Config
from .errors import InputError
from .formats import check_text
from .numerals import is_number

__all__ = [
    "check_column",
    "check_features",
    "check_has_columns",
    "check_names",
    "column_names",
    "columns_of_sequences",
    "columns_of_series",
    "opened_csv",
]

SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars", ",": "commas"}
"""What other programs put between columns, in words."""

TABLES = (".csv", ".tsv", ".parquet")
"""The endings of tables of sequences; only these have columns that options name."""

GROUP, TIME, TARGET = "id", "time", "label"
"""The names of the columns of sequences where none are given; there need be no time."""


@contextmanager
def opened_csv(path: Path) -> Iterator[tuple[list[str], Any]]:
    """(the names of the columns, a reader of the rows after them), inside `with`. Raises InputError, there too, for
    what is no CSV.
    """
    try:
        with path.open("rb") as file:
            check_text(file.peek(8), path, "table")
            text = TextIOWrapper(file, encoding="utf-8-sig", newline="")
            rows = csv.reader(text, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
            names = [name.strip() for name in next(filter(None, rows), [])]
            _check_header(path, names)
            yield names, rows
    except UnicodeDecodeError as error:
        raise InputError(f"table {path} is not UTF-8: byte {error.start} cannot be decoded") from None
    except csv.Error as error:
        raise InputError(f"table {path} is no CSV: {error}") from None
    except OSError as error:
        raise InputError(f"cannot read table {path}: {error.strerror or error}") from None


def column_names(option: str, text: str) -> tuple[str, ...]:
    """The columns that an option names, with commas between. Raises InputError where one has no name, or two the same.

    >>> column_names("target", "y, z")
    ('y', 'z')
    """
    names = tuple(name.strip() for name in text.split(","))
    if not all(names) or len(set(names)) < len(names):
        raise InputError(f"{option} must be different columns with commas between: got {text!r}")
    return names


def check_column(path: Path, there: Sequence[str], name: str, option: str) -> None:
    """Raise InputError where a table lacks a column. option: what names it, for the message."""
    if name not in there:
        raise InputError(f"{option} must be a column of {path}: got {name!r}; it has {', '.join(there)}")


def check_names(path: Path, names: Sequence[str]) -> None:
    """Raise InputError for columns that cannot be told apart."""
    if not all(names) or len(set(names)) < len(names):
        hint = " (pandas leaves out its index with to_csv(index=False))" if names and not names[0] else ""
        raise InputError(f"table {path} must begin with a name of each column, each once: got {list(names)}{hint}")


def columns_of_series(config: Config, path: Path, there: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(targets, inputs) of a run on a series, of which a forecast has the targets among its inputs, first.

    there: the columns of its table. Without a target, all that have no other use are. Raises InputError.
    """
    apart = [name for name in (config.time, config.group) if name is not None]
    given = {o: column_names(o, getattr(config, o)) for o in ("target", "inputs") if getattr(config, o) is not None}
    for option in ("time", "group"):
        if getattr(config, option) is not None:
            check_column(path, there, getattr(config, option), option)
    for option, names in given.items():
        for name in names:
            check_column(path, there, name, option)
            if name in apart:
                raise InputError(f"{option} must not be the time or the group: got {name}")
    inputs = given.get("inputs", ())
    targets = given.get("target") or tuple(n for n in there if n not in (*apart, *inputs))
    if not targets:
        raise InputError(f"{path} has no column to predict: it has {', '.join(there)}")
    if not config.horizon:
        inputs = inputs or tuple(name for name in there if name not in (*apart, *targets))
        if not inputs or set(inputs) & set(targets):
            raise InputError(
                f"horizon=0 predicts {', '.join(targets)} from other columns: got inputs={','.join(inputs) or None}"
            )
        return targets, inputs
    return targets, (*targets, *(name for name in inputs if name not in targets))


def check_has_columns(config: Config, path: Path) -> bool:
    """Whether a file of sequences is a table. Raises InputError where it is none and options name columns of it."""
    if path.suffix.lower() in TABLES:
        return True
    for option in ("group", "time", "target", "inputs"):
        if (given := getattr(config, option)) is not None:
            raise InputError(f"{option} names a column of a table: got {option}={given} and {path}")
    return False


def columns_of_sequences(
    config: Config, path: Path, there: Sequence[str], labelled: bool = True
) -> tuple[str, str | None, str, list[str]]:
    """(group, time, target, inputs) of a table of long form: the group tells sequences apart, the time rises within
    each, the target is the label, the inputs are the features, by default all other columns.

    there: its columns. labelled: whether it must have the target. Raises InputError.
    """
    group, target = config.group or GROUP, config.target or TARGET
    time = TIME if config.time is None and TIME in there else config.time
    inputs = None if config.inputs is None else column_names("inputs", config.inputs)
    special = {group, target, time}
    if len(special) < 3:
        raise InputError(f"group, target and time must be different columns: got {group}, {target} and {time}")
    chosen = [name for name in there if name not in special] if inputs is None else list(inputs)
    if not chosen:
        raise InputError(f"{path} has no features beside {', '.join(there)}")
    if reserved := special & {*chosen}:
        raise InputError(f"inputs must not hold the group, the time or the target: got {', '.join(map(str, reserved))}")
    named = {"group": group, **({} if time is None else {"time": time}), **({"target": target} if labelled else {})}
    for option, name in (*named.items(), *(("inputs", name) for name in chosen)):
        check_column(path, there, name, option)
    return group, time, target, chosen


def check_features(source: str, trained: Sequence[str], given: Sequence[str]) -> None:
    """Raise InputError where sequences have other features than those of the training. source: they are from."""
    if len(given) != len(trained):
        raise InputError(f"{source} must have {len(trained)} features: got {len(given)}")
    for one, two in zip(trained, given, strict=True):
        if one != two:
            raise InputError(f"{source} must have the features of the training, {one!r}: got {two!r} in its place")


def _check_header(path: Path, names: Sequence[str]) -> None:
    """Raise InputError for a first line of text that does not name the columns."""
    if not names:
        raise InputError(f"table {path} is empty: it must begin with the names of its columns")
    check_names(path, names)
    if all(map(is_number, names)) and list(names) != [str(i) for i in range(len(names))]:
        raise InputError(
            f"table {path} must begin with the names of its columns: its first line has numbers alone, "
            f"{', '.join(names[:4])}"
        )
    if len(names) == 1 and (between := next((c for c in SEPARATORS if c in names[0]), None)):
        raise InputError(
            f"table {path} must have {'tabs' if path.suffix.lower() == '.tsv' else 'commas'} between its columns: its "
            f"first line has {SEPARATORS[between]}"
        )
