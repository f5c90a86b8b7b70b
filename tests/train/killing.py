"""Runs that are killed: a server that imports once and forks a process for every life of a run.

    python -m train.killing moments FOLDER KILLS    # at random moments
    python -m train.killing writes FOLDER           # at every second thing that is done to the disk

Prints the directories of the runs that came to their end.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from itertools import count
from pathlib import Path
from typing import Any

import torch

from bptt.train import InputError, fit, resume, start

from .faults import Disk, failing
from .tiny import TEXT, tiny

LONG: dict[str, Any] = {"steps": 200, "dropout": 0.2, "gradient": "randomized:0.8", "batching": "random"}
SHORT: dict[str, Any] = {"steps": 6, "save_every": 3, "log_every": 2, "eval_every": 6, "keep": 2, "dropout": 0.2}


def live(path: Path, options: dict[str, Any]) -> None:
    """Go on with a run, or begin it."""
    try:
        trainer, run = resume(path)
    except InputError:  # killed before there was a run; if it is anything else, `start` fails as well
        trainer, run = start(tiny(path.parent / "text.txt", **options), path)
    assert fit(trainer, run) is None


def forked(path: Path, options: dict[str, Any], disk: Disk | None = None) -> int:
    """A process that lives."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            if disk is None:
                live(path, options)
            else:
                with failing(disk):
                    live(path, options)
            status = 0
        finally:
            sys.stderr.flush()
            os._exit(status)
    return pid


def ended(pid: int) -> bool:
    """Whether a process came to its end, once it is gone; False where it was killed."""
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    assert status == 0, "see stderr"
    return True


def moments(folder: Path, kills: int) -> None:
    """Lives of random length, until so many were cut short."""
    draw = random.Random(7)
    begun = time.monotonic()
    assert ended(forked(folder / "whole", LONG))
    whole = time.monotonic() - begun
    killed = 0
    for number in count():
        path = folder / f"run{number}"
        while killed < kills:
            pid = forked(path, LONG)
            time.sleep(draw.uniform(0, whole / 6))
            os.kill(pid, signal.SIGKILL)
            if ended(pid):
                break
            killed += 1
        else:
            assert ended(forked(path, LONG))
        print(path)
        if killed == kills:
            return


def writes(folder: Path) -> None:
    """One run for every second thing that is done to the disk, killed just before it and then brought to its end."""
    assert ended(forked(folder / "whole", SHORT))
    for number in count(1, 2):
        path = folder / f"run{number}"
        if ended(forked(path, SHORT, Disk(number, "kill"))):
            return
        live(path, SHORT)
        print(path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[2])
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    moments(folder, int(sys.argv[3])) if sys.argv[1] == "moments" else writes(folder)
