from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from bptt.cli.app import COMMANDS, app
from bptt.kernels import KERNELS
from bptt.nn import LAYERS
from bptt.train import Config
from bptt.train.options import CELLS
from bptt.train.options import KERNELS as NAMES_OF_KERNELS

from .command import bptt, error_of


def test_help_names_the_commands():
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    for command in ("train", "sample", "demo", "check", "info"):
        assert f" {command} " in result.output


def test_options_of_training_stand_in_groups_with_their_choices():
    result = CliRunner().invoke(app, ["train", "-h"], terminal_width=200)
    groups = re.split(r"[─╭╮╰╯]{2,} ([\w ]+) ─+", result.output)
    by_name = dict(zip(groups[1::2], groups[2::2], strict=True))
    assert list(by_name) == ["Options", "Data", "Series and sequences", "Model", "Gradient", "Optimisation", "Run"]
    flags = {
        "Data": ("--tokens", "char, word"),
        "Model": ("--cell", "layer-norm-lstm"),
        "Optimisation": ("--optimizer", "adam, sgd"),
        "Run": ("--dtype", "float32, float64"),
    }
    for group, (flag, choices) in flags.items():
        assert flag in by_name[group]
        assert choices in by_name[group]


WITHOUT_TORCH = """
import sys
from bptt.cli import main

for arguments in LINES:
    try:
        main(arguments.split())
    except SystemExit as exit:
        print(exit.code, file=sys.stderr)
print([name for name in MODULES if name in sys.modules], file=sys.stderr)
"""


