"""Sequences in a table of long form: a row is a step, and says which sequence it belongs to, and of which class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import InputError
from ..tables import Table, read_table
from .sequences import Sequences

__all__ = ["sequences_of_table"]

GROUP, TIME, TARGET = "id", "time", "label"
"""The names of columns where none are given; there need be no time."""


def sequences_of_table(
    path: Path,
    *,
    group: str | None = None,
    time: str | None = None,
    inputs: Sequence[str] | None = None,
    target: str | None = None,
    labelled: bool = True,
) -> Sequences:
    """The sequences of a table of long form, in the order in which they begin.

    group: the column that tells sequences apart; default `id`. time: rises from row to row within each; default `time`,
    if there is one. target: of the label, the same in all rows of one; default `label`. inputs: the features; default
    all other columns. labelled: False, a file without the target is read too.

    Raises InputError for a column that is missing, or not of numbers, times that do not rise, and for what `read_table`
    and `Sequences` refuse.
    """
    table = read_table(path)
    group, target = group or GROUP, target or TARGET
    time = TIME if time is None and TIME in table.columns else time
    special = {group, target, time}
    if len(special) < 3:
        raise InputError(f"group, target and time must be different columns: got {group}, {target} and {time}")
    chosen = [name for name in table.columns if name not in special] if inputs is None else list(inputs)
    if not chosen:
        raise InputError(f"{path} has no features beside {', '.join(table.columns)}")
    if reserved := special & {*chosen}:
        raise InputError(f"inputs must not hold the group, the time or the target: got {', '.join(map(str, reserved))}")
    rows = table.rows_of(group, time)
    labels = _one_each(table, target, rows) if labelled or target in table.columns else None
    values = np.stack([table.numbers(name, "inputs") for name in chosen], axis=1)
    order, lengths = [row for own in rows.values() for row in own], [len(own) for own in rows.values()]
    return Sequences.of(values[order], lengths, labels=labels, names=list(rows), features=chosen, source=str(path))


def _one_each(table: Table, target: str, rows: dict[str, list[int]]) -> list[str]:
    """The label of each sequence. A file may give it in one of its rows, or in all."""
    found, labels = table.texts(target, "target"), []
    for name, own in rows.items():
        kinds = {found[row] for row in own} - {""}
        if len(kinds) > 1:
            both = " and ".join(sorted(kinds)[:2])
            raise InputError(f"{table.path}: sequence {name} must have one label: got {both} in column {target!r}")
        labels.append(next(iter(kinds), ""))
    return labels
