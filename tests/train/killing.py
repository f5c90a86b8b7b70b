"""Runs that are killed: a server that imports once and forks a process for every life of a run.

    python -m train.killing FOLDER KILLS

Works in FOLDER/moments: killed at random moments; FOLDER/writes: at every second thing that is done to the disk;
FOLDER/overwrites: at every thing done to it as a new run takes an old one's place. Prints the directories of the runs
that came to their end.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch

from bptt.train import InputError, fit, resume, start

from .faults import Disk, failing, not_waiting
from .tiny import TEXT, of_task, tiny

DRAWN: dict[str, Any] = {"dropout": 0.2, "gradient": "randomized:0.8"}
LONG: list[dict[str, Any]] = [
    {"steps": 150, **DRAWN},
    {"steps": 150, **DRAWN, "batching": "random"},
    {"steps": 150, **DRAWN, "documents": "lines", "cell": "lstm"},
    {"steps": 75, **DRAWN, "accumulate": 2},
    {"steps": 150, **DRAWN, "task": "series"},
    {"steps": 75, **DRAWN, "task": "classify", "accumulate": 2, "cell": "mgu"},
]
LINES = "".join(f"{TEXT[i : i + 3 + 13 * i % 37]}\n" for i in range(40))
SHORT: dict[str, Any] = {"steps": 6, "save_every": 3, "log_every": 2, "eval_every": 6, "keep": 2, "dropout": 0.2}
OTHER: dict[str, Any] = {"steps": 2, "hidden": 5, "cell": "lstm"}


def live(path: Path, options: dict[str, Any]) -> None:
    """Go on with a run, or begin it."""
    try:
        trainer, run = resume(path)
    except InputError:  # killed before there was a run; if it is anything else, `start` fails as well
        folder, task = path.parent, options.get("task", "text")
        given = {name: value for name, value in options.items() if name != "task"}
        config = tiny(folder / "text.txt", **given) if task == "text" else of_task(folder, task, **given)
        trainer, run = start(config, path)
    assert fit(trainer, run) is None


def forked(work: Callable[[], object], disk: Disk | None = None) -> int:
    """A process that does its work."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            if disk is None:
                work()
            else:
                with failing(disk):
                    work()
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
    """Of each kind of run, lives of random length, until so many were cut short."""
    draw = random.Random(7)
    for kind, options in enumerate(LONG):
        within = folder / str(kind)
        within.mkdir()
        (within / "text.txt").write_text(LINES if "documents" in options else TEXT, encoding="utf-8")
        begun = time.monotonic()
        assert ended(forked(partial(live, within / "whole", options)))
        whole = time.monotonic() - begun
        killed = 0
        for number in count():
            path = within / f"run{number}"
            while killed < kills:
                pid = forked(partial(live, path, options))
                time.sleep(draw.uniform(0, whole / 3))
                os.kill(pid, signal.SIGKILL)
                if ended(pid):
                    break
                killed += 1
            else:
                assert ended(forked(partial(live, path, options)))
            print(path)
            if killed == kills:
                break


def writes(folder: Path) -> None:
    """One run for every second thing that is done to the disk, killed just before it and then brought to its end."""
    assert ended(forked(partial(live, folder / "whole", SHORT)))
    for number in count(1, 2):
        path = folder / f"run{number}"
        if ended(forked(partial(live, path, SHORT), Disk(number, "kill"))):
            return
        live(path, SHORT)
        print(path)


def overwrites(folder: Path) -> None:
    """A run that came to its end, for everything that another in its place does to the disk at its beginning: killed
    just before it, whichever of the two is there then is brought to its end."""
    assert ended(forked(partial(live, folder / "old", SHORT)))
    assert ended(forked(partial(live, folder / "new", OTHER)))
    for number in count(1):
        path = folder / f"run{number}"
        shutil.copytree(folder / "old", path)
        new = partial(start, tiny(folder / "text.txt", **OTHER), path, overwrite=True)
        if ended(forked(new, Disk(number, "kill"))):
            return
        fit(*resume(path))
        print(path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.fsync = not_waiting
    within = Path(sys.argv[1])
    (within / "text.txt").write_text(TEXT, encoding="utf-8")
    live(within / "first", SHORT)  # what torch imports when it is needed is then there in every life
    for name, work in (
        ("moments", partial(moments, kills=int(sys.argv[2]))),
        ("writes", writes),
        ("overwrites", overwrites),
    ):
        folder = within / name
        folder.mkdir()
        (folder / "text.txt").write_text(TEXT, encoding="utf-8")
        work(folder)
