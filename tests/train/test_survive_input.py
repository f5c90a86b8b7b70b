"""What a user can get wrong: one line, exit status 2, and no file written or changed."""

from __future__ import annotations

import hashlib
import io
import math
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from cli.command import bptt, error_of

from bptt.train import Config, Trainer, Vocabulary, fit, prepare, start

from .tiny import TEXT, tiny, write_text

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A text and a run of 8 steps on it."""
    trainer, run = start(tiny(write_text(tmp_path), steps=8), tmp_path / "run")
    fit(trainer, run)
    return tmp_path


def files(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def new(name: str, content: bytes, *flags: object) -> Callable[[Path], list[object]]:
    """A new run on a text of its own."""

    def arguments(folder: Path) -> list[object]:
        (folder / name).write_bytes(content)
        return ["--text", folder / name, "--batch", 4, *flags, "--out", folder / "new"]

    return arguments


def flags(*more: object) -> Callable[[Path], list[object]]:
    return new("good.txt", TEXT.encode(), *more)


def toml(content: str) -> Callable[[Path], list[object]]:
    def arguments(folder: Path) -> list[object]:
        (folder / "run.toml").write_text(content)
        return ["--text", folder / "text.txt", "--config", folder / "run.toml", "--out", folder / "new"]

    return arguments


def resumed(change: Callable[[Path], object], *more: object) -> Callable[[Path], list[object]]:
    """The run, after a change to its directory."""

    def arguments(folder: Path) -> list[object]:
        change(folder / "run")
        return ["--resume", folder / "run", *more]

    return arguments


def nothing(run: Path) -> None:
    pass


def other_vocabulary(run: Path) -> None:
    (run / "vocabulary.json").write_text(Vocabulary.build("abc", "char").to_json())


def checkpoint_of_version_99(run: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"anything": 1}, buffer)
    digest = hashlib.sha256(b"00000099" + buffer.getvalue()).hexdigest().encode()
    (run / "checkpoints" / "step-00000009.ckpt").write_bytes(
        b"bptt checkpoint 00000099 sha256 " + digest + b"\n" + buffer.getvalue()
    )


def all_checkpoints_cut(run: Path) -> None:
    for path in (run / "checkpoints").iterdir():
        os.truncate(path, path.stat().st_size - 1)


def remove_checkpoints(run: Path) -> None:
    for path in (run / "checkpoints").iterdir():
        path.unlink()


def rewrite(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        text = (run / name).read_text()
        assert old in text
        (run / name).write_text(text.replace(old, new))

    return change


CASES: dict[str, tuple[Callable[[Path], list[object]], str]] = {
    "a missing text": (lambda f: ["--text", f / "none.txt", "--out", f / "new"], "cannot read text"),
    "a directory for a text": (lambda f: ["--text", f, "--out", f / "new"], "cannot read text"),
    "an empty text": (new("a", b""), "/a is empty"),
    "white space for a text": (new("a", b" \n\t "), "/a is empty"),
    "nothing left of a text": (
        new("a", b"1234 5678", "--preprocess", "letters"),
        "is empty after --preprocess letters",
    ),
    "a text not in UTF-8": (new("a", TEXT.encode() + b"\xff\xfe"), "is not UTF-8: byte 900 cannot be decoded"),
    "a text in UTF-16": (new("a", TEXT.encode("utf-16")), "is not UTF-8: it is UTF-16; save it as UTF-8"),
    "a text shorter than a batch": (new("a", b"abc", "--heldout", 0), "the text is too short: 3 tokens to train on"),
    "no text to hold out": (new("a", b"abcdef"), "leaves 1 held-out tokens"),
    "random windows longer than the text": (
        flags("--batching", "random", "--seq-length", 900),
        "random windows need at least 1800",
    ),
    "a place under a file": (lambda f: ["--text", f / "text.txt", "--out", f / "text.txt" / "x"], "Not a directory"),
    "a file for a place": (lambda f: ["--text", f / "text.txt", "--out", f / "text.txt"], "is a file"),
    "a place no system lets one write in": (
        lambda f: ["--text", f / "text.txt", "--out", "/proc/bptt/x"],
        "/proc/bptt",
    ),
    "a place with other things in it": (lambda f: ["--text", f / "text.txt", "--out", f], "not a run directory"),
    "a place with a run in it": (lambda f: ["--text", f / "text.txt", "--out", f / "run"], "holds a run"),
    "a TOML file that is none": (toml("steps: 3"), "is not TOML"),
    "an unknown option": (toml("stepps = 3"), "unknown option stepps (did you mean steps?)"),
    "a table for an option": (toml("[steps]\nx = 1"), "steps must be a whole number of at least 1: got {'x': 1}"),
    "text for a number": (toml("hidden = '3'"), "hidden must be a whole number of at least 1: got '3'"),
    "truth for a number": (toml("hidden = true"), "hidden must be a whole number of at least 1: got True"),
    "a date for a number": (toml("clip = 2020-01-01"), "clip must be a finite number"),
    "infinity for a number": (toml("learning_rate = inf"), "learning_rate must be a finite number above 0: got inf"),
    "no number for a number": (toml("dropout = nan"), "dropout must be a number of at least 0 and below 1: got nan"),
    "a choice that is none": (toml("cell = 'transformer'"), "cell must be one of rnn, gru, lstm"),
    "nothing kept": (flags("--keep", 0), "keep must be a whole number of at least 1: got 0"),
    "no lanes": (flags("--batch", 0), "batch must be"),
    "fewer than no layers": (flags("--layers", -1), "layers must be"),
    "a seed too large": (flags("--seed", 2**63), "seed must be a whole number in [0, 2**63)"),
    "a window longer than any tensor": (flags("--seq-length", 10**19), "seq_length must be at most 2147483647: got 1"),
    "a learning rate beyond float32": (
        flags("--learning-rate", 1e39),
        "learning_rate must be at most 1e+37: got 1e+39",
    ),
    "an embedding that no tensor is": (flags("--embedding", 10**19), "embedding must be at most 2147483647: got 1"),
    "units that no tensor holds": (flags("--hidden", 10**19), "hidden must be at most 2147483647: got 1"),
    "layers without end": (flags("--layers", 100_000), "layers must be at most 1000: got 100000"),
    "a name for a text that is not UTF-8": (
        lambda f: ["--text", f / os.fsdecode(b"caf\xe9"), "--out", f / "new"],
        "text must be UTF-8, or config.toml could not hold it: got ",
    ),
    "a name for a place that is not UTF-8": (
        lambda f: ["--text", f / "text.txt", "--out", os.fsdecode(b"caf\xe9")],
        r"out must be a directory name, in UTF-8: got 'caf\udce9'",
    ),
    "no name for a place": (
        lambda f: ["--text", f / "text.txt", "--out", ""],
        "out must be a directory name, in UTF-8: got ''",
    ),
    "no name for a run": (lambda f: ["--resume", ""], "resume must be a directory name, in UTF-8: got ''"),
    "a TOML file without a bottom": (toml("steps = " + "[" * 20_000), "is not TOML"),
    "a TOML file with a number without end": (toml("steps = " + "9" * 5000), "is not TOML"),
    "a policy that is none": (flags("--gradient", "truncated:0"), "window must be at least 1 step: got 0"),
    "a kernel that is none": (flags("--kernel", "tpu"), "kernel must be"),
    "no run to go on with": (lambda f: ["--resume", f / "none"], "is not a run directory"),
    "a text that changed": (
        resumed(lambda run: (run.parent / "text.txt").write_text(TEXT + "x")),
        "the text is not the one this run began with",
    ),
    "another vocabulary": (resumed(other_vocabulary), "is not the vocabulary of the text this run began with"),
    "a vocabulary that is none": (resumed(rewrite("vocabulary.json", "counts", "c")), "the vocabulary must be"),
    "a vocabulary without a bottom": (
        resumed(lambda run: (run / "vocabulary.json").write_text("[" * 100_000)),
        "the vocabulary must be",
    ),
    "an option of another network": (resumed(rewrite("config.toml", "hidden = 8", "hidden = 9")), "does not fit"),
    "an unknown option of the run": (resumed(rewrite("config.toml", "hidden", "hiden")), "unknown option hiden"),
    "a checkpoint from a newer version": (
        resumed(checkpoint_of_version_99),
        "has format 99, newer than 2: upgrade bptt",
    ),
    "no whole checkpoint": (resumed(all_checkpoints_cut), "no checkpoint in"),
    "no checkpoint": (resumed(remove_checkpoints), "has no checkpoint"),
    "fewer steps than it had": (resumed(nothing, "--steps", 7), "already at step 8"),
    "a change to the network": (resumed(nothing, "--cell", "lstm"), "cell cannot change"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path, name: str):
    make, message = CASES[name]
    monkeypatch.chdir(folder)
    arguments = make(folder)
    before = files(folder)
    assert message in error_of(bptt(capsys, "train", *arguments))
    assert files(folder) == before


LARGEST = {
    entry.name: entry.metadata["check"].most
    for entry in fields(Config)
    if "text" in (entry.metadata["tasks"] or ("text",))
}
MEMORY = ("layers", "hidden", "embedding", "batch")  # of these nobody has enough for the largest


@pytest.mark.parametrize("optimiser", ["adam", "sgd"])
@pytest.mark.parametrize("name", [name for name, most in LARGEST.items() if most < math.inf and name not in MEMORY])
def test_the_largest_number_of_an_option_trains(tmp_path: Path, name: str, optimiser: str):
    length = {} if name == "steps" else {"epochs": 1}
    config = tiny(write_text(tmp_path), optimiser=optimiser, **length | {name: LARGEST[name]})
    assert Config.from_toml(config.to_toml(), "here") == config
    assert Trainer(config, prepare(config)).advance().step == 1


@contextmanager
def nobody() -> Iterator[None]:
    """Without the rights of root, where this process has them."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_directory_that_may_not_be_written(capsys: pytest.CaptureFixture[str]):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        trainer, run = start(tiny(write_text(folder), steps=8), folder / "run")
        fit(trainer, run)
        for path in (folder, *folder.rglob("*")):
            path.chmod(stat.S_IMODE(path.stat().st_mode) & ~0o222)
        before = files(folder)
        with nobody():
            fresh = bptt(capsys, "train", "--text", folder / "text.txt", "--batch", 4, "--out", folder / "new" / "run")
            again = bptt(capsys, "train", "--resume", folder / "run", "--steps", 20)
        for path in (folder, *folder.rglob("*")):
            path.chmod(stat.S_IMODE(path.stat().st_mode) | 0o200)
        assert error_of(fresh) == f"{folder / 'new'}: Permission denied"
        assert error_of(again) == f"{folder / 'run' / 'run.lock'}: Permission denied"
        assert files(folder) == before


def test_a_damaged_checkpoint_is_one_line_and_the_run_goes_on(capsys: pytest.CaptureFixture[str], folder: Path):
    newest = folder / "run" / "checkpoints" / "step-00000008.ckpt"
    os.truncate(newest, 1000)
    result = bptt(capsys, "train", "--resume", folder / "run", "--steps", 9)
    assert result.status == 0
    message = (
        f"bptt: {newest} is damaged: its SHA-256 is not the one in its first line; going back to step-00000007.ckpt"
    )
    assert result.err.splitlines()[0] == message
