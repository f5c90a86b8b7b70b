from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from bptt.train import Config, InputError, NonFiniteError, Record, RunDirectory, Vocabulary, atomic

VOCABULARY = Vocabulary("char", ("<unk>", "a"), (0, 3))


def state(step: int = 0, value: float = 1.0) -> dict[str, object]:
    return {"model": {"w": torch.full((3,), value)}, "position": {"step": step}}


def record(step: int) -> Record:
    return Record(step, 0, 10, 1.0, 2.718, None, None, None, 0.5, 0.0, 100.0)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory.vacant(tmp_path / "a" / "run", overwrite=False)
    run.create(Config(), VOCABULARY)
    run.save(state())
    return run


def test_what_was_written_is_read(run: RunDirectory):
    assert RunDirectory.open(run.path).config() == Config()
    assert run.vocabulary() == VOCABULARY
    torch.testing.assert_close(run.weights(), {"w": torch.ones(3)})
    torch.testing.assert_close(run.state()["model"], {"w": torch.ones(3)})
    assert sorted(p.name for p in run.path.iterdir()) == [
        "config.toml",
        "state.pt",
        "vocabulary.json",
        "weights.safetensors",
    ]


def test_a_run_is_not_overwritten_unasked(run: RunDirectory):
    with pytest.raises(InputError, match=r"holds a run: give --resume .*, --overwrite, or another --out"):
        RunDirectory.vacant(run.path, overwrite=False)
    RunDirectory.vacant(run.path, overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_not_a_run_is_never_overwritten(tmp_path: Path, overwrite: bool):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="not empty and not a run directory"):
        RunDirectory.vacant(tmp_path, overwrite)
    with pytest.raises(InputError, match="is a file"):
        RunDirectory.vacant(tmp_path / "thesis.tex", overwrite)


def test_a_new_run_in_an_old_place_keeps_no_old_metrics(run: RunDirectory):
    run.append(record(3))
    RunDirectory.vacant(run.path, overwrite=True).create(Config(hidden=3), VOCABULARY)
    assert run.metrics() == []
    assert not run.state_file.exists()
    assert run.config().hidden == 3


def test_metrics_are_rewound_and_a_torn_line_is_dropped(run: RunDirectory):
    for step in (10, 20, 30):
        run.append(record(step))
    with run.metrics_file.open("a") as file:
        file.write('{"step": 4')
    assert [r["step"] for r in run.metrics()] == [10, 20, 30]
    run.rewind(20)
    assert [r["step"] for r in run.metrics()] == [10, 20]
    run.append(record(25))
    assert [r["step"] for r in run.metrics()] == [10, 20, 25]


def test_weights_that_are_not_finite_never_replace_a_checkpoint(run: RunDirectory):
    before = run.state_file.read_bytes(), run.weights_file.read_bytes()
    with pytest.raises(NonFiniteError, match="weight w is not finite"):
        run.save(state(5, float("inf")))
    assert (run.state_file.read_bytes(), run.weights_file.read_bytes()) == before


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, call: str
):
    files = sorted(run.path.iterdir())

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(OSError, match="No space left"):
            run.save(state(5, 2.0))
    assert sorted(run.path.iterdir()) == files
    torch.testing.assert_close(run.state()["model"], {"w": torch.ones(3)})


def test_files_are_as_readable_as_any_other(tmp_path: Path):
    (tmp_path / "plain").write_bytes(b"")
    atomic.write(tmp_path / "ours", b"x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_directory_without_a_run_or_without_a_checkpoint(tmp_path: Path, run: RunDirectory):
    with pytest.raises(InputError, match=r"is not a run directory: it has no config\.toml"):
        RunDirectory.open(tmp_path)
    run.state_file.unlink()
    with pytest.raises(InputError, match=r"has no checkpoint: it lacks state\.pt"):
        run.state()
    run.weights_file.unlink()
    with pytest.raises(InputError, match=r"has no weights: it lacks weights\.safetensors"):
        run.weights()


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 cut off"])
def test_damaged_files_are_named(run: RunDirectory, content: bytes):
    run.state_file.write_bytes(content)
    with pytest.raises(InputError, match=r"state\.pt cannot be read"):
        run.state()
    run.weights_file.write_bytes(content)
    with pytest.raises(InputError, match=r"weights\.safetensors cannot be read"):
        run.weights()


def test_a_checkpoint_cut_short_is_named(run: RunDirectory):
    run.state_file.write_bytes(run.state_file.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"state\.pt cannot be read"):
        run.state()


def test_a_checkpoint_of_something_else_or_of_the_future(run: RunDirectory):
    torch.save([1, 2], run.state_file)
    with pytest.raises(InputError, match="is not a checkpoint of bptt train"):
        run.state()
    torch.save({"format": 99}, run.state_file)
    with pytest.raises(InputError, match="format 99, newer than 1: upgrade bptt"):
        run.state()


def test_metrics_that_are_not_json(run: RunDirectory):
    run.metrics_file.write_text("hello\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl has a line that is not JSON"):
        run.metrics()
