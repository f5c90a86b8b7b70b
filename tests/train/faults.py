"""A disk that fails at the n-th thing done to it."""

from __future__ import annotations

import errno
import io
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

CREATES = {"open", "mkdir", "write", "pwrite"}
"""What needs space."""


def not_waiting(file: int) -> None:
    """In the place of os.fsync: a process that is killed loses nothing of what it wrote, only a machine would."""
    os.fstat(file)


class Disk:
    """Counts what is done to the disk: files made, written, flushed, renamed, removed.

    fault: what happens at the n-th, counted from 1.
      kill: the process is killed just before it; a write is cut in half.
      error: it fails with EIO, once; a write is cut in half.
      interrupt: Ctrl-C is pressed just before it, once.
      full: from then on nothing has space; the first write is cut in half.
    """

    def __init__(self, at: int, fault: str) -> None:
        self.at, self.fault, self.count = at, fault, 0

    def fails(self, what: str) -> bool:
        self.count += 1
        if self.fault == "full":
            return self.count >= self.at and what in CREATES
        return self.count == self.at

    def fail(self) -> None:
        if self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "interrupt":
            raise KeyboardInterrupt
        number = errno.ENOSPC if self.fault == "full" else errno.EIO
        raise OSError(number, os.strerror(number))

    def call(self, what: str, real: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        counts = what != "open" or bool(arguments[1] & os.O_CREAT)
        if counts and self.fails(what):
            self.fail()
        return real(*arguments, **options)

    def opened(self, real: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        file = real(*arguments, **options)
        if file.writable():
            file.write = partial(self.write, file, file.write)
        return file

    def write(self, file: Any, real: Callable[[Any], int], data: Any) -> int:
        if self.fails("write"):
            real(data[: len(data) // 2])
            file.flush()
            self.fail()
        return real(data)


@contextmanager
def failing(disk: Disk) -> Iterator[None]:
    """Inside `with`, what this process does goes through `disk`."""
    names = ["open", "mkdir", "fsync", "replace", "unlink", "rmdir", "pwrite"]
    kept = {name: getattr(os, name) for name in names}
    plain = io.open
    for name, real in kept.items():
        setattr(os, name, partial(disk.call, name, real))
    io.open = partial(disk.opened, plain)  # behind Path.open and os.fdopen
    try:
        yield
    finally:
        io.open = plain
        for name, real in kept.items():
            setattr(os, name, real)
