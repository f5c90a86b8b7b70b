"""`bptt train --series` and `bptt predict`."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest

from bptt.flow import conclusion

from .command import bptt, error_of

SMALL = ["--cell", "gru", "--hidden", 6, "--batch", 2, "--seq-length", 8, "--steps", 4, "--threads", 1]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "data.csv"
    path.write_text("day,y\n" + "".join(f"2024-01-{d:02d},{math.sin(d):.4f}\n" for d in range(1, 31)))
    return path


def test_from_a_table_to_a_forecast(capsys: pytest.CaptureFixture[str], table: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    series = ["--series", table, "--time", "day", "--horizon", 3, "--season", 2]
    made = bptt(capsys, "train", *series, *SMALL, "--out", out)
    assert made.status == 0, made.err
    assert "the naive forecast has mase" in made.err
    assert "; held-out loss " in made.out
    assert f"bptt predict {out} DATA.csv" in made.out
    result = bptt(capsys, "predict", out, table)
    assert result.status == 0, result.err
    written = list(csv.reader((out / "forecast.csv").read_text().splitlines()))
    assert [row[0] for row in written] == ["day", "2024-01-31", "2024-02-01", "2024-02-02"]
    assert all(math.isfinite(float(row[1])) for row in written[1:])
    assert (out / "forecast.png").stat().st_size > 5000
    compared = bptt(capsys, "compare", out, "full", "chunked:3", "--repeats", 5, "--steps", 6, "--lanes", 2)
    assert compared.status == 0, compared.err
    assert "must be a run with task=text: got task=series; forecast" in error_of(bptt(capsys, "sample", out))


def test_a_regression_of_series_of_several_lengths(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    lines = [f"{t},{g},{t % 5},{t % 3}" for g, n in (("a", 40), ("b", 30)) for t in range(n)]
    table, out = tmp_path / "data.csv", tmp_path / "run"
    table.write_text("\n".join(["t,g,x,y", *lines]))
    columns = ["--time", "t", "--group", "g", "--target", "y", "--inputs", "x", "--horizon", 0]
    made = bptt(capsys, "train", "--series", table, *columns, *SMALL, "--patience", 1, "--eval-every", 1, "--out", out)
    assert made.status == 0, made.err
    assert ", the best, held-out loss " in made.out
    result = bptt(capsys, "predict", out, table)
    assert result.status == 0, result.err
    assert len((out / "forecast.csv").read_text().splitlines()) == 71
    assert (out / "forecast.png").stat().st_size > 5000


def test_mistakes_are_one_line_and_nothing_is_written(
    capsys: pytest.CaptureFixture[str], table: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox " * 30)
    run = tmp_path / "text"
    assert bptt(capsys, "train", "--text", text, *SMALL, "--out", run).status == 0
    before = sorted(run.iterdir())
    assert "must be a run with task=series or classify: got task=text; sample" in error_of(
        bptt(capsys, "predict", run, table)
    )
    assert sorted(run.iterdir()) == before
    for flags, message in (
        (["--target", "w"], "target must be a column of"),
        (["--time", "day", "--tokens", "word"], "tokens is for task=text: got tokens='word' and task=series"),
        (["--seq-length", 64, "--target", "y"], "is too short: 27 rows are left to train on"),
        (["--horizon", 0, "--target", "y", "--time", "day"], "horizon=0 predicts y from other columns"),
    ):
        assert message in error_of(bptt(capsys, "train", "--series", table, *SMALL, *flags, "--out", tmp_path / "no"))
        assert not (tmp_path / "no").exists()


def test_the_course_of_a_run_without_perplexity_is_told_by_its_loss() -> None:
    record = {"step": 5, "steps": 5, "perplexity": None, "heldout_perplexity": None, "clipped": 0.0, "loss": 2.0}
    last = record | {"step": 9, "loss": 1.0, "heldout_loss": 1.5}
    assert conclusion([record, last]).startswith("Loss went from 2 to 1 in 9 steps; held-out 1.5")
