from __future__ import annotations

import hashlib
import io
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from bptt.train import Config, InputError, NonFiniteError, Record, RunDirectory, Vocabulary, atomic, checkpoints
from bptt.train.errors import DamagedError

VOCABULARY = Vocabulary("char", ("<unk>", "a"), (0, 3))


def state(step: int = 0, value: float = 1.0) -> dict[str, object]:
    return {"model": {"w": torch.full((3,), value)}, "position": {"step": step}}


def files(run: RunDirectory) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}


def flipped(data: bytes) -> bytes:
    return data[:500] + bytes([data[500] ^ 1]) + data[501:]


def checkpoint(run: RunDirectory) -> Path:
    [path] = run.checkpoints.iterdir()
    return path


def record(step: int) -> Record:
    return Record(step, 0, 10, 1.0, 2.718, None, None, None, 0.5, 0.0, 100.0)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory.vacant(tmp_path / "a" / "run", overwrite=False)
    run.occupy(overwrite=False)
    run.begin(Config(), VOCABULARY, state())
    run.release()
    return run


def test_what_was_written_is_read(run: RunDirectory):
    assert RunDirectory.open(run.path).config() == Config()
    assert run.stored() == VOCABULARY
    torch.testing.assert_close(run.weights(), {"w": torch.ones(3)})
    torch.testing.assert_close(run.state()["model"], {"w": torch.ones(3)})
    assert sorted(str(p.relative_to(run.path)) for p in run.path.rglob("*")) == [
        "checkpoints",
        "checkpoints/step-00000000.ckpt",
        "config.toml",
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
    run.save(state(9, 2.0))
    (run.path / "flow").mkdir()
    before = set(run.path.rglob("*")) - {run.metrics_file, run.checkpoints / "step-00000009.ckpt"}
    RunDirectory.vacant(run.path, overwrite=True).begin(Config(hidden=3), VOCABULARY, state(0, 3.0))
    assert set(run.path.rglob("*")) == before
    assert run.metrics() == []
    assert run.config().hidden == 3
    torch.testing.assert_close(run.state()["model"], {"w": torch.full((3,), 3.0)})
    torch.testing.assert_close(run.weights(), {"w": torch.full((3,), 3.0)})


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
    before = files(run)
    with pytest.raises(NonFiniteError, match="weight w is not finite"):
        run.save(state(5, float("inf")))
    assert files(run) == before


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, call: str
):
    before = files(run)

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(OSError, match="No space left"):
            run.save(state(5, 2.0))
    assert files(run) == before
    torch.testing.assert_close(run.state()["model"], {"w": torch.ones(3)})


def test_an_error_of_the_disk_names_the_file_that_was_to_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(FileNotFoundError) as caught:
        atomic.write(tmp_path / "none" / "a.csv", b"x")
    assert caught.value.filename == str(tmp_path / "none" / "a.csv")

    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        atomic.write(tmp_path / "a.csv", b"x")
    assert caught.value.filename == str(tmp_path / "a.csv")
    assert list(tmp_path.iterdir()) == []


