"""One process at a time writes to a run directory."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bptt.train import InputError, RunDirectory, fit, generate, lock, resume, start
from bptt.train.trained import load

from .tiny import tiny, write_text

HOLD = """
import fcntl, json, os, socket, sys
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX)
file.truncate(0)
file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
file.flush()
print("held", flush=True)
sys.stdin.read()
"""
"""Another program that takes the lock by the same rules."""

FORK = """
import os, sys, time
from pathlib import Path
from bptt.train import lock
lock.acquire(Path(sys.argv[1]))
if os.fork() == 0:
    print(os.getpid(), flush=True)  # what is done in a child at its beginning is done
time.sleep(600)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    trainer, run = start(tiny(write_text(tmp_path), steps=8), tmp_path / "run")
    fit(trainer, run)
    return tmp_path / "run"


@pytest.fixture
def holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", HOLD, str(path / lock.NAME)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_run_in_use_is_refused_and_left_as_it_is(path: Path, holder: subprocess.Popen[str]):
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    text = path.parent / "text.txt"
    message = rf"is in use by process {holder.pid} on {socket.gethostname()}: wait for it, or stop it$"
    trainer, _ = start(tiny(text), path.parent / "other")
    for call in (
        lambda: resume(path, steps=20),
        lambda: start(tiny(text), path, overwrite=True),
        lambda: fit(trainer, RunDirectory.open(path)),
    ):
        with pytest.raises(InputError, match=message):
            call()
    assert {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} == before
    model, vocabulary, _ = load(RunDirectory.open(path))  # readers need no lock
    assert len(list(generate(model, vocabulary, [1], 5))) == 5


def test_the_lock_of_a_dead_process_is_taken_over(path: Path, holder: subprocess.Popen[str]):
    holder.kill()
    holder.wait()
    assert (path / lock.NAME).exists()
    trainer, run = resume(path, steps=20)
    assert json.loads((path / lock.NAME).read_text()) == {"pid": os.getpid(), "host": socket.gethostname()}
    assert fit(trainer, run) is None
    assert not (path / lock.NAME).exists()


def test_the_lock_is_the_process_s_and_goes_at_the_end_of_fit(path: Path):
    trainer, run = resume(path, steps=20)
    assert resume(path, steps=20)[0].step == 8
    with pytest.raises(InputError, match="hidden cannot change"):
        resume(path, hidden=3)
    assert not (path / lock.NAME).exists()
    fit(trainer, run)
    assert not (path / lock.NAME).exists()
    run.release()  # once more: nothing happens


@pytest.mark.slow
def test_a_forked_child_does_not_keep_its_dead_parent_s_lock(path: Path):
    with subprocess.Popen([sys.executable, "-c", FORK, str(path)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        with pytest.raises(InputError, match=f"in use by process {parent.pid} "):
            lock.acquire(path)
        parent.kill()
        parent.wait()
        try:
            lock.acquire(path)
            lock.release(path)
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_lock_whose_file_was_removed_meanwhile_is_asked_for_again(path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its holder removes the file before it lets go, so that the one who waited locks what has no name."""
    real: Callable[[int, int], None] = fcntl.flock
    calls = []

    def flock(handle: int, how: int) -> None:
        if not calls:
            (path / lock.NAME).unlink()
        calls.append(handle)
        real(handle, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    lock.acquire(path)
    assert len(calls) == 2
    with (path / lock.NAME).open("a") as file, pytest.raises(BlockingIOError):
        real(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    lock.release(path)


def test_a_directory_that_was_made_again_is_locked_again(path: Path):
    lock.acquire(path)
    shutil.rmtree(path)
    path.mkdir()
    lock.acquire(path)
    assert json.loads((path / lock.NAME).read_text())["pid"] == os.getpid()
    lock.release(path)


def entry(pid: int, host: str | None = None) -> str:
    return json.dumps({"pid": pid, "host": socket.gethostname() if host is None else host})


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_flock_the_name_decides(path: Path, monkeypatch: pytest.MonkeyPatch, number: int):
    def flock(handle: int, how: int) -> None:
        raise OSError(number, os.strerror(number))

    with subprocess.Popen([sys.executable, "-S", "-c", "pass"]) as dead:
        pass
    monkeypatch.setattr(fcntl, "flock", flock)
    file = path / lock.NAME
    for content in (None, "", "garbage", "[1]", '{"pid": "x"}', entry(dead.pid), entry(os.getpid())):
        if content is not None:
            file.write_text(content)
        lock.acquire(path)
        assert file.read_text() == entry(os.getpid())
        lock.release(path)
        assert not file.exists()
    refused: dict[str, str] = {
        entry(os.getppid()): rf"in use by process {os.getppid()} on {socket.gethostname()}: wait for it, or stop it$",
        entry(1, "elsewhere"): rf"in use by process 1 on elsewhere: .* \(if it is not there any more, delete {file}\)",
    }
    for content, message in refused.items():
        file.write_text(content)
        with pytest.raises(InputError, match=message):
            lock.acquire(path)
        assert file.read_text() == content


def test_another_failure_of_the_lock_is_not_taken_for_its_absence(path: Path, monkeypatch: pytest.MonkeyPatch):
    def flock(*arguments: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="Input/output error"):
        resume(path)
