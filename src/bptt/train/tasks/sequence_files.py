"""Sequences in a file, by its ending."""

from __future__ import annotations

from pathlib import Path

from ..columns import check_has_columns
from ..config import Config
from ..errors import InputError
from ..found import found_sequences
from .sequence_arrays import read_npz
from .sequence_tables import sequences_of_table
from .sequences import Sequences
from .ts_files import read_ts

__all__ = ["read_sequences"]


def read_sequences(path: Path, config: Config, labelled: bool = True) -> Sequences:
    """The sequences of a file, with the columns that a configuration names.

    labelled: whether each must have a label. Raises InputError for another ending, and for what the readers refuse.
    """
    found_sequences(str(path))
    if check_has_columns(config, path):
        found = sequences_of_table(path, config, labelled)
    else:
        found = read_npz(path) if path.suffix.lower() == ".npz" else read_ts(path, labelled)
    if labelled and found.labels is None:
        raise InputError(f"{path} has no labels: it must have an array y")
    return found
