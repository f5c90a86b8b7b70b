"""`benchmarks/memory.py` measures what it says, by methods that agree with others, and keeps what it has."""

import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

import bptt
from bptt.bench import Case
from bptt.engine import Checkpointed, Stack

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def memory(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module("memory")
    del sys.modules["memory"]


@pytest.fixture
def run(memory):
    app = Typer()
    app.command()(memory.main)
    return lambda *options: CliRunner().invoke(app, list(options))


def test_the_default_goes_to_a_million(memory):
    cases = memory.chosen("lstm", None, None)
    assert [(case.T, case.gradient) for case in cases] == [
        (1_000, "full"),
        (10_000, "full"),
        (10_000, "truncated:20"),
        (100_000, "full"),
        (1_000_000, "full"),
    ]
    assert [case.gradient for case in memory.chosen("gru", None, "chunked:35")] == ["chunked:35"] * 4
    assert memory.chosen("rnn", ["7,2,3,4"], None) == [Case("rnn", 7, 2, 3, 4)]


def saved(layer, x):
    """y, and the bytes that autograd's hooks see saved beside x, y and the parameters."""
    found = {}

    def pack(t):
        found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)[0]
    own = {t.untyped_storage().data_ptr() for t in (x, y, *layer.parameters())}
    return y, sum(size for at, size in found.items() if at not in own)


@pytest.mark.parametrize("name", ["torch.nn", "gates", "states"])
def test_malloc_and_the_hooks_agree(memory, name):
    case = Case("lstm", 1000, 4, 8, 64)
    layer, x = memory.network(case), memory.inputs(case, case.T)
    layer = layer if name == "torch.nn" else bptt.convert(layer, memory=name)
    y, hooks = saved(layer, x)
    assert memory.left_by(lambda: layer(x)[0]) - y.nbytes == pytest.approx(hooks, rel=0.01)


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_torch_checkpoint_keeps_the_states_between_segments(memory, cell):
    case = Case(cell, 400, 16, 8, 64)
    layer, x = memory.network(case), memory.inputs(case, case.T)
    memory.in_segments(layer, x)
    left = memory.left_by(lambda: memory.in_segments(layer, x)) - 4 * case.T * case.B * case.H
    assert left >= 19 * 4 * case.B * case.H * (2 if cell == "lstm" else 1)


def test_tapes_are_recorded(memory, monkeypatch):
    for program, method in ((Checkpointed, "forward_segments"), (Stack, "forward")):
        monkeypatch.setattr(program, method, getattr(program, method))  # put back afterwards
    ahead, segments = memory.tapes_of(Checkpointed, "forward_segments"), memory.tapes_of(Stack, "forward")
    B, H = 2, 5
    layer = bptt.nn.LSTM(3, H, memory="checkpoints:steps=10")
    layer(torch.randn(95, B, 3))[0].sum().backward()
    assert max(ahead) == 4 * B * H * 9  # c: h is read from y
    assert max(segments) == 4 * B * H * (2 * 11 + 4 * 10)
    bptt.stream_gradients(layer, torch.randn(95, B, 3), lambda steps, y: y.sum(), memory="checkpoints:steps=10")
    assert max(ahead) == 4 * B * 2 * H * 9


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_the_reference_is_autograds(memory, cell):
    case = Case(cell, 37, 2, 3, 4)
    layer, x = memory.network(case).double(), memory.inputs(case, case.T).double()
    layer(x)[0].square().sum().backward()
    assert memory.error(memory.reference(case), [p.grad for p in layer.parameters()]) < 1e-12


@pytest.mark.parametrize("gradient", ["chunked:5", "truncated:6", "truncated:6/4"])
@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_the_reference_follows_the_policy(memory, cell, gradient, monkeypatch):
    monkeypatch.setattr(memory, "ROWS", 30)
    case = Case(cell, 37, 2, 3, 4, gradient)
    layer = bptt.convert(memory.network(case).double(), gradient=gradient)
    layer(memory.inputs(case, case.T).double())[0].square().sum().backward()
    assert memory.error([p.grad for p in layer.parameters()], memory.reference(case)) < 1e-10


def test_no_number_is_an_error(memory):
    one, none = torch.ones(2), torch.tensor([1.0, math.nan])
    assert math.isnan(memory.error([one, none], [one.double(), one.double()]))
    assert memory.error([one, 0 * one], [one.double(), 0 * one.double()]) == 0


