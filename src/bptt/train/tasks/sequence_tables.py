"""Sequences in a table of long form: a row is a step, and says which sequence it belongs to, and of which class."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..columns import columns_of_sequences
from ..config import Config
from ..errors import InputError
from ..tables import Table, read_table
from .sequences import Sequences

__all__ = ["sequences_of_table"]


def sequences_of_table(path: Path, config: Config, labelled: bool = True) -> Sequences:
    """The sequences of a table of long form, in the order in which they begin.

    config: names its columns, as `columns_of_sequences` says. labelled: False, a file without the target is read too.

    Raises InputError for a column that is missing, or not of numbers, times that do not rise, and for what `read_table`
    and `Sequences` refuse.
    """
    table = read_table(path)
    group, time, target, chosen = columns_of_sequences(config, path, list(table.columns), labelled)
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
