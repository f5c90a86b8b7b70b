"""Files that are whole or not there."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

__all__ = ["SUFFIX", "flush_directory", "sweep", "write"]

SUFFIX = ".part"
"""Of a file that is being written."""


def write(path: Path, *parts: bytes | memoryview) -> None:
    """Replace `path` by the parts, joined, so that a crash at any moment leaves the old file or the new one.

    Written beside it, flushed to disk, renamed, and the directory flushed. On an error the new file is removed; what a
    killed process leaves, `sweep` finds. Raises OSError, which names `path`.
    """
    try:
        _write(path, parts)
    except OSError as error:  # which names the new file, or, of a full disk, none
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def _write(path: Path, parts: tuple[bytes | memoryview, ...]) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=SUFFIX)
    try:
        with os.fdopen(handle, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())  # mkstemp makes files that only the owner can read
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    flush_directory(path.parent)


def sweep(folder: Path) -> None:
    """Remove what processes killed inside `write` have left in a folder, which no live process may be writing to."""
    if folder.is_dir():
        for left in folder.glob(f".*{SUFFIX}"):
            left.unlink(missing_ok=True)


def flush_directory(path: Path) -> None:
    """Make renames inside a directory durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