@pytest.mark.parametrize("name", ["torch.nn", "torch checkpoint", "checkpoints"])
def test_a_contender(memory, monkeypatch, tmp_path, name):
    for program, method in ((Checkpointed, "forward_segments"), (Stack, "forward")):
        monkeypatch.setattr(program, method, getattr(program, method))  # put back afterwards
    case = Case("lstm", 100, 2, 3, 4)
    torch.save(memory.reference(case), tmp_path / "gradients.pt")
    found = memory.contender(name, case, repeats=1, most=8.0, reference=str(tmp_path / "gradients.pt"))
    assert found["error"] < 1e-5
    assert min(found["kept"], found["seconds"]) > 0
    assert (found["segment"] > 0) == (name != "torch.nn")


def test_in_processes_of_their_own(memory, tmp_path):
    case = Case("lstm", 100, 2, 3, 4)
    job = {"case": vars(case), "name": memory.REFERENCE, "repeats": 1, "most": 8.0, "reference": str(tmp_path / "g")}
    assert memory.in_a_process(job) == {}
    found = memory.in_a_process(job | {"name": "stream"})
    assert found["error"] < 1e-5
    assert (found["kept"], found["segment"] > 0) == (0, True)  # one segment


def test_what_would_keep_too_much_is_not_run(memory, monkeypatch):
    monkeypatch.setattr(memory, "tapes_of", lambda program, method: [])
    case = Case("lstm", 640, 2, 3, 64)
    # A forecast from 64 steps. oneDNN keeps it in one workspace: 15 numbers for each of y in torch 2.13, 19 in 2.8.
    y, hooks = saved(memory.network(case), memory.inputs(case, case.T))
    found = memory.contender("torch.nn", case, repeats=1, most=0.0, reference="")
    assert found == {"expected": pytest.approx(hooks + y.nbytes, rel=0.1)}


def measured(error=1e-7):
    return {"bytes": 1, "seconds": 1.0, "error": error, "segment": 0, "kept": 1}


@pytest.mark.parametrize("stop", ["Ctrl-C", "a wrong gradient", "NaN"])
def test_rows_are_saved_as_they_come(memory, run, monkeypatch, tmp_path, stop):
    def work(job):
        if job["name"] == "states":
            if stop == "Ctrl-C":
                raise KeyboardInterrupt
            return measured(math.nan if stop == "NaN" else 2e-4)
        return measured()

    monkeypatch.setattr(memory, "in_a_process", work)
    result = run("--shape", "9,1,2,3", "--json", str(tmp_path / "rows.json"))
    assert result.exit_code == (130 if stop == "Ctrl-C" else 1)
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["torch.nn", "torch checkpoint", "gates"]
    fields = "cell T B I H gradient layers both_ways packed name tape bytes seconds error segment kept"
    assert [list(row) for row in rows] == [fields.split()] * 3
    assert "gates" in result.output


def test_rounding_of_torch_nn_widens_the_check_of_its_own_case(memory, run, monkeypatch):
    monkeypatch.setattr(memory, "in_a_process", lambda job: measured(1e-4 if job["name"] == "torch.nn" else 3e-4))
    assert run("--shape", "9,1,2,3").exit_code == 0
    monkeypatch.setattr(memory, "in_a_process", lambda job: measured(1e-4 if job["name"] == "torch.nn" else 5e-4))
    assert run("--shape", "9,1,2,3").exit_code == 1


def test_only_ours_know_policies(memory, run, monkeypatch):
    names = []
    monkeypatch.setattr(memory, "in_a_process", lambda job: names.append(job["name"]) or measured())
    assert run("--shape", "9,1,2,3", "--gradient", "truncated:4").exit_code == 0
    assert names == ["reference", "gates", "states", "checkpoints", "stream"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--cell", "x"], "cell must be one of rnn, gru, lstm: got 'x'"),
        (["--shape", "1,2,3"], "shape must be four whole numbers"),
        (["--shape", "0,2,3,4"], "shape must be four whole numbers"),
        (["--gradient", "far"], "gradient must be one of"),
        (["--gradient", "randomized:0.5"], "gradient must be a policy that draws nothing"),
        (["--json", "nowhere/rows.json"], "json must be a file in a directory that is there"),
    ],
)
def test_bad_input(run, monkeypatch, tmp_path, options, words):
    monkeypatch.chdir(tmp_path)
    result = run(*options)
    assert result.exit_code == 2
    assert words in result.output
    assert result.output.count("\n") == 1
    assert not list(tmp_path.iterdir())
