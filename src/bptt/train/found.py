"""Whether what somebody names is there: asked before anything heavy is loaded, torch above all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from .errors import InputError

__all__ = [
    "CONFIG",
    "SEQUENCES",
    "STORED",
    "found_directory",
    "found_file",
    "found_run",
    "found_sequences",
    "found_text",
    "opening",
]

CONFIG = "config.toml"
"""The file that makes a directory a run's."""

STORED = {"text": "vocabulary.json", "series": "scaling.json", "classify": "classes.json"}
"""The file of a run that says what its network's numbers mean, by task."""

SEQUENCES = {
    ".csv": "a table of long form",
    ".tsv": "likewise",
    ".parquet": "likewise",
    ".npz": "arrays x, y and lengths or offsets",
    ".ts": "aeon's and sktime's form",
}
"""The endings of files of sequences, and what such a file is."""


@contextmanager
def opening(file: Path) -> Iterator[BinaryIO]:
    """The file, open inside `with`. InputError where that fails, there or inside."""
    try:
        with file.open("rb") as opened:
            yield opened
    except OSError as error:
        raise InputError(f"cannot read text {file}: {error.strerror}") from None


def found_file(what: str, path: str) -> None:
    """Raise InputError where a file cannot be read. what: it is, in words."""
    try:
        with Path(path).open("rb"):
            pass
    except OSError as error:
        raise InputError(f"cannot read {what} {path}: {error.strerror}") from None


def found_sequences(path: str) -> None:
    """Raise InputError for a file of sequences that has another ending than theirs, or cannot be read."""
    if Path(path).suffix.lower() not in SEQUENCES:
        forms = ", ".join(f"{end} ({what})" for end, what in SEQUENCES.items())
        raise InputError(f"sequences must be in a file of one of the forms {forms}: got {path}")
    found_file("sequences", path)


def found_text(text: str, documents: str | None) -> None:
    """Raise InputError where a text is not there, or is a directory and is to be a file, or the other way round."""
    if documents == "files":
        found_directory(Path(text))
    else:
        with opening(Path(text)):
            pass


def found_directory(folder: Path) -> None:
    """Raise InputError where there is no such directory of documents."""
    if not folder.is_dir():
        raise InputError(f"documents must be in a directory: {folder} is none")


def found_run(path: Path) -> None:
    """Raise InputError for a directory that is no run's."""
    if not (path / CONFIG).is_file():
        raise InputError(f"{path} is not a run directory: it has no {CONFIG}")
