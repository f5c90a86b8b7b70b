from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from bptt.train import InputError, NonFiniteError, RunDirectory, Step, atomic, fit, resume, start

from .tiny import TEXT, tiny, write_text


def outcome(run: RunDirectory) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    metrics = [{k: v for k, v in r.items() if k != "tokens_per_second"} for r in run.metrics()]
    return run.weights(), metrics


def names(path: Path) -> list[str]:
    return sorted(str(file.relative_to(path)) for file in path.rglob("*"))


class CrashError(Exception):
    pass


@pytest.mark.parametrize("batching", ["sequential", "random"])
@pytest.mark.parametrize("crash", [3, 7, 12, 19])
def test_a_run_that_crashed_and_was_resumed_equals_one_that_did_not(tmp_path: Path, crash: int, batching: str):
    config = tiny(write_text(tmp_path), dropout=0.2, gradient="randomized:0.8", batching=batching)
    whole, whole_run = start(config, tmp_path / "whole")
    assert fit(whole, whole_run) is None

    def die(step: Step) -> None:
        if step.step == crash:
            raise CrashError

    first, _ = start(config, tmp_path / "crashed")
    with pytest.raises(CrashError):
        fit(first, RunDirectory.open(tmp_path / "crashed"), on_step=die)
    second, run = resume(tmp_path / "crashed")
    assert second.step == crash // 7 * 7 - (7 if crash % 7 == 0 else 0)  # saved every 7 steps, after on_step
    assert fit(second, run) is None

    weights, metrics = outcome(run)
    expected_weights, expected_metrics = outcome(whole_run)
    torch.testing.assert_close(weights, expected_weights, rtol=0, atol=0)
    assert metrics == expected_metrics
    assert [m["step"] for m in metrics] == [3, 6, 8, 9, 12, 15, 16, 18, 20]


def test_twenty_steps_are_ten_and_a_resume_to_twenty(tmp_path: Path):
    text = write_text(tmp_path)
    whole, whole_run = start(tiny(text, steps=20), tmp_path / "whole")
    fit(whole, whole_run)
    first, run = start(tiny(text, steps=10), tmp_path / "run")
    fit(first, run)
    second, run = resume(tmp_path / "run", steps=20)
    fit(second, run)
    torch.testing.assert_close(run.weights(), whole_run.weights(), rtol=0, atol=0)
    assert run.config().steps == 20


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_its_step_and_resuming_goes_on_exactly(tmp_path: Path, number: int):
    config = tiny(write_text(tmp_path))
    whole, whole_run = start(config, tmp_path / "whole")
    fit(whole, whole_run)

    def interrupt(step: Step) -> None:
        if step.step == 11:
            signal.raise_signal(number)  # in this thread: it is seen at once

    before = signal.getsignal(number)
    first, run = start(config, tmp_path / "run")
    assert fit(first, run, on_step=interrupt) == number
    assert signal.getsignal(number) is before
    second, run = resume(tmp_path / "run")
    assert second.step == 11
    assert fit(second, run) is None
    weights, metrics = outcome(run)
    torch.testing.assert_close(weights, outcome(whole_run)[0], rtol=0, atol=0)
    assert metrics == outcome(whole_run)[1]


def test_a_second_ctrl_c_does_not_wait(tmp_path: Path):
    def twice(step: Step) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    trainer, run = start(tiny(write_text(tmp_path)), tmp_path / "run")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            fit(trainer, run, on_step=twice)
    finally:
        signal.signal(signal.SIGINT, before)
    assert resume(tmp_path / "run")[0].step == 0


def test_a_run_that_diverges_keeps_its_last_checkpoint(tmp_path: Path):
    trainer, run = start(tiny(write_text(tmp_path)), tmp_path / "run")

    def spoil(step: Step) -> None:
        if step.step == 10:
            with torch.no_grad():
                trainer.model.output.bias.fill_(float("nan"))

    with pytest.raises(NonFiniteError, match=r"step 11: .*last checkpoint in .* is kept"):
        fit(trainer, run, on_step=spoil)
    assert resume(tmp_path / "run")[0].step == 7
    assert all(bool(w.isfinite().all()) for w in run.weights().values())


@pytest.mark.parametrize(
    "options", [{"text": "missing.txt"}, {"batch": 5000}, {"heldout": 0.001}, {"device": "cuda:99"}]
)
def test_nothing_is_written_when_the_run_cannot_begin(tmp_path: Path, options: dict[str, Any]):
    config = tiny(write_text(tmp_path)).override(**options)
    with pytest.raises(InputError):
        start(config, tmp_path / "deep" / "run")
    assert not (tmp_path / "deep").exists()


