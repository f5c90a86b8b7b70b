from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bptt.cli.flow import measured
from bptt.flow import Survey
from bptt.train import Config, RunDirectory

from .command import Result, bptt, error_of

TEXT = "the quick brown fox jumps over the lazy dog. " * 20
TINY = ["--cell", "gru", "--hidden", 8, "--embedding", 4, "--batch", 4, "--seq-length", 10, "--threads", 1]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def train(capsys: pytest.CaptureFixture[str], text: Path, *more: object) -> Result:
    return bptt(capsys, "train", "--text", text, *TINY, *more)


def test_a_run_from_text_to_sample(capsys: pytest.CaptureFixture[str], text: Path, tmp_path: Path):
    out = tmp_path / "run"
    result = train(capsys, text, "--steps", 12, "--log-every", 5, "--eval-every", 10, "--out", out)
    assert result.status == 0
    assert "guessing by frequency has perplexity" in result.err
    assert "step 10/12" in result.err
    last = RunDirectory.open(out).metrics()[-1]
    assert result.out.startswith(
        f"12 steps: training perplexity {last['perplexity']:.4g} over the last 2 steps; "
        f"held-out perplexity {last['heldout_perplexity']:.4g} at the end\n"
    )
    assert f"bptt sample {out}" in result.out
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == [5, 10, 12]
    assert [m["heldout_perplexity"] is not None for m in metrics] == [False, True, True]

    sampled = bptt(capsys, "sample", out, "--prompt", "the ", "--length", 20, "--seed", 3)
    assert sampled.status == 0
    assert len(sampled.out) == len("the ") + 20 + 1
    assert sampled.out.startswith("the ")
    assert bptt(capsys, "sample", out, "--prompt", "the ", "--length", 20, "--seed", 3) == sampled


def test_flags_win_over_the_file_and_the_file_over_the_defaults(
    capsys: pytest.CaptureFixture[str], text: Path, tmp_path: Path
):
    file = tmp_path / "conf.toml"
    file.write_text('cell = "rnn"\nhidden = 9\nlayers = 2\nepochs = 3\nlearning_rate = 1\n')
    result = bptt(
        capsys, "train", "--config", file, "--text", text, "--hidden", 5, "--steps", 2, "--out", tmp_path / "run"
    )
    assert result.status == 0
    config = RunDirectory.open(tmp_path / "run").config()
    assert (config.cell, config.hidden, config.layers, config.learning_rate) == ("rnn", 5, 2, 1.0)
    assert (config.steps, config.epochs) == (2, None)
    assert config.batch == Config().batch


def test_a_run_by_epochs_ends_with_the_perplexity_of_its_last(
    capsys: pytest.CaptureFixture[str], text: Path, tmp_path: Path
):
    result = train(capsys, text, "--epochs", 2, "--heldout", 0, "--log-every", 5, "--out", tmp_path / "run")
    last = RunDirectory.open(tmp_path / "run").metrics()[-1]
    steps, expected = last["step"], last["epoch_perplexity"]
    assert result.out.startswith(f"{steps} steps: training perplexity {expected:.4g} over the last epoch\n")
    assert f"{expected:.4g}" != f"{last['perplexity']:.4g}"
    assert bptt(capsys, "train", "--resume", tmp_path / "run").out.partition("\n")[2] == result.out
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert f"\n{steps} steps\n" in bptt(capsys, "train", "--resume", tmp_path / "run").out


def test_the_file_may_name_the_directory_and_the_flag_wins(
    capsys: pytest.CaptureFixture[str], text: Path, tmp_path: Path
):
    file = tmp_path / "conf.toml"
    file.write_text(f"cell = 'rnn'\nseq-length = 5\nsteps = 1\nout = '{tmp_path / 'named'}'\n")
    assert bptt(capsys, "train", "--config", file, "--text", text).status == 0
    assert RunDirectory.open(tmp_path / "named").config().seq_length == 5
    assert "holds a run" in error_of(bptt(capsys, "train", "--config", file, "--text", text))
    assert bptt(capsys, "train", "--config", file, "--text", text, "--out", tmp_path / "flag").status == 0
    assert RunDirectory.open(tmp_path / "flag").config().seq_length == 5
    file.write_text("out = 3\n")
    assert error_of(train(capsys, text, "--config", file)) == f"{file}: out must be a directory name, in UTF-8: got 3"


def test_resuming_to_where_the_run_already_is(capsys: pytest.CaptureFixture[str], text: Path, tmp_path: Path):
    out = tmp_path / "run"
    train(capsys, text, "--steps", 3, "--out", out)
    message = error_of(bptt(capsys, "train", "--resume", out, "--steps", 2))
    assert message == "already at step 3; give more steps: got steps=2"
    assert RunDirectory.open(out).config().steps == 3
    done = bptt(capsys, "train", "--resume", out)
    assert done.status == 0
    assert done.out.splitlines()[0] == f"{out} had taken all of its 3 steps: to go on longer, give more --steps"


