"""The learning-rate range test: what it tries, what it suggests, and that nothing else changes."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from cli.command import bptt, error_of

from bptt.train import Config, InputError, Trainer, prepare, rate_test
from bptt.train.range_test import _smoothed, _suggestion

from .tiny import of_task, write


def wave(folder: Path, **options: object) -> Config:
    text = "y\n" + "\n".join(f"{np.sin(0.3 * t):.5f}" for t in range(300))
    given = {"cell": "gru", "hidden": 8, "batch": 4, "seq_length": 16, "threads": 1} | options
    return Config(series=str(write(folder, text, "wave.csv")), **given)


def test_the_rate_rises_by_one_factor_and_its_steps_are_those_of_a_trainer(tmp_path: Path) -> None:
    config = wave(tmp_path, learning_rate=3.0, schedule="cosine", warmup=5, optimiser="sgd")
    task = prepare(config)
    torch.manual_seed(8)
    before = torch.get_rng_state()
    found = rate_test(task, config, lowest=1e-4, highest=1e-1, steps=31)
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_allclose(found.rates, np.geomspace(1e-4, 1e-1, 31))
    twin = Trainer(config.override(optimiser="sgd", schedule="constant", warmup=0, learning_rate=1.0, steps=31), task)
    for rate, loss in zip(found.rates, found.losses, strict=True):
        twin.config = twin.config.override(learning_rate=float(rate))
        step = twin.advance()
        assert step.nll / step.tokens == loss
    assert found.conditions.startswith(
        "31 steps from 0.0001 to 0.1, from the first weights of seed 0; sgd, clip 1, batch"
    )


def test_the_suggestion_is_where_the_loss_falls_fastest() -> None:
    rates = np.geomspace(1e-5, 10, 100)
    at = np.log10(rates)
    losses = 2 - np.tanh(2 * (at + 2)) + np.exp(3 * (at - 0.2))
    assert _suggestion(list(rates), list(losses), _smoothed(losses, 11)) == pytest.approx(1e-2, rel=0.2)
    noise = np.random.default_rng(0).normal(size=100)
    assert _suggestion(list(rates), list(noise), _smoothed(noise, 11)) is None


@pytest.mark.parametrize("task", ["text", "series", "classify"])
def test_every_task_is_tried_and_where_the_loss_grows_it_ends(tmp_path: Path, task: str) -> None:
    config = of_task(tmp_path, task, optimiser="sgd", clip=0, cell="mgu" if task == "classify" else "gru")
    found = rate_test(prepare(config), config, lowest=1e-3, highest=1e9, steps=40)
    assert found.diverged
    assert 5 <= len(found.losses) < 40
    assert np.isfinite(found.losses).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lowest": 0.0}, "lowest must be a finite number above 0, at most 1e+37: got 0"),
        ({"highest": float("inf")}, "highest must be a finite number above 0"),
        ({"lowest": 1.0, "highest": 0.1}, "lowest must be below highest=0.1: got 1"),
        ({"steps": 19}, "steps of a range test must be at least 20: got 19"),
        ({"lowest": 1e36, "highest": 1e37}, "give a lower --lowest"),
    ],
)
def test_rates_that_make_no_test(tmp_path: Path, options: dict[str, float], message: str) -> None:
    config = wave(tmp_path, optimiser="sgd", clip=0)
    with pytest.raises(InputError, match=re.escape(message)):
        rate_test(prepare(config), config, **options)


def test_the_command_writes_a_picture_and_its_numbers_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.toml").write_text(wave(tmp_path, learning_rate=5.0, patience=3).to_toml())
    monkeypatch.chdir(tmp_path)
    result = bptt(capsys, "find-lr", "--config", "run.toml", "--tries", 40, "--lowest", 1e-4, "--out", "lr.png")
    assert result.status == 0, result.err
    assert re.match(r"learning_rate 0.0\d+: the loss falls fastest there, is least at ", result.out)
    assert "40 steps from 0.0001 to 10, from the first weights of seed 0; adam, clip 1, batch 4" in result.out
    rows = list(csv.DictReader((tmp_path / "lr.csv").read_text().splitlines()))
    assert float(rows[0]["learning_rate"]) == 1e-4
    assert (tmp_path / "lr.png").stat().st_size > 5000
    assert {path.name for path in tmp_path.iterdir()} == {"run.toml", "wave.csv", "lr.png", "lr.csv"}
    assert "out must be the name of a .png file" in error_of(bptt(capsys, "find-lr", "--out", "lr.txt"))
    assert "No such option: --learning-rate" in error_of(bptt(capsys, "find-lr", "--learning-rate", 1))
