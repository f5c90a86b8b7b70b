from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from bptt.bench import (
    CALIBRATION_TABLES,
    COMPILE_SECONDS,
    PEERS,
    SHAPES,
    STEP_CELLS,
    STEP_SHAPES,
    TABLES,
    Results,
    Row,
    Selection,
    measure,
)
from bptt.bench.layers import layer_call
from bptt.cli import bench as command
from bptt.cli import bench_options as named
from bptt.clock import Product
from bptt.kernels import VARIABLE

from .command import bptt, error_of

TINY = ("layers", "--cell", "gru", "--shape", "5,2,3,4", "--threads", "1", "--peers", "torch", "--seconds", "0")


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements in this process, without what takes time."""
    monkeypatch.setattr("bptt.bench.tables.product", lambda: Product(1e9, 1.0))
    monkeypatch.setattr("bptt.cli.benched.measured", measure)
    monkeypatch.setattr("bptt.cli.benched.compare", list)


def test_a_table_the_verdicts_and_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    file = tmp_path / "results.json"
    result = bptt(capsys, "bench", *TINY, "--json", file)
    assert result.status == 0, result
    for part in ("layers, 1 thread, a matrix product runs at 1 GFLOP/s", "5, 2, 3, 4", "GRU", "torch.nn x", "share"):
        assert part in result.out
    assert "never slower than torch.nn" in result.out
    assert result.err.startswith("GRU (5, 2, 3, 4), 1 thread: bptt ")
    results = Results.from_json(file.read_text(encoding="utf-8"))
    [row] = results.rows
    assert (results.kernel, row.threads, row.rivals) == ("auto", 1, ["torch.nn"])
    assert results.machine.processor
    assert "not to be trusted" not in result.out


def test_measurements_are_added_and_not_made_twice(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / "results.json"
    seen: list[str] = []

    def noted(selection: Selection, threads: int) -> Iterator[Row]:
        for row in measure(selection, threads):
            seen.append(str(row.case))
            yield row
            if len(seen) == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr("bptt.cli.benched.measured", noted)
    three = ("--shape", "6,2,3,4", "--shape", "7,2,3,4", "--json", file, "--add")
    assert bptt(capsys, "bench", *TINY, *three).status == 130
    assert len(Results.from_json(file.read_text(encoding="utf-8")).rows) == 2  # of three
    assert bptt(capsys, "bench", *TINY, *three).status == 0
    assert seen == [f"GRU ({T}, 2, 3, 4)" for T in (5, 6, 7)]
    assert len(Results.from_json(file.read_text(encoding="utf-8")).rows) == 3
    assert bptt(capsys, "bench", *TINY, "--json", file).status == 0
    assert len(Results.from_json(file.read_text(encoding="utf-8")).rows) == 1
    message = error_of(bptt(capsys, "bench", *TINY, "--json", file, "--add", "--kernel", "eager"))
    assert message == f"kernel must be that of {file}, auto: got eager"
    file.write_text(file.read_text(encoding="utf-8").replace('"torch": "', '"torch": "0.'), encoding="utf-8")
    message = error_of(bptt(capsys, "bench", *TINY, "--json", file, "--add"))
    assert message.startswith(f"{file} was measured elsewhere, or with other versions: torch 0.")
    file.write_text("[]", encoding="utf-8")
    assert "holds no measurements of bptt bench" in error_of(bptt(capsys, "bench", *TINY, "--json", file, "--add"))
    assert error_of(bptt(capsys, "bench", *TINY, "--add")) == "add is for a file of measurements: give --json FILE"
    message = error_of(bptt(capsys, "bench", *TINY, "--compile-seconds", "0"))
    assert message == "compile-seconds must be a finite number above 0: got 0.0"


def test_the_other_tables(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    seen: list[tuple[Selection, int]] = []

    def nothing(selection: Selection, threads: int) -> Iterator[Row]:
        seen.append((selection, threads))
        yield from ()

    monkeypatch.setattr("bptt.cli.benched.measured", nothing)
    monkeypatch.setattr("bptt.cli.bench_options.cores", lambda: 4)
    assert bptt(capsys, "bench", "--threads", "4,1").status == 0
    assert bptt(capsys, "bench", "--quick").status == 0
    assert bptt(capsys, "bench", "scan", "train", "--cell", "lstm,rnn").status == 0
    whole, _, quick, _, some, _ = (selection for selection, _ in seen)
    assert [threads for _, threads in seen] == [4, 1, 1, 2, 1, 2]
    assert (whole.tables, len(whole.cases()), whole.least) == (
        ("layers", "windows", "scan", "train"),
        24 + 3 + 2 + 3,
        5,
    )
    assert (quick.tables, len(quick.cases()), quick.least) == (("layers",), 9, 3)
    assert [str(case) for _, case in some.cases()] == [
        "LSTM (100, 1, 32, 32)",
        "LSTM (100, 32, 128, 128)",
        "RNN (64, 32, 64, 256)",
        "LSTM (64, 32, 64, 256)",
    ]


STEPS = ("steps", "--threads", "1", "--seconds", "0", "--peers", "torch")


def test_steps(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    file = tmp_path / "results.json"
    result = bptt(capsys, "bench", *STEPS, "--cells", "gru,kalman", "--shapes", "12,2,5", "--json", file)
    assert result.status == 0, result
    for part in (
        "steps, 1 thread",
        "T, B, H",
        "12, 2, 5",
        "gru chunked:10",
        "kalman",
        "loop x",
        "module x",
        "first ms",
    ):
        assert part in result.out
    assert "largest errors before the timing, 1 thread" in result.out
    assert "steps never slower than the plain loop" in result.out
    assert result.err.startswith("GRU (12, 2, 5, 5), 1 thread: scan ")
    rows = Results.from_json(file.read_text(encoding="utf-8")).rows
    assert [str(row.case) for row in rows] == [
        "GRU (12, 2, 5, 5)",
        "GRU (12, 2, 5, 5) chunked:10",
        "KALMAN (12, 2, 5, 5)",
    ]
    assert all(row.table == "steps" and list(row.first) == list(row.times) for row in rows)


def test_which_steps(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    seen: list[Selection] = []

    def nothing(selection: Selection, threads: int) -> Iterator[Row]:
        seen.append(selection)
        yield from ()

    monkeypatch.setattr("bptt.cli.benched.measured", nothing)
    monkeypatch.setattr("shutil.which", lambda name: name)
    for options in (
        (),
        ("--quick",),
        ("--all",),
        ("--all", "--cells", "lif", "--compile"),
        ("--shapes", "5,2,3", "--shape", "7,1,2"),
        ("layers", "--cells", "lstm,rnn,cornn", "--shape", "5,2,3,4", "--shape", "5,2,3"),
    ):
        assert bptt(capsys, "bench", *STEPS, *options).status == 0
    usual, quick, everything, one, sized, both = seen
    assert len(usual.cases()) == 2 * (7 + 6)
    assert len(quick.cases()) == 7
    assert len(everything.cases()) == 5 * (17 + 6)
    assert (len(one.cases()), one.compiled) == (5, True)
    assert sized.step_shapes == ((5, 2, 3), (7, 1, 2))
    assert [(table, str(case)) for table, case in both.cases()] == [
        ("steps", "LSTM (5, 2, 3, 3)"),
        ("steps", "CORNN (5, 2, 3, 3)"),
        ("layers", "LSTM (5, 2, 3, 4)"),
        ("layers", "RNN (5, 2, 3, 4)"),
    ]


def test_a_kernel_that_cannot_run_a_step_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def refuse(step: object, carry: object, xs: object, kernel: str) -> None:
        raise RuntimeError(f"kernel={kernel!r} has no linalg_solve")

    monkeypatch.setattr("bptt.cli.benched.scan", refuse)
    message = error_of(bptt(capsys, "bench", *STEPS, "--cells", "kalman", "--kernel", "interpreter"))
    assert message == "kalman: kernel='interpreter' has no linalg_solve"


def test_without_a_compiler_of_c(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    message = error_of(bptt(capsys, "bench", *STEPS, "--compile"))
    assert message == "compile needs a C++ compiler, one of c++, g++, clang++: found none"


def test_a_wrong_contender_is_named_and_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setitem(PEERS, "torch.nn", lambda problem: layer_call(problem.layer, problem.x, 2 * problem.dy))
    result = bptt(capsys, "bench", *TINY)
    assert result.status == 1
    assert "not timed: torch.nn on GRU (5, 2, 3, 4) is off by 1.0e+00 of the largest entry" in result.out
    assert "torch.nn wrong" in result.err


def test_a_busy_machine_is_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("bptt.bench.tables.product", lambda: Product(1e9, 0.6))
    out = bptt(capsys, "bench", *TINY).out
    assert "not to be trusted on 1 thread: other programs left it 0.6 cores" in out


def test_nothing_is_timed_where_the_equations_disagree(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    class Wrong:
        net, policy, agrees = "gru", "full", False

    monkeypatch.setattr("bptt.cli.benched.compare", lambda: [Wrong()])
    monkeypatch.setattr("bptt.cli.benched.measured", None)
    result = bptt(capsys, "bench", *TINY)
    assert (result.status, result.err) == (1, "")
    assert "not timed: these disagree with the equations, see bptt check: gru full" in result.out


def test_ctrl_c_shows_what_is_done_and_keeps_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    def interrupted(selection: Selection, threads: int) -> Iterator[Row]:
        yield from measure(selection, threads)
        raise KeyboardInterrupt

    monkeypatch.setattr("bptt.cli.benched.measured", interrupted)
    file = tmp_path / "results.json"
    result = bptt(capsys, "bench", *TINY, "--json", file)
    assert result.status == 130
    assert result.err.endswith("bptt: interrupted\n")
    assert "5, 2, 3, 4" in result.out
    assert len(Results.from_json(file.read_text(encoding="utf-8")).rows) == 1


def test_without_jax_its_column_is_left_out(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "jax" else find(name))
    arguments = [argument for argument in TINY if argument not in ("--peers", "torch")]
    result = bptt(capsys, "bench", *arguments)
    assert result.status == 0
    assert "JAX's column is left out: jax is not installed: pip install 'bptt[bench]'" in result.out
    assert "JAX x" not in result.out
    message = error_of(bptt(capsys, "bench", *arguments, "--peers", "torch,jax"))
    assert message == "jax is not installed: pip install 'bptt[bench]'"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["layer"], "table must be one of layers, windows, scan, train, steps, inference, short, stacks: got 'layer'"),
        (["--cell", "lstm,tcn"], "cell must be one of rnn, gru, lstm: got 'tcn'"),
        (["scan", "--cell", "gru"], "cell must be one that scan has: got 'gru'"),
        (["--shape", "5,2,3"], "shape must be four whole numbers of at least 1, T,B,I,H: got '5,2,3'"),
        (["--shape", "5,2,3,0"], "shape must be four whole numbers of at least 1, T,B,I,H: got '5,2,3,0'"),
        (["scan", "--shape", "5,2,3,4"], "shape is for the tables layers and steps: got shape with scan"),
        (["scan", "train", "--peers", "torch"], "peers is for the tables layers and steps: got peers with scan, train"),
        (
            ["steps", "--cells", "lif,tcn"],
            "cell must be one of lstm, gru, layer-norm-lstm, leaky, lif, slstm, cornn, lem,",
        ),
        (["steps", "--cells", "rnn"], "world-model: got 'rnn'"),
        (["layers", "--cells", "lif"], "cell must be one of rnn, gru, lstm: got 'lif'"),
        (["layers", "steps", "--cells", "tcn"], "cell must be one of rnn, gru, lstm, layer-norm-lstm,"),
        (["steps", "--shapes", "5,2"], "shape must be three whole numbers of at least 1, T,B,H, for steps: got '5,2'"),
        (["steps", "--shapes", "5,2,3,4"], "T,B,H, for steps: got '5,2,3,4'"),
        (["steps", "--shapes", "5,0,3"], "T,B,H, for steps: got '5,0,3'"),
        (
            ["layers", "steps", "--shape", "5"],
            "shape must be four whole numbers of at least 1, T,B,I,H or three, T,B,H:",
        ),
        (["steps", "--kernel", "fpga"], "for steps: got 'fpga'"),
        (["layers", "--all"], "all is for the table steps: got all with layers"),
        (["--compile"], "compile is for the table steps: got compile with layers, windows, scan, train"),
        (["steps", "--quick", "--all"], "quick and all exclude one another: got both"),
        (["--threads", "0"], "the cores there are: got '0'"),
        (["--threads", "1,x"], "the cores there are: got '1,x'"),
        (["--threads", "99999"], "the cores there are: got '99999'"),
        (["--peers", "torch,keras"], "peers must be one of torch, jax: got 'keras'"),
        (["--kernel", "fpga"], "got 'fpga'"),
        (["--seconds", "-1"], "seconds must be a finite number of at least 0: got -1.0"),
        (["--seconds", "many"], "Invalid value for '--seconds'"),
        (["--json", "missing/x.json"], "json must be a file in a directory that is there: got 'missing/x.json'"),
        (["--json", "."], "json must be a file in a directory that is there: got '.'"),
    ],
)
def test_a_bad_option_is_one_line(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bptt.cli.benched.measured", None)
    assert message in error_of(bptt(capsys, "bench", *arguments))


def test_a_kernel_that_refuses_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    def refuse(layer: object, x: object) -> str:
        raise RuntimeError("kernel='cpu' cannot run this layer: no such processor")

    monkeypatch.setattr("bptt.kernels.explain", refuse)
    message = error_of(bptt(capsys, "bench", *TINY))
    assert message == "kernel='cpu' cannot run this layer: no such processor"
    assert command.bench.__doc__


def test_help_names_what_can_be_measured():
    """Without torch it cannot ask."""
    assert tuple(name for name in TABLES if name not in CALIBRATION_TABLES) == named.TABLES
    assert Selection.tables == named.USUAL_TABLES
    assert tuple(STEP_CELLS) == named.STEP_CELLS
    assert Selection.step_cells == named.USUAL_STEPS
    shapes = (SHAPES, Selection.step_shapes, STEP_SHAPES)
    assert tuple(map(len, shapes)) == (named.LAYER_SHAPES, named.USUAL_STEP_SHAPES, named.STEP_SHAPES)
    assert (named.COMPILE_SECONDS, named.CALIBRATION_FILE) == (COMPILE_SECONDS, VARIABLE)
