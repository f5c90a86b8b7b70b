"""A run that is killed, or whose disk fails, and is resumed equals one that was left alone, bit for bit."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bptt.train import Step, fit, resume, start

from .faults import Disk, failing
from .killing import SHORT
from .outcomes import assert_same, outcome
from .tiny import tiny, write_text

KILLS = 20
WARNINGS = ["-W", "error", "-W", "ignore:This process:DeprecationWarning"]
"""From Python 3.12 on forking warns where a library has threads; the server's have nothing to do then."""


def served(*arguments: object) -> list[Path]:
    done = subprocess.run(
        [sys.executable, *WARNINGS, "-m", "train.killing", *map(str, arguments)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return [Path(line) for line in done.stdout.splitlines()]


def test_killed_at_random_moments(tmp_path: Path):
    runs = served("moments", tmp_path, KILLS)
    expected = outcome(tmp_path / "whole")
    assert runs
    for run in runs:
        assert_same(outcome(run), expected, run.name)


def test_killed_at_what_is_done_to_the_disk(tmp_path: Path):
    runs = served("writes", tmp_path)
    expected = outcome(tmp_path / "whole")
    assert len(runs) > 25
    for run in runs:
        assert_same(outcome(run), expected, run.name)
        assert not [path for path in run.rglob("*") if path.name.endswith((".part", ".lock"))]


@pytest.mark.parametrize("fault", ["full", "error"])
def test_a_disk_that_fails_or_is_full(tmp_path: Path, fault: str):
    """Fails at every second thing done to it, is full at every fifth; what could not begin leaves nothing."""
    config = tiny(write_text(tmp_path), **SHORT)
    trainer, run = start(config, tmp_path / "whole")
    fit(trainer, run)
    expected = outcome(tmp_path / "whole")
    for number in itertools.count(2, 2 if fault == "error" else 5):
        path = tmp_path / f"run{number}"
        disk, begun = Disk(number, fault), False
        try:
            with failing(disk):
                trainer, run = start(config, path)
                begun = True
                fit(trainer, run)
        except OSError:
            if not begun:
                assert not path.exists(), number
                trainer, run = start(config, path)
            else:
                trainer, run = resume(path)
            fit(trainer, run)
        assert_same(outcome(path), expected, f"{fault} at {number}")
        left = {p.relative_to(path) for p in path.rglob("*")} - {Path("run.lock")}  # whose removal may have failed
        assert left == {p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*")}, number
        if disk.count < number:
            break
    assert number > 50


def test_the_generators_of_python_and_numpy_go_on_where_they_stood(tmp_path: Path):
    """What a callback draws after a resume is what it would have drawn."""
    drawn: dict[int, tuple[float, float, float]] = {}

    def draw(step: Step) -> None:
        drawn[step.step] = random.random(), np.random.rand(), np.random.randn()

    def crash(step: Step) -> None:
        draw(step)
        if step.step == 5:
            raise KeyError

    config = tiny(write_text(tmp_path), **SHORT)
    random.seed(1)
    np.random.seed(1)
    trainer, run = start(config, tmp_path / "whole")
    fit(trainer, run, on_step=draw)
    expected = dict(drawn)
    random.seed(1)
    np.random.seed(1)
    trainer, run = start(config, tmp_path / "run")
    with pytest.raises(KeyError):
        fit(trainer, run, on_step=crash)
    drawn.clear()
    random.seed(2)
    np.random.seed(2)
    trainer, run = resume(tmp_path / "run")
    fit(trainer, run, on_step=draw)
    assert drawn == {step: expected[step] for step in (4, 5, 6)}
