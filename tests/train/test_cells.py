"""Any cell in a run: one of the literature or the user's own, in every task, gone on with and measured; or refused."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.command import bptt, error_of
from torch.testing import assert_close

from bptt.flow import Scanned
from bptt.nn import LAYERS, cells
from bptt.scan import KERNELS
from bptt.train import Config, InputError, RunDirectory, Step, Trainer, fit, prepare, record_run, resume, start
from bptt.train.options import ALSO, LITERATURE, STEP_KERNELS, kernels_of, named_cell, with_nonlinearity
from bptt.train.processes import ALONE, Processes

from .forked import forked
from .outcomes import assert_same, outcome
from .tiny import of_task, write

OWN = '''
from collections import namedtuple
import torch

Both = namedtuple("Both", "h steps")


class Counting(torch.nn.Module):
    """Puts out what is no part of its state, which is of a class of its own."""

    def __init__(self, input_size, hidden_size):
        super().__init__()
        self.hidden_size = hidden_size
        self.cell = torch.nn.GRUCell(input_size, hidden_size)

    def initial_state(self, batch_size):
        return Both(torch.zeros(batch_size, self.hidden_size), torch.zeros(batch_size, 2))

    def forward(self, x, state):
        h = self.cell(torch.nn.functional.dropout(x, 0.2, self.training), state.h)
        return torch.tanh(h), Both(h, state.steps + 1)


class Sized(torch.nn.Module):
    def __init__(self, size):
        super().__init__()


class Wide(Counting):
    def forward(self, x, state):
        y, state = super().forward(x, state)
        return torch.cat([y, y], 1), state


class Mute(torch.nn.Module):
    def __init__(self, *sizes):
        super().__init__()

    def forward(self, x, h):
        return None


def function(*sizes): ...
'''


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The present folder, with the user's module."""
    write(tmp_path, OWN, "cells_of_mine.py")
    write(tmp_path, "raise SystemExit('no')", "broken_cells.py")
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("cells_of_mine", None)
    return tmp_path


def test_the_names_are_those_of_the_cells_there_are() -> None:
    known = {name for name in cells.__all__ if isinstance(getattr(cells, name), type)}
    assert set(LITERATURE.values()) == known
    assert {*map(named_cell, [*LITERATURE, *LITERATURE.values(), *ALSO])} == {*LITERATURE}
    assert ("auto", *STEP_KERNELS) == KERNELS
    assert with_nonlinearity() == tuple(name for name, layer in LAYERS.items() if layer.nonlinearities)
    assert kernels_of("lif") == KERNELS


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("text", {"cell": "cells_of_mine:Counting", "layers": 2, "gradient": "truncated:4/2", "dropout": 0.1}),
        ("series", {"cell": "cells_of_mine:Counting", "kernel": "replay", "memory": "checkpoints:steps=3"}),
        ("series", {"cell": "LIF", "gradient": "randomized:0.8", "dtype": "float64"}),
        ("classify", {"cell": "cells_of_mine:Counting", "gradient": "chunked:3", "layers": 2, "accumulate": 2}),
    ],
)
def test_a_run_goes_on_bit_for_bit_and_is_measured(here: Path, task: str, options: dict[str, Any]) -> None:
    config = of_task(here, task, **options)
    fit(*start(config, here / "whole"))

    def die(step: Step) -> None:
        if step.step == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(*start(config, here / "parts"), on_step=die)
    trainer, run = resume(here / "parts")
    assert trainer.step == 7
    fit(trainer, run)
    assert_same(outcome(run.path), outcome(here / "whole"))
    recording = record_run(RunDirectory.open(run.path), steps=3)
    assert isinstance(recording, Scanned)
    assert recording.T == 3


@pytest.mark.parametrize("pool", ["last", "mean"])
@pytest.mark.parametrize("cell", ["gru", "minimal-gated"])
def test_both_directions_are_read_of_each_sequence_alone(tmp_path: Path, cell: str, pool: str) -> None:
    config = of_task(tmp_path, "classify", cell=cell, pool=pool, bidirectional=True, layers=2, dtype="float64")
    trainer = fit(prepare(config), config)
    batch = trainer.batches.window(0, 0)
    assert len(batch.lengths.unique()) > 1
    found, _ = trainer.model.eval()(batch.x, batch.lengths)
    for i, n in enumerate(batch.lengths.tolist()):
        y, _ = trainer.model.recurrent(batch.x[:n, i : i + 1])
        ends = torch.cat([y[-1, 0, :6], y[0, 0, 6:]])
        assert_close(found[i], trainer.model.output(ends if pool == "last" else y[:, 0].mean(0)))
    with pytest.raises(InputError, match="bidirectional is for task=classify: got bidirectional=True and task=text"):
        Config(bidirectional=True)


