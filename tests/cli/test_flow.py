"""`bptt flow` and `bptt compare`, of a run and of a fresh layer."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from train.tiny import tiny, write_text

from bptt.cli.subject import subject
from bptt.train import fit, start

from .command import bptt, error_of

FRESH = ("--cell", "rnn", "--hidden", 6, "--steps", 12, "--lanes", 2)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    trainer, directory = start(tiny(write_text(folder), heldout=0.3, steps=6), folder / "run")
    fit(trainer, directory)
    return directory.path


@pytest.mark.slow
def test_a_run_gets_a_verdict_a_report_and_pictures(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = bptt(capsys, "flow", run)
    assert result.status == 0, result.err
    assert "run: gru, 8 units, trained with gradient=full" in result.out
    assert re.search(r"90 % arises within \d+ steps", result.out)
    head, _, rest = result.out.partition("\n\n")
    said = dict(line.split(maxsplit=1) for line in head.splitlines()[1:])
    assert list(said) == ["net", "data", "window", "lanes", "policy", "seed", "versions"]
    assert re.match(r"GRU `recurrent`: 8 units on \d+ inputs, \d+ parameters", said["net"])
    assert re.search(r"its held-out part of \d+ characters; measured \d{4}-\d\d-\d\d", said["data"])
    assert "gradient=full in training" in said["policy"]
    assert (
        rest.index("gradient") < max(rest.find("What to change"), rest.find("Nothing to change")) < rest.index("by lag")
    )
    assert "  training " in result.out
    folder = run / "flow"
    assert f"report: {folder / 'report.html'}" in result.out
    names = {path.stem for path in folder.glob("*.png")}
    assert names >= {"lag_map", "decay", "shares", "products", "eigenvalues", "gates", "comparison", "training"}
    assert "cell_path" not in names  # a GRU has none
    assert "<html" in (folder / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_fresh_layer_of_a_given_radius(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = bptt(capsys, "flow", *FRESH, "--nonlinearity", "identity", "--radius", 1.25, "--out", tmp_path / "new")
    assert result.status == 0, result.err
    assert "fresh rnn (identity), 6 units, spectral radius 1.25" in result.out
    assert "The largest |eigenvalue| is 1.25" in result.out
    assert (tmp_path / "new" / "report.html").exists()


@pytest.mark.parametrize(
    ("radius", "words"),
    [
        (0.9, "90 % arises within 21 steps"),
        (0.985, "The window was lengthened from 100 to 400 steps, until the horizon settled"),
        (0.9999, "The horizon has not settled in a window lengthened from 100 to 1024 steps, the most that is tried"),
        (1.25, "Gradients explode"),
    ],
)
def test_the_window_is_lengthened_until_the_horizon_settles(
    radius: float, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An orthogonal W_hh times the radius, and what its lags say; pictures are others' business."""
    for name in ("require_pictures", "write_report"):
        monkeypatch.setattr(f"bptt.cli.flow.{name}", lambda *_: tmp_path)
    monkeypatch.setattr("bptt.nn.init.radius_", _turning)
    of = ("--cell", "rnn", "--hidden", 4, "--lanes", 1, "--nonlinearity", "identity", "--radius", radius)
    result = bptt(capsys, "flow", *of)
    assert result.status == 0, result.err
    assert words in result.out
    assert ("lengthened from" in result.out) == ("lengthened from" in words)


def _turning(layer: torch.nn.RNNBase, radius: float) -> torch.nn.RNNBase:
    with torch.no_grad():
        layer.weight_hh_l0.copy_(radius * torch.linalg.qr(layer.weight_hh_l0)[0])
    return layer


def test_a_window_that_was_asked_for_stays_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("require_pictures", "write_report"):
        monkeypatch.setattr(f"bptt.cli.flow.{name}", lambda *_: tmp_path)
    monkeypatch.setattr("bptt.nn.init.radius_", _turning)
    of = ("--cell", "rnn", "--hidden", 4, "--lanes", 1, "--nonlinearity", "identity", "--radius", 0.985)
    result = bptt(capsys, "flow", *of, "--steps", 64)
    assert "90 % arises within at least" in result.out
    assert "The horizon has not settled in 64 steps; measure longer: --steps 256" in result.out
    result = bptt(capsys, "flow", *of, "--steps", 512, "--lags", 32)
    assert "The horizon has not settled in 32 steps; measure longer: --lags 128" in result.out