def test_a_large_vocabulary_of_words_is_told_what_min_count_would_leave(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    words = [f"w{n}" for n in range(10_001)]
    text = tmp_path / "text.txt"
    text.write_text(" ".join([*words[:5], *words]))
    small = ("--steps", 1, "--hidden", 2, "--embedding", 2, "--batch", 1, "--heldout", 0, "--tokens", "word")
    told = "--min-count 2 would leave 5 of 10,002"
    assert told in bptt(capsys, "train", "--text", text, *small, "--out", tmp_path / "a").err
    assert told not in bptt(capsys, "train", "--text", text, *small, "--min-count", 2, "--out", tmp_path / "b").err


def test_ctrl_c_before_the_first_step_is_one_line_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(RunDirectory, "save", interrupt)
    result = train(capsys, text, "--out", tmp_path / "run")
    assert (result.status, result.err) == (130, "bptt: interrupted\n")
    assert not (tmp_path / "run").exists()


def test_both_spellings_of_the_optimiser(capsys: pytest.CaptureFixture[str], text: Path, tmp_path: Path):
    for number, flag in enumerate(("--optimiser", "--optimizer")):
        assert train(capsys, text, "--steps", 1, flag, "sgd", "--out", tmp_path / str(number)).status == 0
        assert RunDirectory.open(tmp_path / str(number)).config().optimiser == "sgd"


def test_words(capsys: pytest.CaptureFixture[str], text: Path, tmp_path: Path):
    assert train(capsys, text, "--tokens", "word", "--steps", 2, "--out", tmp_path / "run").status == 0
    sampled = bptt(capsys, "sample", tmp_path / "run", "--prompt", "the quick", "--length", 3)
    assert sampled.out.startswith("the quick ")
    assert len(sampled.out.split()) == 5


def test_the_default_directory_is_named_after_the_run(
    capsys: pytest.CaptureFixture[str], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert train(capsys, text, "--steps", 1).status == 0
    [run] = (tmp_path / "runs").iterdir()
    assert run.name.startswith("text-gru-")


def test_overwrite_and_resume(capsys: pytest.CaptureFixture[str], text: Path, tmp_path: Path):
    out = tmp_path / "run"
    assert train(capsys, text, "--steps", 4, "--out", out).status == 0
    assert "give --resume" in error_of(train(capsys, text, "--steps", 4, "--out", out))
    assert train(capsys, text, "--steps", 3, "--out", out, "--overwrite").status == 0
    assert bptt(capsys, "train", "--resume", out, "--steps", 6).out.startswith("6 steps:")
    assert train(capsys, text, "--steps", 6, "--out", tmp_path / "whole").status == 0
    torch.testing.assert_close(
        RunDirectory.open(out).weights(), RunDirectory.open(tmp_path / "whole").weights(), rtol=0, atol=0
    )


def test_resume_takes_everything_from_the_run(capsys: pytest.CaptureFixture[str], text: Path, tmp_path: Path):
    out = tmp_path / "run"
    train(capsys, text, "--steps", 1, "--out", out)
    assert "leave out --out" in error_of(bptt(capsys, "train", "--resume", out, "--out", tmp_path / "b"))
    assert "hidden cannot change" in error_of(bptt(capsys, "train", "--resume", out, "--hidden", 3))
    assert "is not a run directory" in error_of(bptt(capsys, "train", "--resume", tmp_path / "none"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch", 0], "batch must be a whole number of at least 1: got 0"),
        (["--gradient", "chunked:zero"], "gradient must be one of full, chunked:K"),
        (["--clip", -1], "clip must be a finite number of at least 0"),
        (["--steps", 1, "--epochs", 1], "give steps or epochs, not both"),
        (["--corpus", "timemachine"], "give text or corpus, not both"),
        (["--nonlinearity", "relu"], "nonlinearity is for cell=rnn: got nonlinearity=relu and cell=gru"),
        (["--threads", 100_000], "threads must be a whole number in [0, 1024]: got 100000"),
        (["--device", "foo"], "device must be a torch device that is there: got 'foo' ("),
        (["--device", "meta"], "device must be a torch device that is there: got 'meta' ("),
        (["--text", ""], "text must be a file name: got ''"),
        (["--batch", 9000], "the text is too short"),
        (["--text", "missing.txt"], "cannot read text missing.txt: No such file or directory"),
        (["--config", "missing.toml"], "cannot read configuration missing.toml"),
    ],
)
def test_a_bad_option_is_one_line_and_nothing_is_written(
    capsys: pytest.CaptureFixture[str], text: Path, tmp_path: Path, flags: list[object], message: str
):
    assert message in error_of(train(capsys, text, *flags, "--out", tmp_path / "deep" / "run"))
    assert not (tmp_path / "deep").exists()


def test_text_that_is_not_utf8(capsys: pytest.CaptureFixture[str], text: Path, tmp_path: Path):
    text.write_bytes(TEXT.encode() + b"\xff")
    assert "is not UTF-8: byte 900" in error_of(train(capsys, text, "--out", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_directory_that_cannot_be_made(capsys: pytest.CaptureFixture[str], text: Path):
    assert "Not a directory" in error_of(train(capsys, text, "--steps", 1, "--out", text / "run"))


def test_a_loss_that_is_not_finite_is_status_1(
    capsys: pytest.CaptureFixture[str], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("torch.nn.utils.get_total_norm", lambda grads: torch.tensor(float("inf")))
    result = train(capsys, text, "--steps", 1, "--out", tmp_path / "run")
    assert result.status == 1
    assert "bptt: error: step 1: loss" in result.err
    assert "gradient norm inf: not finite; parameter gradient: the model: the gradient norm is not finite" in result.err


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(capsys: pytest.CaptureFixture[str], text: Path, tmp_path: Path):
    out = tmp_path / "run"
    flags = [str(a) for a in (*TINY, "--steps", 10**6, "--log-every", 5, "--save-every", 10**6, "--out", out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "bptt", "train", "--text", str(text), *flags], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 300
    while not (out / "metrics.jsonl").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert f"to go on: bptt train --resume {out}" in err
    assert "Traceback" not in err

    step = RunDirectory.open(out).state()["position"]["step"]
    assert step >= 5
    assert bptt(capsys, "train", "--resume", out, "--steps", step + 3).status == 0
    assert train(capsys, text, "--steps", step + 3, "--out", tmp_path / "whole").status == 0
    torch.testing.assert_close(
        RunDirectory.open(out).weights(), RunDirectory.open(tmp_path / "whole").weights(), rtol=0, atol=0
    )


def test_sampling_mistakes(capsys: pytest.CaptureFixture[str], text: Path, tmp_path: Path):
    out = tmp_path / "run"
    train(capsys, text, "--steps", 1, "--out", out)
    assert "'Z'" in error_of(bptt(capsys, "sample", out, "--prompt", "the Z"))
    assert "temperature must be" in error_of(bptt(capsys, "sample", out, "--temperature", -1))
    assert "got 'meta'" in error_of(bptt(capsys, "sample", out, "--device", "meta"))
    for seed in (-1, 2**63, 99999999999999999999):
        message = error_of(bptt(capsys, "sample", out, "--seed", seed))
        assert message == f"seed must be a whole number in [0, 2**63): got {seed}"
    assert "is not a run directory" in error_of(bptt(capsys, "sample", tmp_path))


@pytest.mark.slow
def test_a_short_demo_runs_and_runs_again(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The second time shows the survey of the first, which takes longer than all else."""
    out = tmp_path / "demo"
    surveys: list[Survey] = []

    def once(*given: Any) -> Survey:
        surveys.extend([] if surveys else [measured(*given)])
        return surveys[0]

    monkeypatch.setattr("bptt.cli.demo.measured", once)
    for _ in range(2):
        result = bptt(capsys, "demo", "--out", out, "--steps", 2)
        assert result.status == 0
        assert "held-out perplexity" in result.out
        assert "guessing by frequency" in result.out
    assert [m["step"] for m in RunDirectory.open(out).metrics()] == [2]


def test_skipped_steps_are_shown_and_counted(
    capsys: pytest.CaptureFixture[str], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    norms = iter([1.0, float("inf"), float("inf"), *[1.0] * 20])
    monkeypatch.setattr("torch.nn.utils.get_total_norm", lambda grads: torch.tensor(next(norms)))
    flags = ["--on-nonfinite", "skip", "--steps", 6, "--log-every", 3, "--eval-every", 5, "--out", tmp_path / "run"]
    result = train(capsys, text, *flags)
    assert result.status == 0
    assert result.err.count("parameter gradient: the model: the gradient norm is not finite") == 1
    assert "step 2: parameter gradient" in result.err
    assert f"2 of 6 steps were not finite and skipped: see {tmp_path / 'run' / 'findings.jsonl'}" in result.err
    assert "  skipped 2  " in result.err
    assert "  horizon " in result.err
    assert [m["skipped"] for m in RunDirectory.open(tmp_path / "run").metrics()] == [2, 0, 0]
    assert [m["horizon"] is not None for m in RunDirectory.open(tmp_path / "run").metrics()] == [False, True, True]


def test_a_run_that_ends_in_skipped_steps_has_a_summary(
    capsys: pytest.CaptureFixture[str], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("torch.nn.utils.get_total_norm", lambda grads: torch.tensor(float("nan")))
    result = train(capsys, text, "--on-nonfinite", "skip", "--steps", 2, "--log-every", 1, "--out", tmp_path / "run")
    assert result.status == 0
    assert result.out.startswith("2 steps: the last ones were all skipped")
    assert "all steps skipped" in result.err
