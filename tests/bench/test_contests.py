"""Every contender answers right, at odd sizes; who does not is not timed."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from time import sleep
from typing import Any

import numpy as np
import pytest
import torch

from bptt.bench import NAMES, PEERS, TABLES, Case, Problem, Row, Selection, largest_error, layer_call, measure
from bptt.bench.contest import Contest
from bptt.bench.layers import layer_contest
from bptt.bench.short import inference_contest
from bptt.bench.stacks import stack_contest
from bptt.bench.step_cells import JAX_STEPS, STEP_CELLS
from bptt.bench.steps import POLICIES, STEP_SHAPES, USUAL_STEPS, cell_contest, contenders, step_cases, step_contest
from bptt.bench.training import training_contest
from bptt.bench.windows import TwoLoops, window_contest
from bptt.clock import Product
from bptt.equations import gru, lstm, recurrence, rnn
from bptt.scan import scan
from bptt.train import InputError

CELLS = ["rnn", "gru", "lstm"]


def check(contest: Contest, names: Sequence[str]) -> None:
    errors = contest.errors()
    assert list(errors) == list(names)
    assert all(error <= 1e-5 for error, _ in errors.values()), errors


@pytest.mark.parametrize("cell", CELLS)
def test_layers(cell: str):
    check(layer_contest(Case(cell, 7, 3, 5, 6), ["torch.nn"]), ["bptt", "torch.nn"])


@pytest.mark.parametrize("cell", CELLS)
def test_layers_in_jax(cell: str):
    pytest.importorskip("jax", reason="JAX is the extra bptt[bench]")
    check(layer_contest(Case(cell, 7, 3, 5, 6)), ["bptt", "torch.nn", "JAX"])


@pytest.mark.parametrize("cell", CELLS)
def test_the_truth_is_that_of_the_equations(cell: str):
    problem = Problem.of(Case(cell, 5, 2, 3, 4))
    x, dy, *weights = (v.detach().double().numpy() for v in (problem.x, problem.dy, *problem.layer.parameters()))
    layer = {"rnn": rnn.RNN, "gru": gru.GRU, "lstm": lstm.LSTM}[cell](*weights)
    zeros = np.zeros((2, layer.state_size))
    expected = recurrence.adjoint(layer, x, zeros, recurrence.local_error(layer, dy, zeros))
    truth = dict(zip(NAMES, problem.truth(), strict=True))
    for ours, theirs in zip(NAMES[1:], ("x", "W_ih", "W_hh", "b_ih", "b_hh"), strict=True):
        np.testing.assert_allclose(truth[ours], expected[theirs], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("case", "names"),
    [
        (Case("rnn", 11, 1, 5, 6, "truncated:4"), ["bptt", "two loops", "autograd"]),
        (Case("rnn", 11, 1, 5, 6, "truncated:1"), ["bptt", "two loops", "autograd"]),
        *((Case(cell, 11, 3, 5, 6, "chunked:4"), ["bptt", "autograd"]) for cell in CELLS),
    ],
    ids=str,
)
def test_windows(case: Case, names: list[str]):
    check(window_contest(case), names)


@pytest.mark.parametrize("gradient", ["full", "truncated:4/2", "truncated:4"])
def test_windows_of_another_kind(gradient: str):
    with pytest.raises(ValueError, match="case must be a chunked one, or an rnn with B = 1 and truncated:k"):
        window_contest(Case("gru", 11, 1, 5, 6, gradient))


def test_the_loops_walk_bptt_truncate_steps_beyond_the_loss():
    g = np.random.default_rng(0)
    U, V, W = g.normal(size=(4, 3)), g.normal(size=(3, 4)), g.normal(size=(4, 4))
    x = np.array([0, 1, 2])
    whole, one = (TwoLoops(U, V, W, reach).bptt(x, x) for reach in (2, 0))
    network = rnn.SoftmaxNetwork(U, V, W)
    expected = network.gradients(x, x, np.zeros(4))
    for gradient, name in zip(whole, "UVW", strict=True):
        np.testing.assert_allclose(gradient, expected[name], rtol=1e-10)
    assert not np.allclose(one[2], whole[2])


def test_steps():
    check(step_contest(Case("lstm", 7, 3, 5, 6)), ["scan", "module", "loop"])
    with pytest.raises(ValueError, match="case must be an lstm with the full gradient: got GRU"):
        step_contest(Case("gru", 7, 3, 5, 6))


def scans(kernel: str = "auto") -> list[str]:
    return ["scan", "loop", *(name for name in ("replay", "eager") if kernel != name)]


@pytest.mark.parametrize("name", STEP_CELLS)
def test_steps_of_every_cell(name: str):
    contest = cell_contest(Case(name, 6, 2, 8, 8))
    names = [*scans(), *(["module"] if STEP_CELLS[name].layer else [])]
    assert list(contest.calls) == contenders(Case(name, 6, 2, 8, 8)) == names
    errors = contest.errors()
    assert [*errors, *contest.missing] == [name for name in names if name in errors] + [*contest.missing]
    assert {*errors, *contest.missing} == {*names}
    assert {*contest.missing} <= {"eager"}
    assert all(error <= 1e-5 for error, _ in errors.values()), errors
    xs = ["x[0]", "x[1]"] if name == "world-model" else ["x"]
    parameters = STEP_CELLS[name].make(2, 8).parameters
    assert list(contest.names) == ["y", *xs, *(f"parameters[{i}]" for i in range(len(parameters)))]


@pytest.mark.parametrize("gradient", ["chunked:4", "truncated:5/2", "truncated:3"])
@pytest.mark.parametrize("name", ["gru", "leaky", "world-model"])
def test_steps_under_policies(name: str, gradient: str):
    check(cell_contest(Case(name, 11, 2, 5, 5, gradient)), [*scans(), *(["module"] if name == "gru" else [])])


@pytest.mark.parametrize("gradient", ["full", "chunked:4", "truncated:5/2"])
def test_the_truth_of_a_step_is_the_layers(gradient: str):
    case = Case("lstm", 11, 2, 5, 5, gradient)
    contest = cell_contest(case)
    problem = STEP_CELLS["lstm"].make(2, 5, torch.float64, T=11)
    layer = Problem.of(case).ours("eager").double()
    layer.load_state_dict(dict(zip(layer.state_dict(), problem.parameters, strict=True)))
    dy = torch.randn(11, 2, 5, generator=torch.Generator().manual_seed(11)).double()
    for value, true in zip(layer_call(layer, problem.xs, dy)(), contest.truth, strict=True):
        np.testing.assert_allclose(value, true, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", JAX_STEPS)
def test_steps_in_jax(name: str):
    pytest.importorskip("jax", reason="JAX is the extra bptt[bench]")
    contest = cell_contest(Case(name, 6, 2, 8, 8), jax=True)
    assert "JAX" in contest.calls
    assert contest.errors()["JAX"][0] <= 1e-5
    assert "JAX" not in cell_contest(Case(name, 6, 2, 8, 8, "truncated:2"), jax=True).calls


@pytest.mark.parametrize("k", [1, 3, 4, 20])
def test_steps_in_jax_that_stop_at_chunks(k: int):
    pytest.importorskip("jax", reason="JAX is the extra bptt[bench]")
    for name in ("lstm", "leaky", "world-model"):
        assert cell_contest(Case(name, 11, 2, 8, 8, f"chunked:{k}"), jax=True).errors()["JAX"][0] <= 1e-5


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # of torch's compiler about torch itself
def test_a_compiled_step():
    contest = cell_contest(Case("leaky", 2, 2, 8, 8), compiled=True)
    check(contest, [*scans(), "compiled"])


def test_a_step_that_takes_too_long_to_compile(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "compile", lambda step, dynamic: lambda carry, x: sleep(9))
    monkeypatch.setattr("bptt.bench.tables.product", lambda: Product(1e9, 1.0))
    selection = Selection(
        ("steps",), step_cells=("leaky",), step_shapes=((6, 2, 8),), policies=False, peers=(), seconds=0.0
    )
    [row] = measure(replace(selection, compiled=True, compile_seconds=0.01), threads=1)
    assert row.missing == {"compiled": "torch.compile took longer than 0.01 s"}
    assert "compiled" not in (*row.errors, *row.times)
    assert contenders(Case("leaky", 6, 2, 8, 8, "chunked:2"), compiled=True) == scans()


def test_who_may_not_refuse_raises():
    contest = Contest(("y",), {"one": lambda: scan(None, None, None)}, [np.zeros(1)])  # type: ignore[arg-type,return-value]
    with pytest.raises(Exception, match="step"):
        contest.errors()


@pytest.mark.parametrize(("layers", "both_ways", "packed"), [(2, False, False), (1, True, True), (3, True, False)])
@pytest.mark.parametrize("cell", CELLS)
def test_stacks(cell: str, layers: int, both_ways: bool, packed: bool):
    contest = stack_contest(Case(cell, 7, 3, 5, 6, layers=layers, both_ways=both_ways, packed=packed))
    check(contest, ["bptt", "torch.nn"])
    rows = sum(max(1, 7 - 7 * b // 6) for b in range(3))
    assert contest.truth[0].shape == ((rows,) if packed else (7, 3)) + (6 * (1 + both_ways),)


def test_stacks_of_a_cell_that_torch_lacks():
    with pytest.raises(ValueError, match=r"case must be of a cell that torch\.nn has: got LIF"):
        stack_contest(Case("lif", 7, 3, 5, 6))


@pytest.mark.parametrize("cell", CELLS)
def test_layers_in_onnx(cell: str):
    for name in ("onnxruntime", "onnx"):
        pytest.importorskip(name)
    check(inference_contest(Case(cell, 4, 3, 5, 6)), ["bptt", "torch.nn", "ONNX Runtime"])


def test_what_is_known_is_not_measured_again():
    selection = Selection(
        ("steps",), step_cells=("leaky",), step_shapes=((6, 2, 8), (5, 2, 8)), policies=False, peers=()
    )
    first, second = selection.cases()
    known = Row("steps", first[1], 1, dict.fromkeys(("scan", "loop", "replay"), 0.0), {}, 1.0, 1.0)
    assert replace(selection, known=(known,)).left(1) == [first, second]  # one of its contenders was not there
    known = replace(known, missing={"eager": "a reason"})
    assert replace(selection, known=(known,)).left(1) == [second]
    assert replace(selection, known=(known,)).left(2) == [first, second]
    assert replace(selection, known=(known,), compiled=True).left(1) == [first, second]
    selection = Selection(("layers", "scan"), ("lstm",), shapes=((7, 1, 2, 3),), peers=("torch.nn",))
    rows = [Row(table, case, 1, {"bptt": 0.0}, {}, 1.0, 1.0) for table, case in selection.cases()]
    assert [table for table, _ in replace(selection, known=tuple(rows)).left(1)] == ["layers"]


@pytest.mark.parametrize(
    ("case", "kernel", "message"),
    [
        (Case("rnn", 7, 3, 5, 5), "auto", "case must be of one of lstm, gru, .*: got RNN"),
        (Case("gru", 7, 3, 5, 6), "auto", "case must have as many inputs as units: got GRU"),
        (Case("gru", 7, 3, 5, 5, "randomized:0.5"), "auto", "case must have a policy that draws nothing"),
        (Case("gru", 7, 3, 5, 5), "fpga", "kernel must be one of auto.*: got 'fpga'"),
    ],
)
def test_steps_of_another_kind(case: Case, kernel: str, message: str):
    with pytest.raises(ValueError, match=message):
        cell_contest(case, kernel)


def test_scan_is_told_its_kernel(monkeypatch: pytest.MonkeyPatch):
    told = []

    def with_kernels(step: Any, carry: Any, xs: Any, *, gradient: str = "full", kernel: str = "auto") -> Any:
        told.append(kernel)
        return scan(step, carry, xs, gradient=gradient)

    monkeypatch.setattr("bptt.bench.steps.scan", with_kernels)
    for kernel, others in (("eager", ["replay"]), ("replay", ["eager"])):
        contest = cell_contest(Case("leaky", 6, 2, 8, 8), kernel)
        told.clear()
        check(contest, ["scan", "loop", *others])
        assert told == [kernel, *others]


def test_which_steps_are_timed():
    assert list(USUAL_STEPS) == ["lstm", "gru", "layer-norm-lstm", "leaky", "lif", "slstm", "cornn"]
    cases = step_cases(list(STEP_CELLS), STEP_SHAPES)
    assert len(cases) == len(STEP_SHAPES) * (17 + 3 * len(POLICIES))
    assert len(step_cases(USUAL_STEPS, STEP_SHAPES[:1], policies=False)) == 7
    assert [case.gradient for case in step_cases(["gru"], [(15, 1, 4)])] == ["full", "chunked:10"]
    assert len(Selection(("steps",), step_cells=("gru",), policies=False).cases()) == 2
    assert Selection(("layers", "steps"), cells=("rnn",), shapes=((5, 2, 3, 4),), step_cells=()).cases() == [
        ("layers", Case("rnn", 5, 2, 3, 4))
    ]


@pytest.mark.parametrize("cell", CELLS)
def test_training(cell: str):
    contest = training_contest(Case(cell, 7, 3, 5, 6))
    check(contest, ["bptt", "torch.nn"])
    assert contest.names[:2] == ("loss", "embedding.weight")
    for call in contest.calls.values():  # it goes on past the end of its text
        for _ in range(9):
            call()


@pytest.mark.parametrize(
    ("answer", "error"), [([1.0, 2.5], 0.25), ([1.0, float("nan")], float("inf")), ([1.0, 2.0, 3.0], float("inf"))]
)
def test_largest_error(answer: list[float], error: float):
    assert largest_error([[0.0, 1.0], answer], [np.array([0.0, 1.0]), np.array([1.0, 2.0])], "ab") == (error, "b")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bptt.bench.tables.product", lambda: Product(1e9, 3.0))


def broken(problem: Problem):
    call = layer_call(problem.layer, problem.x, problem.dy)

    def off():
        assert off.calls == 0, "timed"
        off.calls += 1
        y, *grads = call()
        return y, *(grad * (1 + 2e-5) for grad in grads)

    off.calls = 0
    return off


@pytest.mark.usefixtures("machine")
def test_who_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(PEERS, "broken", broken)
    selection = Selection(("layers",), ("gru",), ((5, 2, 3, 4),), ("torch.nn", "broken"), seconds=0.0, least=2)
    [row] = measure(selection, threads=3)
    assert row.wrong == ["broken"]
    assert row.errors["broken"] == pytest.approx(2e-5, rel=0.1)
    assert list(row.times) == ["bptt", "torch.nn"]
    assert (row.threads, row.gemm, row.cores, row.case) == (3, 1e9, 3.0, Case("gru", 5, 2, 3, 4))


@pytest.mark.usefixtures("machine")
def test_steps_are_checked_before_they_are_timed(monkeypatch: pytest.MonkeyPatch):
    def off(*given: Any) -> Any:
        carry, ys = scan(*given[:3])
        return carry, ys * (1 + 2e-5)

    def wrong(step: Any, carry: Any, xs: Any, *, gradient: str = "full", kernel: str = "auto") -> Any:
        return off(step, carry, xs)

    monkeypatch.setattr("bptt.bench.steps.scan", wrong)
    selection = Selection(("steps",), seconds=0.0, least=2, peers=(), step_cells=("leaky",), step_shapes=((5, 2, 4),))
    [row] = measure(selection, threads=1)
    assert (row.table, row.case, row.wrong) == ("steps", Case("leaky", 5, 2, 4, 4), ["scan", "replay", "eager"])
    assert row.errors["scan"] == pytest.approx(2e-5, rel=0.1)
    assert list(row.times) == list(row.first) == ["loop"]


@pytest.mark.usefixtures("machine")
def test_the_first_call_is_told_from_later_ones(monkeypatch: pytest.MonkeyPatch):
    calls = []

    def slow_at_first(step: Any, carry: Any, xs: Any, *, gradient: str = "full", kernel: str = "auto") -> Any:
        calls.append(step)
        if calls.count(step) == 1:
            sleep(0.3)
        return scan(step, carry, xs, gradient=gradient, kernel=kernel)

    monkeypatch.setattr("bptt.bench.steps.scan", slow_at_first)
    selection = Selection(("steps",), seconds=0.0, least=2, peers=(), step_cells=("leaky",), step_shapes=((5, 2, 4),))
    [row] = measure(selection, threads=1)
    assert 0.25 < row.first["scan"] < 5
    assert 0 <= row.first["loop"] < 0.2


@pytest.mark.usefixtures("machine")
def test_the_random_numbers_are_left_alone(monkeypatch: pytest.MonkeyPatch):
    table = replace(TABLES["train"], cases=(Case("gru", 5, 2, 3, 4),))
    monkeypatch.setitem(TABLES, "train", table)
    state = torch.get_rng_state()
    selection = Selection(("layers", "train"), ("gru",), ((5, 2, 3, 4),), ("torch.nn",), seconds=0.0, least=2)
    assert [row.table for row in measure(selection, threads=1)] == ["layers", "train"]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.usefixtures("machine")
def test_jax_that_is_not_installed_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    def missing(name: str):
        raise ModuleNotFoundError(name="jax")

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(InputError, match=r"jax is not installed: pip install 'bptt\[bench\]'"):
        next(measure(Selection(("layers",)), threads=1))
