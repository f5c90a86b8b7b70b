"""Whether what somebody names is there: asked before anything heavy is loaded, torch above all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from .errors import InputError

__all__ = ["CONFIG", "found_directory", "found_run", "found_text", "opening"]

CONFIG = "config.toml"
"""The file that makes a directory a run's."""


@contextmanager
def opening(file: Path) -> Iterator[BinaryIO]:
    """The file, open inside `with`. InputError where that fails, there or inside."""
    try:
        with file.open("rb") as opened:
            yield opened
    except OSError as error:
        raise InputError(f"cannot read text {file}: {error.strerror}") from None


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
