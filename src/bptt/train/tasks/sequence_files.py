"""Sequences in a file, by its ending."""

from __future__ import annotations

from pathlib import Path

from ..config import Config
from ..errors import InputError
from ..found import found_sequences
from ..tables import column_names
from .sequence_arrays import read_npz
from .sequence_tables import sequences_of_table
from .sequences import Sequences
from .ts_files import read_ts

__all__ = ["read_sequences"]

COLUMNS = ("group", "time", "target", "inputs")
"""The options that name columns, which only a table has."""
TABLES = (".csv", ".tsv", ".parquet")


def read_sequences(path: Path, config: Config, labelled: bool = True) -> Sequences:
    """The sequences of a file, with the columns that a configuration names.

    labelled: whether each must have a label. Raises InputError for another ending, and for what the readers refuse.
    """
    ending = path.suffix.lower()
    found_sequences(str(path))
    if ending in TABLES:
        inputs = None if config.inputs is None else column_names("inputs", config.inputs)
        found = sequences_of_table(
            path, group=config.group, time=config.time, target=config.target, inputs=inputs, labelled=labelled
        )
    else:
        if given := [name for name in COLUMNS if getattr(config, name) is not None]:
            raise InputError(
                f"{given[0]} names a column of a table: got {given[0]}={getattr(config, given[0])} and {path}"
            )
        found = read_npz(path) if ending == ".npz" else read_ts(path, labelled)
    if labelled and found.labels is None:
        raise InputError(f"{path} has no labels: it must have an array y")
    return found
