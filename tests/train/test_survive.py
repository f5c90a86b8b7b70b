"""A run that is killed, or whose disk fails, and is resumed equals one that was left alone, bit for bit."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bptt.train import RunDirectory, Step, fit, lock, resume, start

from .faults import Disk, failing, not_waiting
from .killing import LONG, OTHER, SHORT
from .outcomes import assert_same, outcome
from .tiny import tiny, write_text

pytestmark = pytest.mark.slow

KILLS = 20
WARNINGS = ["-W", "error", "-W", "ignore:This process:DeprecationWarning"]
"""From Python 3.12 on forking warns where a library has threads; the server's have nothing to do then."""


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", not_waiting)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """The runs that were killed and came to their end, by the way they were killed; one process imports for all."""
    folder = tmp_path_factory.mktemp("killed")
    done = subprocess.run(
        [sys.executable, *WARNINGS, "-m", "train.killing", str(folder), str(KILLS // len(LONG))],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    runs: dict[str, list[Path]] = {}
    for path in map(Path, done.stdout.splitlines()):
        runs.setdefault(path.relative_to(folder).parts[0], []).append(path)
    return runs


NEW = {
    *map(Path, ("config.toml", "vocabulary.json", "weights.safetensors")),
    *map(Path, ("checkpoints", "checkpoints/step-00000000.ckpt", "flow", "flow/report.html")),
}
"""What a run has at its beginning, in a directory where another file lies."""


def names(path: Path) -> set[Path]:
    return {file.relative_to(path) for file in path.rglob("*")}


def contents(path: Path) -> dict[Path, bytes]:
    return {file.relative_to(path): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_killed_at_random_moments(served: dict[str, list[Path]]):
    runs = served["moments"]
    assert {run.parent.name for run in runs} == {str(kind) for kind in range(len(LONG))}
    for run in runs:
        assert_same(outcome(run), outcome(run.parent / "whole"), f"{run.parent.name}: {run.name}")


def test_killed_at_what_is_done_to_the_disk(served: dict[str, list[Path]]):
    runs = served["writes"]
    expected = outcome(runs[0].parent / "whole")
    assert len(runs) > 25
    for run in runs:
        assert_same(outcome(run), expected, run.name)
        assert not [path for path in run.rglob("*") if path.name.endswith((".part", ".lock"))]


def test_a_run_killed_as_it_takes_another_s_place(served: dict[str, list[Path]]):
    """Up to some moment the old one is there, from then on the new one: whole, and nothing else."""
    runs = served["overwrites"]
    folder = runs[0].parent
    outcomes = {name: outcome(folder / name) for name in ("old", "new")}
    there = ["new" if RunDirectory.open(run).config().cell == OTHER["cell"] else "old" for run in runs]
    assert there == sorted(there, reverse=True)
    assert min(map(there.count, outcomes)) > 5
    for run, which in zip(runs, there, strict=True):
        assert_same(outcome(run), outcomes[which], run.name)
        assert names(run) == names(folder / which)


@pytest.mark.parametrize("fault", ["full", "error", "interrupt"])
def test_a_run_is_there_until_one_in_its_place_has_begun(tmp_path: Path, fault: str):
    """Whatever of its beginning fails: the old run with every byte or, once it is saved, the new one."""
    text, path, old = write_text(tmp_path), tmp_path / "run", tmp_path / "old"
    fit(*start(tiny(text, **SHORT), old))
    (old / "flow").mkdir()
    (old / "flow" / "report.html").write_text("mine")
    shutil.copytree(old, path)
    there: list[str] = []
    for number in itertools.count(1):
        disk = Disk(number, fault)
        try:
            with failing(disk):
                start(tiny(text, **OTHER), path, overwrite=True)
        except (OSError, KeyboardInterrupt):
            assert not (path / lock.NAME).exists()
            there.append("old" if contents(path) == contents(old) else "new")
            trainer, run = resume(path)
            run.release()
            assert trainer.step == {"old": SHORT["steps"], "new": 0}[there[-1]], number
            assert trainer.config.hidden == {"old": 8, "new": OTHER["hidden"]}[there[-1]], number
        else:
            RunDirectory(path).release()
            there.append("new")
        if there[-1] == "new":
            assert names(path) - {Path("metrics.jsonl")} == NEW
            shutil.rmtree(path)
            shutil.copytree(old, path)
        if disk.count < number:
            break
    assert there == sorted(there, reverse=True)
    assert there.count("old") > 20


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
