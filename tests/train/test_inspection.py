"""What is measured of a run: a window of its held-out text, read by its last checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from bptt.train import Config, InputError, RunDirectory, Sequential, Trainer, fit, prepare, record_run, start
from bptt.train.inspection import record_next

from .tiny import tiny, write_text


def trained(folder: Path, **options: object) -> tuple[Trainer, Config, Path]:
    config = tiny(write_text(folder), heldout=0.3, steps=4, **options)
    trainer, run = start(config, folder / "run")
    fit(trainer, run)
    return trainer, config, run.path


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_the_errors_are_those_of_the_mean_loss(tmp_path: Path, cell: str) -> None:
    trainer, config, path = trained(tmp_path, cell=cell)
    recording = record_run(RunDirectory(path), steps=9, lanes=3)
    assert (recording.T, recording.B, recording.name) == (9, 3, "recurrent")
    model, ids = trainer.model.eval(), prepare(config).heldout
    assert ids is not None
    windows = Sequential(ids, 9, 3)
    state = model(windows.window(0, 0).inputs)[1]
    window = windows.window(0, 1)
    x = model.embedding(window.inputs)
    y, _ = model.recurrent(x, state)
    y.retain_grad()
    loss = cross_entropy(model.output(y).flatten(0, 1), window.targets.flatten())
    loss.backward()
    assert_close(recording.dy, y.grad)
    assert recording.loss == pytest.approx(loss.item())


def test_without_a_carried_state_or_held_out_text(tmp_path: Path) -> None:
    _, config, path = trained(tmp_path, batching="random")
    recording = record_run(RunDirectory(path))
    assert (config.seq_length, config.batch) == (recording.T, recording.B)
    assert not recording.call.hx[0].any()


def test_training_goes_on_as_if_nothing_had_been_measured(tmp_path: Path) -> None:
    results = []
    for measures in (False, True):
        torch.manual_seed(0)
        trainer = Trainer(tiny(write_text(tmp_path), dropout=0.2), prepare(tiny(write_text(tmp_path))))
        for _ in range(6):
            trainer.advance()
            if measures:
                assert record_next(trainer).T == 10
        results.append(trainer.model.state_dict())
    assert_close(results[0], results[1], rtol=0, atol=0)


def test_too_short_a_text(tmp_path: Path) -> None:
    _, _, path = trained(tmp_path)
    with pytest.raises(InputError, match=r"too short: 270 tokens, of which 4 lanes of 100 steps need 401"):
        record_run(RunDirectory(path), steps=100)