def test_files_are_as_readable_as_any_other(tmp_path: Path):
    (tmp_path / "plain").write_bytes(b"")
    atomic.write(tmp_path / "ours", b"x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_directory_without_a_run_or_without_a_checkpoint(tmp_path: Path, run: RunDirectory):
    with pytest.raises(InputError, match=r"is not a run directory: it has no config\.toml"):
        RunDirectory.open(tmp_path)
    checkpoint(run).unlink()
    with pytest.raises(InputError, match=r"has no checkpoint: begin it again with --overwrite"):
        run.state()
    run.weights_file.unlink()
    with pytest.raises(InputError, match=r"has no weights: it lacks weights\.safetensors"):
        run.weights()


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 cut off"])
def test_damaged_files_are_named(run: RunDirectory, content: bytes):
    checkpoint(run).write_bytes(content)
    with pytest.raises(DamagedError, match=r"step-00000000\.ckpt is damaged: its first line .*; no checkpoint"):
        run.state()
    run.weights_file.write_bytes(content)
    with pytest.raises(InputError, match=r"weights\.safetensors cannot be read"):
        run.weights()


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 cut off"])
def test_a_damaged_state_of_version_0_1_is_named(run: RunDirectory, content: bytes):
    checkpoint(run).unlink()
    run.old_state_file.write_bytes(content)
    with pytest.raises(InputError, match=r"state\.pt cannot be read"):
        run.state()


def test_a_state_of_version_0_1_is_read_until_the_next_save(run: RunDirectory):
    checkpoint(run).unlink()
    torch.save({"format": 1, **state(4, 2.0)}, run.old_state_file)
    assert run.state()["position"]["step"] == 4
    run.save(state(5, 3.0))
    assert run.state()["position"]["step"] == 5
    assert not run.old_state_file.exists()


def test_a_state_of_something_else(run: RunDirectory):
    checkpoint(run).unlink()
    torch.save([1, 2], run.old_state_file)
    with pytest.raises(InputError, match="is not a checkpoint of bptt train"):
        run.state()
    torch.save({"format": 2}, run.old_state_file)
    with pytest.raises(InputError, match="format 2, newer than 1: upgrade bptt"):
        run.state()


def test_a_newest_checkpoint_that_the_disk_does_not_give_is_passed_over(
    run: RunDirectory, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    for step in (10, 20):
        run.save(state(step))
    newest = run.checkpoints / "step-00000020.ckpt"
    opened = Path.open

    def fail(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name.endswith("20.ckpt"):
            raise OSError(5, "Input/output error")
        return opened(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", fail)
        assert run.state()["position"]["step"] == 10
    newest.unlink()
    newest.mkdir()
    (newest / "mine").touch()
    assert run.state()["position"]["step"] == 10
    assert caplog.messages == [
        f"{newest} cannot be read: {reason}; going back to step-00000010.ckpt"
        for reason in ("Input/output error", "Is a directory")
    ]
    run.tidy(10, keep=3)
    run.save(state(20))
    assert run.state()["position"]["step"] == 20
    assert (run.checkpoints / "step-00000020.ckpt.aside" / "mine").exists()


def test_checkpoints_none_of_which_can_be_read(run: RunDirectory):
    checkpoint(run).unlink()
    (run.checkpoints / "step-00000000.ckpt").mkdir()
    with pytest.raises(InputError, match=r"step-00000000\.ckpt cannot be read: Is a directory; no checkpoint in"):
        run.state()


@pytest.mark.parametrize("damage", [lambda data: data[:-100], lambda data: data[:50], lambda data: b"", flipped])
def test_a_damaged_checkpoint_is_passed_over_saying_so(
    run: RunDirectory, caplog: pytest.LogCaptureFixture, damage: Callable[[bytes], bytes]
):
    for step in (10, 20, 30):
        run.save(state(step, float(step)))
    newest = run.checkpoints / "step-00000030.ckpt"
    newest.write_bytes(damage(newest.read_bytes()))
    assert run.state()["position"]["step"] == 20
    [message] = caplog.messages
    assert message.startswith(f"{newest} is damaged: its ")
    assert message.endswith("; going back to step-00000020.ckpt")


def test_the_last_checkpoints_stay_and_those_of_a_given_up_future_go(run: RunDirectory):
    def steps() -> list[str]:
        return sorted(path.name for path in run.checkpoints.iterdir())

    for step in (10, 20, 30):
        run.save(state(step), keep=3)
    assert steps() == ["step-00000010.ckpt", "step-00000020.ckpt", "step-00000030.ckpt"]
    run.save(state(15), keep=3)
    assert steps() == ["step-00000010.ckpt", "step-00000015.ckpt"]
    run.save(state(40), keep=1)
    assert steps() == ["step-00000040.ckpt"]


def test_a_checkpoint_of_the_future_is_refused_and_not_passed_over(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "FORMAT", 99)
        run.save(state(10))
    with pytest.raises(InputError, match=r"step-00000010\.ckpt has format 99, newer than 2: upgrade bptt"):
        run.state()
    newest = run.checkpoints / "step-00000010.ckpt"
    newest.write_bytes(newest.read_bytes().replace(b"00000099", b"00000098"))  # altered: not a newer version's
    assert run.state()["position"]["step"] == 0
    assert len(caplog.messages) == 1


def test_a_checkpoint_is_one_line_and_what_torch_saved(run: RunDirectory):
    """The format, written out once more."""
    line, data = checkpoint(run).read_bytes().split(b"\n", 1)
    assert line == b"bptt checkpoint 00000002 sha256 " + hashlib.sha256(b"00000002" + data).hexdigest().encode()
    assert torch.load(io.BytesIO(data), weights_only=True)["position"] == {"step": 0}


def test_reading_a_checkpoint_runs_no_code(run: RunDirectory, tmp_path: Path):
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    run.save({**state(10), "evil": Evil()})
    with pytest.raises(InputError, match="cannot be read"):
        run.state()
    assert not (tmp_path / "ran").exists()


def test_what_a_killed_process_was_writing_is_swept_away(run: RunDirectory):
    for folder in (run.path, run.checkpoints):
        (folder / ".x.abc.part").write_bytes(b"half")
    (run.path / "notes.part").write_text("mine")
    before = files(run)
    run.sweep()
    assert {path.name for path in set(before) - set(files(run))} == {".x.abc.part"}


def test_weights_are_written_anew_only_where_they_differ(run: RunDirectory):
    before = run.weights_file.stat().st_ino
    run.publish(run.state())
    assert run.weights_file.stat().st_ino == before
    run.publish(state(0, 2.0))
    torch.testing.assert_close(run.weights(), {"w": torch.full((3,), 2.0)})


def test_rewinding_past_what_a_loss_of_power_left(run: RunDirectory, caplog: pytest.LogCaptureFixture):
    for step in (10, 20):
        run.append(record(step))
    with run.metrics_file.open("ab") as file:
        file.write(b"\0" * 100 + b'\n{"step": 12}\n\xff')
    run.rewind(20)
    assert [r["step"] for r in run.metrics()] == [10, 20]
    assert caplog.messages == [f"{run.metrics_file}: line 3 cannot be read; it and what follows it is dropped"]


def test_metrics_are_json_whatever_the_numbers(run: RunDirectory):
    """RFC 8259 has no infinity."""
    run.append(Record(3, 0, 10, 1e6, math.inf, math.inf, math.nan, math.inf, 0.5, 0.0, 100.0))

    def refuse(name: str) -> None:
        raise AssertionError(name)

    written = json.loads(run.metrics_file.read_text(), parse_constant=refuse)
    assert {name for name, value in written.items() if value is None} == {
        *("perplexity", "epoch_perplexity", "heldout_loss", "heldout_perplexity", "horizon", "window", "measures")
    }
    assert (written["loss"], written["step"]) == (1e6, 3)
    assert run.metrics() == [written]
    run.metrics_file.write_text(json.dumps({**written, "perplexity": math.inf}) + "\n")  # of version 0.1
    assert "Infinity" in run.metrics_file.read_text()
    assert run.metrics() == [written]


def test_weights_tell_their_vocabulary(run: RunDirectory):
    torch.testing.assert_close(run.weights(VOCABULARY), {"w": torch.ones(3)})
    other = Vocabulary("char", ("<unk>", "b"), (0, 3))
    with pytest.raises(InputError, match=r"vocabulary\.json is not the vocabulary that weights\.safetensors knows"):
        run.weights(other)
    safetensors.torch.save_file({"w": torch.ones(3)}, run.weights_file, {"step": "0"})  # of version 0.1
    torch.testing.assert_close(run.weights(other), {"w": torch.ones(3)})
    for about in ("[]", "{", "[" * 100_000):
        safetensors.torch.save_file({"w": torch.ones(3)}, run.weights_file, {"bptt": about})
        with pytest.raises(InputError, match="cannot be read"):
            run.weights()


def test_metrics_that_are_not_json(run: RunDirectory):
    run.metrics_file.write_text("hello\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl has a line that is not JSON"):
        run.metrics()