def test_help_and_what_cannot_be_used_load_no_torch(tmp_path: Path):
    """What takes two seconds is loaded when something is computed, and not before."""
    for name, options in {"text": {}, "series": {"series": "none.csv"}}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.toml").write_text(Config(**options).to_toml())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.toml").write_text(Config(cell="nowhere_at_all:Cell").to_toml())
    (tmp_path / "there.csv").write_text("day,y\n1,2\n")
    there = {*tmp_path.rglob("*")}
    helps = ["--help", "--version", "", *(f"{name} --help" for name in COMMANDS)]
    wrong = {
        "tarin": "No such command",
        "train --hiden 3": "No such option: --hiden",
        "train --batch many": "Invalid value for '--batch'",
        "train --cell rrn": "MODULE:CLASS of your own: got 'rrn' (did you mean rnn?)",
        "train --optimizer adm": "optimiser must be one of adam, sgd: got 'adm'",
        "train --gradient short": "gradient must be one of",
        "train --cell nowhere_at_all:Cell": "there is no module nowhere_at_all, neither in",
        "train --cell lif --nonlinearity relu": "nonlinearity is for cell=rnn: got",
        "train --kernel gpu": "kernel must be one of auto, cpu, fused, eager",
        "train --text none.txt": "cannot read text none.txt: No such file",
        "train --text none --documents files": "documents must be in a directory: none is none",
        "train --series none.csv": "cannot read table none.csv: No such file",
        "train --series text": "cannot read table text: Is a directory",
        "train --classify none.npz": "cannot read sequences none.npz: No such file",
        "train --classify none.txt": "sequences must be in a file of one of the forms .csv",
        "train --classify none.ts --tokens word": "tokens is for task=text",
        "train --config none.toml": "cannot read configuration none.toml",
        "train --resume none": "none is not a run directory",
        "train --resume none --out x": "leave out --out",
        "train --resume text --hidden 3": "hidden cannot change when a run is resumed",
        "train --resume series": "cannot read table",
        "train --resume mine": "there is no module nowhere_at_all",
        "sample none": "none is not a run directory",
        "flow none": "none is not a run directory",
        "compare none": "none is not a run directory",
        "sample series": "series must be a run with task=text: got task=series; forecast with it: bptt predict series",
        "predict none none.csv": "none is not a run directory",
        "predict text none.csv": "must be a run with task=series or classify: got task=text; sample from it",
        "predict series none.csv": "cannot read table none.csv",
        "predict series none.csv --out a.png": "out must be the name of a .csv file",
        "bench layer": "table must be one of layers, windows",
        "bench --cell tcn": "cell must be one of rnn, gru, lstm: got 'tcn'",
        "bench steps --shape 3": "shape must be three whole numbers",
        "bench --peers keras": "peers must be one of torch, jax",
        "bench --json none/x.json": "json must be a file in a directory that is there",
        "bench --threads 0": "threads must be whole numbers in [1, ",
        "bench --kernel fpga": "kernel must be one of auto, cpu, fused, eager for layers: got 'fpga'",
        "bench steps --kernel cpu": "kernel must be one of auto, interpreter, eager, replay for steps: got 'cpu'",
        "check --dtype float32": "--dtype is for the layer",
        "check --module torch.nn.GRU --dtype float8": "--dtype must be one of float64, float32: got 'float8'",
        "check --module nowhere_at_all.GRU": "there is no module nowhere_at_all",
        "check --module GRU": "which names no module",
        "train --series there.csv --target w": "target must be a column of there.csv: got 'w'; it has day, y",
        "train --series there.csv --horizon 0 --time day": "horizon=0 predicts y from other columns",
        "train --classify there.csv": "group must be a column of there.csv: got 'id'; it has day, y",
        "train --classify none.npz --group g": "cannot read sequences none.npz",
        "train --device gpu": "device must be a torch device that is there: got 'gpu' (",
        "find-lr --lowest 1 --highest 0.1": "lowest must be below highest=0.1: got 1",
        "find-lr --tries 3": "steps of a range test must be at least 20: got 3",
        "find-lr --out a.pdf": "out must be the name of a .png file",
        "find-lr --series there.csv --group g": "group must be a column of there.csv: got 'g'",
        "sample text --length -1": "length must be at least 0: got -1",
        "sample text --temperature nan": "temperature must be a finite number of at least 0",
        "sample text --device gpu": "did you mean cuda?",
        "flow": "give a run directory, or --cell for a fresh layer",
        "flow --cell rrn": "MODULE:CLASS of your own: got 'rrn' (did you mean rnn?)",
        "flow --cell gru --hidden 0": "hidden must be at least 1: got 0",
        "flow --cell gru --radius -1": "radius must be a finite number of at least 0: got -1",
        "flow --cell lif --radius 1": "radius is for --cell rnn or gru or lstm: got 1 with --cell lif",
        "flow --cell rnn --nonlinearity relo": "nonlinearity must be one of tanh, relu, sigmoid, identity: got 'relo'",
        "flow --cell rnn --seed -1": "seed must be a whole number in",
        "flow --cell nowhere_at_all:Cell": "there is no module nowhere_at_all",
        "flow --lang fr": "lang must be en or zh: got 'fr'",
        "flow text --hidden 3": "a run has its own network: leave out --hidden",
        "flow text --lanes 0": "lanes must be at least 1: got 0",
        "compare text --repeats 1": "repeats must be at least 5",
        "compare text --draws 1": "draws must be at least 2",
        "compare text often": "gradient must be one of",
        "compare --scan loops": "scan must be MODULE:FUNCTION",
        "compare --scan nowhere_at_all:f": "there is no module nowhere_at_all",
        "compare --scan a:f --hidden 3": "a scan has its own step and batch: leave out hidden",
        "demo --steps 0": "steps must be a whole number of at least 1: got 0",
    }
    assert_refused_without(["torch", "numpy", "matplotlib"], wrong, tmp_path, helps)
    assert {*tmp_path.rglob("*")} == there


def test_columns_of_every_form_of_table_are_known_without_torch(tmp_path: Path):
    """From the first line or the schema of what is trained on, and of what a run is to predict from."""
    runs: list[tuple[str, dict[str, str], object]] = [
        ("series", {"series": "none.csv"}, {"targets": ["y"], "inputs": ["y", "z"], "horizon": 1}),
        ("timed", {"series": "none.csv", "time": "t"}, {"targets": ["y"], "inputs": ["z"], "horizon": 0}),
        ("classify", {"classify": "none.csv"}, {"features": ["a", "b"]}),
    ]
    for name, options, kept in runs:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.toml").write_text(Config.from_entries(options, name).to_toml())
        stored = {"series": "scaling.json", "classify": "classes.json"}["series" if "series" in options else "classify"]
        (tmp_path / name / stored).write_text(json.dumps(kept))
    (tmp_path / "less.csv").write_text("day,y\n1,2\n")
    (tmp_path / "one.csv").write_text("id,a,label\n0,1,2\n")
    (tmp_path / "other.csv").write_text("id,a,c\n0,1,2\n")
    (tmp_path / "damaged.npz").write_bytes(b"PK\x03\x04")
    np.savez(tmp_path / "less.npz", day=np.zeros(3), y=np.zeros(3))
    np.save(tmp_path / "two.npy", np.zeros((3, 2)))
    wrong = {
        "predict series less.csv": "inputs must be a column of less.csv: got 'z'; it has day, y",
        "predict series less.npz": "inputs must be a column of less.npz: got 'z'; it has day, y",
        "predict series two.npy": "target must be a column of two.npy: got 'y'; it has 0, 1",
        "predict timed two.npy": "inputs must be a column of two.npy: got 'z'",
        "predict classify one.csv": "one.csv must have 2 features: got 1",
        "predict classify other.csv": "other.csv must have the features of the training, 'b': got 'c' in its place",
        "predict classify less.csv": "group must be a column of less.csv: got 'id'",
        "train --series less.npz --target w": "target must be a column of less.npz: got 'w'; it has day, y",
        "train --series two.npy --target w": "target must be a column of two.npy: got 'w'; it has 0, 1",
    }
    if importlib.util.find_spec("pyarrow") or importlib.util.find_spec("polars"):
        (tmp_path / "odd.parquet").write_bytes(b"PAR1")
        wrong["predict series odd.parquet"] = "table odd.parquet is no Parquet"
    assert_refused_without(["torch"], wrong, tmp_path)