def stepped(processes: Processes, options: Config) -> list[Any]:
    trainer = Trainer(options, prepare(options))
    trainer.join(processes)
    steps = [step.nll for step in trainer.run()]
    state = trainer.state()
    trainer.restore(state)
    return [steps, state["model"], state["carry"], trainer.measure(trainer.task.heldout)]


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    options = {"cell": "layer-norm-lstm", "dtype": "float64", "optimiser": "sgd", "accumulate": 2, "layers": 2}
    config = of_task(tmp_path, "series", **options)
    expected = stepped(ALONE, config)
    for found in forked(2, tmp_path, stepped, config):
        assert_close(found, expected, rtol=1e-9, atol=1e-12)


REFUSED = {
    "nowhere_at_all:Cell": "cell nowhere_at_all:Cell: there is no module nowhere_at_all, neither in",
    "cells_of_mine.more:Cell": "there is no module cells_of_mine.more",
    "broken_cells:Cell": "importing broken_cells raised SystemExit: no",
    "cells_of_mine:Countin": r"cells_of_mine has no Countin \(did you mean Counting\?\)",
    "cells_of_mine:function": "must be a class of torch.nn.Module: got a function",
    "cells_of_mine:Both": "must be a class of torch.nn.Module: got the class Both",
    "cells_of_mine:Sized": r"must be made by Sized\(input_size, hidden_size\): \(7, 6\) raised TypeError: Sized",
    "cells_of_mine:Mute": "cannot run as a layer of 7 inputs and 6 units: TypeError: cell, a Mute, must return its new",
    "cells_of_mine:Wide": r"must put out \[B, hidden_size\], here \[B, 6\]: got \[B, 12\]",
    "cells_of_mine": "or MODULE:CLASS of your own: got 'cells_of_mine'",
    "leakly": r"got 'leakly' \(did you mean leaky\?\)",
}


@pytest.mark.parametrize("cell", REFUSED)
def test_what_is_no_cell_is_one_line_and_nothing_is_written(
    here: Path, capsys: pytest.CaptureFixture[str], cell: str
) -> None:
    data = of_task(here, "series").series
    found = error_of(bptt(capsys, "train", "--series", data, "--cell", cell, "--hidden", 6, "--out", here / "run"))
    assert re.search(REFUSED[cell], found), found
    assert not (here / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "fused"}, "kernel must be one of auto, interpreter, eager, replay for cell=lif: got 'fused'"),
        ({"cell": "gru", "kernel": "replay"}, "for cell=gru: got 'replay'"),
        ({"gradient": "adaptive:0.5,max=9"}, "gradient=adaptive:... is for cell=rnn, gru, lstm: got adaptive"),
        ({"nonlinearity": "relu"}, "nonlinearity is for cell=rnn"),
        ({"memory": "gates"}, "a cell of one's own has no gates"),
        ({"memory": "checkpoints:bytes=10"}, "bytes must hold the tape of a step"),
    ],
)
def test_options_of_other_cells_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        Trainer(config := of_task(tmp_path, "text", **{"cell": "lif", **options}), prepare(config))


def test_every_command_finds_the_cell_of_a_run_or_says_that_it_is_gone(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = of_task(here, "text", cell="cells_of_mine:Counting", steps=3)
    (here / "run.toml").write_text(config.to_toml())
    assert bptt(capsys, "train", "--config", here / "run.toml", "--out", here / "run").status == 0
    commands = [
        ("sample", here / "run", "--length", 5),
        ("compare", here / "run", "full", "chunked:3", "--repeats", 5, "--steps", 4),
        ("train", "--resume", here / "run", "--steps", 4),
    ]
    for command in commands:
        assert bptt(capsys, *command).status == 0, command
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    sys.modules.pop("cells_of_mine")
    for command in (*commands, ("flow", here / "run")):
        assert "cell cells_of_mine:Counting: there is no module cells_of_mine" in error_of(bptt(capsys, *command))
