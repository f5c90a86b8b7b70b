"""Sequences with a class each: read alike from every form, learned alike by any number of processes, or refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli.command import bptt, error_of
from torch.nn.functional import cross_entropy

from bptt.train import Config, RunDirectory, Trainer, fit, prepare, record_run, resume, start
from bptt.train.processes import Processes
from bptt.train.tasks.sequence_arrays import read_npz
from bptt.train.tasks.sequence_files import read_sequences
from bptt.train.tasks.ts_files import read_ts

from .forked import forked
from .outcomes import assert_same, outcome
from .tiny import write

LENGTHS = [3, 7, 1, 5, 4, 6, 2, 7, 3, 5, 4]
LABELS = ["a", "b", "a", "c", "b", "a", "c", "b", "a", "b", "c"]


def drawn() -> np.ndarray[Any, Any]:
    values = np.random.default_rng(0).normal(size=(sum(LENGTHS), 2)).round(3)
    values[1, 0] = np.nan
    return values


def npz(folder: Path, **arrays: Any) -> Path:
    path = folder / "data.npz"
    np.savez(path, **{"x": drawn(), "y": LABELS, "lengths": LENGTHS, **arrays})
    return path


def csv(values: np.ndarray[Any, Any]) -> str:
    rows = [(i, t) for i, n in enumerate(LENGTHS) for t in range(n)]
    lines = [f"{i},{t},{x},{y},{LABELS[i]}" for (i, t), (x, y) in zip(rows, values, strict=True)]
    return "\n".join(["id,time,0,1,label", *lines])


def ts(values: np.ndarray[Any, Any]) -> str:
    cases = np.split(values, np.cumsum(LENGTHS)[:-1])
    lines = [":".join([*(",".join(map(str, d)) for d in c.T), label]) for c, label in zip(cases, LABELS, strict=True)]
    return "\n".join(["# a remark", "@problemName x", "@dimensions 2", "@classLabel true a b c", "@data", *lines])


def config(path: Path, **options: Any) -> Config:
    tiny = {"cell": "gru", "hidden": 5, "batch": 4, "heldout": 0.3, "steps": 9, "log_every": 3, "eval_every": 4}
    return Config(classify=str(path), **{**tiny, "save_every": 5, "threads": 1, **options})


def test_every_form_gives_the_same_sequences(tmp_path: Path):
    values = drawn()
    expected = read_npz(npz(tmp_path))
    assert expected.lengths.tolist() == LENGTHS
    assert expected.missing == 1
    padded = np.zeros((len(LENGTHS), 7, 2))
    padded[np.arange(7) < np.array(LENGTHS)[:, None]] = values
    offsets = tmp_path / "offsets.npz"
    np.savez(offsets, x=values, y=LABELS, offsets=np.append(0, np.cumsum(LENGTHS)))
    others = [
        read_npz(offsets),
        read_npz(npz(tmp_path, x=padded)),
        read_sequences(write(tmp_path, csv(values), "data.csv"), Config()),
        read_ts(write(tmp_path, ts(values), "data.ts")),
    ]
    assert {each.sha256() for each in others} == {expected.sha256()}


@pytest.mark.parametrize("pool", ["last", "mean"])
@pytest.mark.parametrize("gradient", ["full", "truncated:3"])
def test_a_step_s_gradient_is_that_of_each_sequence_alone(tmp_path: Path, pool: str, gradient: str):
    options = {"dtype": "float64", "optimiser": "sgd", "clip": 0, "cell": "lstm", "layers": 2, "heldout": 0.0}
    made = config(npz(tmp_path), pool=pool, gradient=gradient, accumulate=2, **options)
    trainer = Trainer(made, prepare(made))
    batches = [trainer.batches.window(0, i) for i in range(2)]
    twin = Trainer(made, prepare(made)).model
    trainer.advance()
    loss = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        for i, n in enumerate(batch.lengths.tolist()):
            y, _ = twin.recurrent(batch.x[:n, i : i + 1])
            pooled = y[-1] if pool == "last" else y.mean(0)
            loss = loss + cross_entropy(twin.output(pooled), batch.labels[i : i + 1], reduction="sum")
    expected = torch.autograd.grad(loss / 8, list(twin.parameters()))
    torch.testing.assert_close([p.grad for p in trainer.model.parameters()], list(expected), rtol=1e-10, atol=1e-12)


def test_a_resumed_run_is_the_run(tmp_path: Path):
    made = config(npz(tmp_path), dropout=0.3, gradient="randomized:0.8")
    fit(*start(made, tmp_path / "whole"))
    fit(*start(made.override(steps=4), tmp_path / "cut"))
    fit(*resume(tmp_path / "cut", steps=9))
    whole, cut = outcome(tmp_path / "whole"), outcome(tmp_path / "cut")
    for each in (whole, cut):
        each.pop("metrics")  # cut at another step
        each["state"].pop("doctor")
        each["state"].pop("meter")
    assert_same({**cut, "metrics": []}, {**whole, "metrics": []})
    recording = record_run(RunDirectory.open(tmp_path / "whole"))
    assert recording.T == 7


def trained(processes: Processes, made: Config) -> list[Any]:
    trainer = Trainer(made, prepare(made))
    trainer.join(processes)
    steps = [trainer.advance() for _ in range(5)]  # the last batch of an epoch leaves a process without a sequence
    loss, measures = trainer.measure(trainer.task.heldout)
    return [[(s.nll, s.tokens, s.grad_norm) for s in steps], loss, measures]


@pytest.mark.slow
def test_several_processes_take_the_steps_of_one(tmp_path: Path):
    made = config(npz(tmp_path), dtype="float64", optimiser="sgd", accumulate=2, batch=3, heldout=0.3)
    expected = trained(Processes(), made)
    for found in forked(2, tmp_path, trained, made):
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-10)
        np.testing.assert_allclose(found[1], expected[1], rtol=1e-10)
        assert found[2] == expected[2]


GOOD = csv(drawn())
BAD: dict[str, tuple[str, str | dict[str, Any], str]] = {
    "missing column": (
        "a.csv",
        GOOD.replace("label", "class"),
        "target must be a column of .*: got 'label'; it has id",
    ),
    "not numeric": ("a.csv", GOOD.replace("-0", "x"), "inputs .* must be finite numbers: line .* has 'x"),
    "ragged": ("a.csv", GOOD + ",7", "must have 5 values in every row: line 48 has 6"),
    "empty": ("a.csv", "", "is empty"),
    "time twice": ("a.csv", GOOD.replace("\n1,2,", "\n1,1,"), "time time of group 1 of .* is twice: line 7 has '1'"),
    "two labels": ("a.csv", GOOD + "\n0,9,1,1,b", "sequence 0 must have one label: got a and b"),
    "one class": ("a.npz", {"y": ["a"] * 11}, "must have at least two classes: got 1, a"),
    "labels without sequences": ("a.npz", {"y": [*LABELS, "a"]}, "one label for each sequence: got 12 for 11"),
    "lengths beyond": ("a.npz", {"x": np.ones((11, 6, 2))}, "lengths must be at most the 6 steps of x: got 7"),
    "all missing": ("a.npz", {"x": np.full((47, 2), np.nan)}, "all values are missing"),
    "not an array file": ("a.npz", "x", "is no file of NumPy's"),
    "no data": ("a.ts", "@classLabel true a b", "it has no @data"),
    "ragged dimensions": ("a.ts", "@classLabel true a b\n@data\n1,2:3:a", "line 3 must have as many values"),
    "unknown class": ("a.ts", "@classLabel true a b\n@data\n1,2:c", "line 3 has the class 'c'"),
    "group without a name": (
        "a.csv",
        GOOD.replace("\n1,2,", "\n,2,"),
        "must name the group of every row",
    ),
    "objects": ("a.npz", {"y": np.array(LABELS, dtype=object)}, "it holds Python objects, which are not read"),
    "no classes": ("a.ts", "@data\n1,2:a\n1,2:b", "must have a line @classLabel true"),
    "another form": ("a.txt", "x", "one of the forms .csv"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str):
    name, data, said = BAD[case]
    path = npz(tmp_path, **data) if isinstance(data, dict) else write(tmp_path, data, name)
    out = tmp_path / "run"
    found = error_of(bptt(capsys, "train", "--classify", path, "--out", out))
    assert re.search(said, found), found
    assert not out.exists()


def test_predict_writes_what_was_measured_and_other_commands_refuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path, run = npz(tmp_path), tmp_path / "run"
    options = ["--heldout-file", path, "--hidden", 5, "--steps", 20, "--threads", 1, "--out", run]
    assert bptt(capsys, "train", "--classify", path, *options).status == 0
    assert (run / "confusion.png").is_file()
    accuracy = RunDirectory.open(run).metrics()[-1]["measures"]["accuracy"]
    said = bptt(capsys, "predict", run, path)
    assert f"accuracy {accuracy:.4f}" in said.out, said
    header, *rows = (run / "classes.csv").read_text().splitlines()
    assert header == "sequence,label,probability,p(a),p(b),p(c)"
    assert len(rows) == 11
    assert all(abs(sum(map(float, row.split(",")[3:])) - 1) < 1e-6 for row in rows)
    assert "must be a run with task=text" in error_of(bptt(capsys, "sample", run))
    narrow = npz(tmp_path, x=drawn()[:, :1])
    assert "must have 2 features: got 1" in error_of(bptt(capsys, "predict", run, narrow))
