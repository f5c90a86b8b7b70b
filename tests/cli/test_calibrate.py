"""`bptt bench --calibrate`: what it writes, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bptt.bench import CALIBRATED, Row, Selection, measure
from bptt.clock import Product
from bptt.kernels import Calibration

from .command import bptt, error_of


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements in this process, without what takes time."""
    monkeypatch.setattr("bptt.bench.tables.product", lambda: Product(1e9, 1.0))
    monkeypatch.setattr("bptt.cli.benched.measured", measure)
    monkeypatch.setattr("bptt.cli.benched.compare", list)


def test_a_file_for_the_variable(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "calibration.json"
    sizes = ("--shape", "5,2,3,4", "--shape", "6,2,3,4", "--threads", "1", "--seconds", "0")
    result = bptt(capsys, "bench", "--calibrate", "--cells", "gru,lstm", *sizes, "--json", file)
    assert result.status == 0, result
    for part in ("forward + backward by kernel, 1 thread", "no_grad by kernel, 1 thread", "fused x"):
        assert part in result.out
    found = Calibration.from_json(file.read_text(encoding="utf-8"))
    assert found.holds
    assert {(r.mode, r.sizes, r.threads, r.differentiated) for r in found.rows} == {
        (mode, (T, 2, 3, 4), 1, way) for mode in ("GRU", "LSTM") for T in (5, 6) for way in (True, False)
    }


def test_what_is_measured_by_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The LSTM alone, which torch leaves to a library on a CPU."""
    selections: list[Selection] = []

    def noted(selection: Selection, threads: int) -> Iterator[Row]:
        selections.append(selection)
        yield from ()

    monkeypatch.setattr("bptt.cli.benched.measured", noted)
    assert bptt(capsys, "bench", "--calibrate", "--json", tmp_path / "calibration.json").status == 0
    assert {selection.cells for selection in selections} == {("lstm",)}
    assert {selection.shapes for selection in selections} == {CALIBRATED}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--json", "x.json", "layers"), "calibrate measures all that auto chooses between: got it with a table"),
        (("--json", "x.json", "--peers", "torch"), "got it with --peers"),
        (("--json", "x.json", "--kernel", "cpu", "--add"), "got it with --add, --kernel"),
        ((), "calibrate writes a file: give --json FILE"),
        (("--json", "x.json", "--shape", "1,2,3"), "shape must be four whole numbers of at least 1"),
    ],
)
def test_a_bad_option_is_one_line(options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in error_of(bptt(capsys, "bench", "--calibrate", *options))