def test_a_disk_that_fills_up_at_the_start_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    replace = os.replace

    def fail(source: str, target: Path) -> None:
        if target.suffix == ".ckpt":
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    (tmp_path / "there").mkdir()
    for path in (tmp_path / "run", tmp_path / "a" / "b" / "run", tmp_path / "there" / "a" / "run"):
        with pytest.raises(OSError, match="No space left"):
            start(tiny(write_text(tmp_path)), path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["text.txt", "there"]


def test_no_directory_stays_where_the_next_one_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    mkdir = os.mkdir

    def fail(path: Path, *mode: int) -> None:
        if path.name == "c":
            raise OSError(28, "No space left on device")
        mkdir(path, *mode)

    config = tiny(write_text(tmp_path))
    monkeypatch.setattr(os, "mkdir", fail)
    with pytest.raises(OSError, match="No space left"):
        start(config, tmp_path / "a" / "b" / "c")
    assert not (tmp_path / "a").exists()


def test_the_names_of_new_directories_are_flushed_to_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    flushed = []
    flush = atomic.flush_directory

    def note(path: Path) -> None:
        flushed.append(path)
        flush(path)

    monkeypatch.setattr(atomic, "flush_directory", note)
    start(tiny(write_text(tmp_path)), tmp_path / "a" / "run")
    assert flushed[:2] == [tmp_path, tmp_path / "a"]
    assert {tmp_path / "a" / "run", tmp_path / "a" / "run" / "checkpoints"} <= set(flushed)


def test_what_a_process_killed_at_its_beginning_left_is_no_run(tmp_path: Path):
    """Before the configuration is in its place there is none, and a new one begins in the same directory."""
    config, path = tiny(write_text(tmp_path)), tmp_path / "run"
    _, run = start(config, tmp_path / "other")
    for left in (run.beginning, run.begun):
        path.mkdir()
        shutil.copytree(run.path, path / left.name)
        with pytest.raises(InputError, match="is not a run directory"):
            resume(path)
        assert start(config, path)[0].step == 0
        assert names(path) == names(run.path)
        shutil.rmtree(path)


def test_an_old_run_survives_a_new_one_that_cannot_begin(tmp_path: Path):
    text = write_text(tmp_path)
    start(tiny(text), tmp_path / "run")
    with pytest.raises(InputError, match="too short"):
        start(tiny(text, batch=5000), tmp_path / "run", overwrite=True)
    assert resume(tmp_path / "run")[0].config.batch == 4


def test_resuming_is_refused_for_another_text_or_another_network(tmp_path: Path):
    text = write_text(tmp_path)
    start(tiny(text), tmp_path / "run")
    with pytest.raises(InputError, match="hidden cannot change when a run is resumed: it was 8, got 9; only steps"):
        resume(tmp_path / "run", hidden=9)
    text.write_text(TEXT.replace("fox", "dog"), encoding="utf-8")
    with pytest.raises(InputError, match="the text is not the one this run began with"):
        resume(tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 10}, "already at step 20; give more steps: got steps=10$"),
        ({"steps": 19}, "already at step 20; give more steps: got steps=19$"),
        ({"epochs": 1}, "already at step 21; give more epochs: got epochs=1, 21 steps$"),
    ],
)
def test_a_run_that_has_had_its_steps_is_left_as_it_was(tmp_path: Path, changes: dict[str, int], message: str):
    steps = 21 if "epochs" in changes else 20
    trainer, run = start(tiny(write_text(tmp_path), steps=steps), tmp_path / "run")
    assert trainer.batches.windows(0) == 21
    fit(trainer, run)
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=message):
        resume(tmp_path / "run", **changes)
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before
    again, run = resume(tmp_path / "run")
    assert again.finished


def test_the_perplexity_of_an_epoch_survives_a_resume(tmp_path: Path):
    text = write_text(tmp_path)
    whole, whole_run = start(tiny(text, epochs=2), tmp_path / "whole")
    fit(whole, whole_run)
    first, run = start(tiny(text, steps=30), tmp_path / "run")  # in the middle of the second epoch
    fit(first, run)
    second, run = resume(tmp_path / "run", epochs=2)
    fit(second, run)
    assert run.metrics()[-1]["epoch_perplexity"] == whole_run.metrics()[-1]["epoch_perplexity"]


def test_a_vocabulary_that_was_altered_is_refused(tmp_path: Path):
    _, run = start(tiny(write_text(tmp_path)), tmp_path / "run")
    run.stored_file.write_text(run.stored_file.read_text().replace('"q"', '"Q"'))
    with pytest.raises(InputError, match=r"vocabulary\.json is not the vocabulary of the text"):
        resume(tmp_path / "run")


def test_resuming_finds_a_text_given_by_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_text(tmp_path)
    monkeypatch.chdir(tmp_path)
    start(tiny(Path("text.txt")), Path("run"))
    monkeypatch.chdir(tmp_path.parent)
    assert resume(tmp_path / "run")[0].step == 0


def test_a_text_that_moved_can_be_pointed_to(tmp_path: Path):
    text = write_text(tmp_path)
    start(tiny(text), tmp_path / "run")
    moved = text.rename(tmp_path / "moved.txt")
    with pytest.raises(InputError, match="cannot read text"):
        resume(tmp_path / "run")
    assert resume(tmp_path / "run", text=str(moved))[0].step == 0
    assert resume(tmp_path / "run")[0].step == 0


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path):
    text = write_text(tmp_path)
    start(tiny(text), tmp_path / "run")
    _, other = start(tiny(text, hidden=9), tmp_path / "other")
    [checkpoint] = other.checkpoints.iterdir()
    checkpoint.replace(tmp_path / "run" / "checkpoints" / checkpoint.name)
    with pytest.raises(InputError, match="the checkpoint does not fit the configuration"):
        resume(tmp_path / "run")