def assert_refused_without(modules: list[str], wrong: dict[str, str], folder: Path, helps: Sequence[str] = ()) -> None:
    """That command lines are refused, each with its words, in a process that loads none of the modules."""
    program = WITHOUT_TORCH.replace("LINES", repr([*helps, *wrong])).replace("MODULES", repr(modules))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=folder)
    lines = done.stderr.splitlines()
    assert lines.pop() == "[]"
    assert lines[: len(helps)] == ["0"] * len(helps)
    told, statuses = lines[len(helps) :: 2], lines[len(helps) + 1 :: 2]
    assert statuses == ["2"] * len(wrong)
    assert [said for said, words in zip(told, wrong.values(), strict=True) if words not in said] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_no_word_of_help_is_cut_at_60_columns(command: str):
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "60"})
    assert max(map(len, result.output.splitlines())) == 60
    assert "…" not in result.output


def test_help_says_of_each_command_what_it_says_itself_and_lists_all_choices():
    for name, summary in COMMANDS.items():
        module = name.replace("-", "_")
        command = getattr(importlib.import_module(f"bptt.cli.{module}"), module)
        assert summary.rstrip(".") in " ".join(inspect.getdoc(command).split()), name
    assert tuple(LAYERS) == CELLS
    assert tuple(KERNELS) == NAMES_OF_KERNELS


def test_no_arguments_is_help(capsys: pytest.CaptureFixture[str]):
    result = bptt(capsys)
    assert result.status == 0
    assert "Usage: bptt" in result.out


@pytest.mark.slow
def test_it_runs_as_a_module():
    result = subprocess.run([sys.executable, "-m", "bptt", "--version"], capture_output=True, text=True, check=True)
    assert result.stdout == f"bptt {importlib.metadata.version('bptt')}\n"
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--speed"], "No such option: --speed"),
        (["tarin"], "No such command 'tarin'"),
        (["train", "--batch", "many"], "Invalid value for '--batch'"),
        (["train", "--hiden", "3"], "No such option: --hiden"),
        (["sample"], "Missing argument 'RUN'"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
):
    assert message in error_of(bptt(capsys, *arguments))


@pytest.mark.parametrize("missing", ["typer", "rich", "safetensors", "tomli_w"])
def test_a_missing_package_names_the_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, missing: str
):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    assert error_of(bptt(capsys, "info")) == f"{missing} not installed: pip install 'bptt[cli]'"


class Interrupting:
    """Ctrl-C while a module is being imported."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "bptt.cli.app":
            raise KeyboardInterrupt


def test_ctrl_c_while_the_commands_are_imported_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delitem(sys.modules, "bptt.cli.app")
    monkeypatch.setattr(sys, "meta_path", [Interrupting(), *sys.meta_path])
    result = bptt(capsys, "info")
    assert (result.status, result.out, result.err) == (130, "", "bptt: interrupted\n")


def test_ctrl_c_in_a_command_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bptt.cli.checked.compare", interrupt)
    result = bptt(capsys, "check")
    assert (result.status, result.err) == (130, "bptt: interrupted\n")


def test_info_names_versions_and_kernels(capsys: pytest.CaptureFixture[str]):
    result = bptt(capsys, "info")
    assert result.status == 0
    for word in ("torch", "processor", "threads", "BLAS", "eager", "calibration", "safetensors"):
        assert word in result.out