def test_the_seed_decides_the_layer_and_its_input() -> None:
    def drawn(seed: int | None) -> torch.Tensor:
        call = subject(None, 12, 2, cell="rnn", hidden=6, seed=seed).recording.call
        return torch.cat([t.flatten() for t in (call.x, *call.weights)])

    before = torch.get_rng_state()
    assert torch.equal(drawn(3), drawn(3))
    assert not torch.equal(drawn(3), drawn(4))
    assert torch.equal(drawn(None), drawn(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_policies_follow_the_flag(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policies = ("full", "chunked:3", "truncated:4", "randomized:0.9")
    result = bptt(capsys, "compare", run, "--gradient", *policies, "--out", tmp_path)
    assert result.status == 0, result.err
    rows = [line.split()[0] for line in result.out.splitlines() if line.strip().startswith(policies)]
    assert rows[:4] == list(policies)
    assert "finite on long sequences for p >" in result.out
    assert (tmp_path / "comparison.png").stat().st_size > 5000


def test_compare_a_fresh_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = bptt(capsys, "compare", *FRESH, "--gradient", "full", "truncated:3", "--out", tmp_path)
    assert result.status == 0, result.err
    assert "fresh rnn, 6 units: 12 steps, 2 lanes" in result.out
    assert "truncated:3" in result.out


def test_a_fresh_layer_of_a_cell_of_ones_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cells_for_flow.py").write_text(
        "import torch\nclass Mine(torch.nn.RNNCell):\n    def __init__(self, i, h): super().__init__(i, h)\n"
    )
    monkeypatch.chdir(tmp_path)
    for name in ("require_pictures", "write_report"):
        monkeypatch.setattr(f"bptt.cli.flow.{name}", lambda *_: tmp_path)
    said = {}
    for cell in ("rnn", "cells_for_flow:Mine", "mgu"):
        result = bptt(capsys, "flow", "--cell", cell, "--hidden", 5, "--steps", 20, "--lanes", 2)
        assert result.status == 0, result.err
        assert f"fresh {cell}, 5 units" in result.out
        said[cell] = re.findall(r"\|J_t\| is at most [\d.]+", result.out)
    assert said["mgu"] != said["rnn"]
    assert said["cells_for_flow:Mine"] == said["rnn"] != []  # the same cell, drawn alike


@pytest.mark.parametrize("command", ["flow", "compare"])
def test_what_cannot_be_measured(
    command: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def error(*arguments: object) -> str:
        return error_of(bptt(capsys, command, *arguments))

    assert error() == "give a run directory, or --cell for a fresh layer"
    assert "is not a run directory" in error(tmp_path)
    assert "or MODULE:CLASS of your own: got 'elman'" in error("--cell", "elman")
    assert "leave out --hidden" in error(run, "--hidden", 3)
    assert "hidden must be at least 1: got 0" in error("--cell", "gru", "--hidden", 0)
    assert "radius" in error("--cell", "gru", "--radius", -1)
    assert "nonlinearity is for --cell rnn" in error("--cell", "gru", "--nonlinearity", "relu")
    assert "too short" in error(run, "--steps", 10_000)
    assert "steps must be at least 1: got 0" in error(run, "--steps", 0)
    assert not list(tmp_path.iterdir())


def test_what_only_one_command_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert error_of(bptt(capsys, "flow", *FRESH, "--lags", 0)) == "lags must be at least 1: got 0"
    assert "got 'sometimes'" in error_of(bptt(capsys, "compare", *FRESH, "--gradient", "sometimes"))
    assert "draws must be at least 2" in error_of(
        bptt(capsys, "compare", *FRESH[:4], "--gradient", "randomized:0.5", "--draws", 1)
    )


OWN = """
import torch, bptt

def looped():
    w = torch.full((), 0.5, requires_grad=True)
    return bptt.flow.scanned(
        lambda h, _: (w * h + 1, None), torch.zeros(()), loss=lambda h, _: h, length=6, gradient="truncated:2"
    )

def nothing():
    return 3
"""


def test_compare_a_scan_of_ones_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_own_loops.py").write_text(OWN, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    of = ("compare", "--scan", "my_own_loops:looped")
    result = bptt(capsys, *of, "--gradient", "full", "chunked:3")
    assert result.status == 0, result.err
    assert "my_own_loops:looped: 6 steps, 1 lanes" in result.out
    rows = [
        line.split()[:2] for line in result.out.splitlines() if line.strip().startswith(("full ", "chunk", "trunc"))
    ]
    assert [row[0] for row in rows[:3]] == ["full", "chunked:3", "truncated:2"]
    assert rows[2][1] == "*"
    assert (tmp_path / "flow" / "comparison.png").exists()

    def error(*arguments: object) -> str:
        return error_of(bptt(capsys, "compare", *arguments))

    assert "leave out steps, cell" in error(*of[1:], "--steps", 3, "--cell", "gru")
    assert "must be MODULE:FUNCTION" in error("--scan", "my_own_loops")
    assert "my_own_loops has no missing" in error("--scan", "my_own_loops:missing")
    assert "there is no module nowhere_to_be_found" in error("--scan", "nowhere_to_be_found:x")
    assert "my_own_loops:nothing gave 3" in error("--scan", "my_own_loops:nothing")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Glyph")
def test_a_verdict_and_a_report_in_chinese(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = bptt(capsys, "flow", run, "--steps", 12, "--lags", 4, "--lang", "zh", "--out", tmp_path)
    assert result.status == 0, result.err
    assert "8 个单元，以 gradient=full 训练" in result.out
    assert "建议改动" in result.out or "无需改动" in result.out
    assert "What to change" not in result.out
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(words in page for words in ('<html lang="zh">', "梯度流：", "留出部分"))
    # Beside its charts, the page has no English sentence left.
    words = re.sub(r"<script.*?</script>|<style.*?</style>|<[^>]+>", " ", page, flags=re.DOTALL)
    assert re.findall(r"\s(?:the|of|and|is|steps)\s.{0,30}", words) == []


def test_an_unknown_language_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert error_of(bptt(capsys, "flow", *FRESH, "--lang", "fr")) == "lang must be en or zh: got 'fr'"
