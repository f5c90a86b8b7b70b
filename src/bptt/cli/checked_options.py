"""The options of a run that is to begin, from a file and from flags, checked as far as that takes no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..train import Config, InputError
from ..train.config import read_entries, shown
from ..train.corpus import encodable, read_file
from ..train.found import found_file, found_sequences, found_text
from ..train.headers import check_columns
from ..train.imported import found_module

__all__ = ["check_found", "config_of", "directory_of"]


def config_of(file: Path | None, flags: dict[str, Any]) -> tuple[Config, Path | None]:
    """The options of a new run, and the directory that the file names for it. Raises InputError."""
    if file is None:
        config = Config(**flags)
        check_found(config)
        return config, None
    entries = read_entries(read_file(file, "configuration"), str(file), also=["out"])
    directory = directory_of(f"{file}: out", entries.pop("out")) if "out" in entries else None
    config = Config.from_entries(entries, str(file), **flags)
    check_found(config)
    return config, directory


def check_found(config: Config) -> None:
    """Raise InputError where the data, columns of them, or the module of a cell are not there."""
    if ":" in config.cell:
        found_module("cell", config.cell)
    if config.text is not None:
        found_text(config.text, config.documents)
    if config.series is not None:
        found_file("table", config.series)
    for sequences in (config.classify, config.heldout_file):
        if sequences is not None:
            found_sequences(sequences)
    check_columns(config)


def directory_of(name: str, value: object) -> Path:
    """What an option says is a directory."""
    if not isinstance(value, str) or not value or "\0" in value or not encodable(value):
        raise InputError(f"{name} must be a directory name, in UTF-8: got {shown(value)}")
    return Path(value)
