"""One process at a time writes to a run directory.

The lock is an advisory `flock` on `run.lock`, which names its holder. It goes with the process, however that ends, so
a lock left by a dead process is simply taken. On a file system without `flock` the name alone decides: a live
process of this host holds it, a dead one does not, and of another host nothing can be known, so that it is refused.
There, two processes that begin in the same instant may both get it.
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import json
import os
import socket
from contextlib import suppress
from pathlib import Path

from .errors import InputError

__all__ = ["NAME", "acquire", "release"]

NAME = "run.lock"

WITHOUT = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
"""What `flock` answers where a file system has no locks."""

_held: dict[Path, int] = {}
"""The directories this process holds, with the open file of each."""


def acquire(directory: Path) -> None:
    """Make this process the holder of a directory; nothing changes where it is already.

    Raises InputError, naming the holder, where another live process is. Raises OSError where the directory cannot be
    written.
    """
    directory = directory.resolve()
    path = directory / NAME
    if directory in _held:
        if _same(_held[directory], path):
            return
        os.close(_held.pop(directory))  # the directory was removed and made again
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _locked(handle, directory):
                _refuse(handle, directory, path)
            if _same(handle, path):
                break
            os.close(handle)  # its last holder removed it meanwhile: what is locked has no name any more
        except BaseException:
            os.close(handle)
            raise
    _held[directory] = handle
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)


def release(directory: Path) -> None:
    """Give a directory up, and remove the lock's file; nothing happens where this process is not its holder."""
    directory = directory.resolve()
    handle = _held.pop(directory, None)
    if handle is not None:
        with suppress(OSError):  # the directory may be gone
            (directory / NAME).unlink(missing_ok=True)  # before the lock goes, so that nobody else's is removed
        os.close(handle)


def _locked(handle: int, directory: Path) -> bool:
    """Whether the lock could be had."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in WITHOUT:
            raise
        pid, host = _holder(handle)
        return pid is None or (host == socket.gethostname() and (pid == os.getpid() or not _alive(pid)))
    return True


def _refuse(handle: int, directory: Path, path: Path) -> None:
    pid, host = _holder(handle)
    who = "another process" if pid is None else f"process {pid} on {host}"
    elsewhere = "" if host in (None, socket.gethostname()) else f" (if it is not there any more, delete {path})"
    raise InputError(f"{directory} is in use by {who}: wait for it, or stop it{elsewhere}")


def _holder(handle: int) -> tuple[int | None, str | None]:
    """The process and the host written in a lock's file; None where there is nothing that can be read."""
    try:
        entries = json.loads(os.pread(handle, 4096, 0))
        return int(entries["pid"]), str(entries["host"])
    except (ValueError, KeyError, TypeError):
        return None, None


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError, ValueError):
        return False
    except PermissionError:
        return True
    return True


def _same(handle: int, path: Path) -> bool:
    """Whether the open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _release_all() -> None:
    for directory in list(_held):
        release(directory)


def _forget() -> None:
    """In a forked child: the parent's locks are not the child's, which must not keep them when the parent dies."""
    for handle in _held.values():
        os.close(handle)
    _held.clear()


atexit.register(_release_all)
os.register_at_fork(after_in_child=_forget)
