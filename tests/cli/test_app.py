from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from bptt.cli.app import app

from .command import bptt, error_of


def test_help_names_the_commands():
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    for command in ("train", "sample", "demo", "check", "info"):
        assert f" {command} " in result.output


def test_options_of_training_stand_in_groups_with_their_choices():
    result = CliRunner().invoke(app, ["train", "-h"], terminal_width=200)
    groups = re.split(r"[─╭╮╰╯]{2,} (\w+) ─+", result.output)
    by_name = dict(zip(groups[1::2], groups[2::2], strict=True))
    assert list(by_name) == ["Options", "Data", "Model", "Gradient", "Optimisation", "Run"]
    flags = {
        "Data": ("--tokens", "char, word"),
        "Model": ("--cell", "rnn, gru, lstm"),
        "Optimisation": ("--optimizer", "adam, sgd"),
        "Run": ("--dtype", "float32, float64"),
    }
    for group, (flag, choices) in flags.items():
        assert flag in by_name[group]
        assert choices in by_name[group]


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

    monkeypatch.setattr("bptt.cli.check.compare", interrupt)
    result = bptt(capsys, "check")
    assert (result.status, result.err) == (130, "bptt: interrupted\n")


def test_info_names_versions_and_kernels(capsys: pytest.CaptureFixture[str]):
    result = bptt(capsys, "info")
    assert result.status == 0
    for word in ("torch", "processor", "threads", "BLAS", "eager", "calibration", "safetensors"):
        assert word in result.out
