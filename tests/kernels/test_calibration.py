"""Where torch's own layers are measured to be faster on a CPU, "auto" takes them, and gives the same numbers."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bptt
from bptt.kernels import VARIABLE, Calibration, Measured, calibration, variants
from bptt.kernels.whole_torch import WholeTorch
from bptt.nn import undrawn

SLOW, FAST = (1.9, 2.0, 2.1), (0.9, 1.0, 1.1)
ROW = Measured("LSTM", 20, 4, 8, 16, 1, True, SLOW, FAST)
KINDS = {"RNN": "RNN_TANH", "GRU": "GRU", "LSTM": "LSTM"}
each_kind = pytest.mark.parametrize("kind", KINDS)


def table(*rows: Measured) -> Calibration:
    return Calibration(variants()[0], torch.__version__, "a processor", "2026-01-01", rows)


@pytest.fixture
def calibrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """A function that makes this the process's table: rows, or a file's text."""
    file, threads = tmp_path / "calibration.json", torch.get_num_threads()

    def forget() -> None:
        calibration.calibration.cache_clear()
        undrawn._plain.cache_clear()

    def use(*rows: Measured, text: str | None = None) -> Path:
        file.write_text(table(*rows).to_json() if text is None else text)
        monkeypatch.setenv(VARIABLE, str(file))
        forget()
        return file

    torch.set_num_threads(1)
    yield use
    monkeypatch.undo()
    torch.set_num_threads(threads)
    forget()


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The passes that torch's own layers have run."""
    found: list[str] = []
    for way in ("infer", "taped", "pulled"):
        own = getattr(WholeTorch, way)

        def spy(*arguments: Any, way: str = way, own: Any = own) -> Any:
            found.append(way)
            return own(*arguments)

        monkeypatch.setattr(WholeTorch, way, spy)
    return found


def everywhere(*sizes: int) -> tuple[Measured, ...]:
    """Every cell faster by torch there, with a gradient and without."""
    return tuple(Measured(mode, *sizes, 1, way, SLOW, FAST) for mode in KINDS.values() for way in (True, False))  # type: ignore[arg-type]


def test_the_very_sizes_or_all_neighbours() -> None:
    slower = replace(ROW, T=40, cpu=(1.0, 1.01, 1.05), fused=(0.9, 1.0, 1.1))
    assert table(ROW, slower).at("LSTM", ROW.sizes, 1, True) == ROW
    assert table(ROW, slower).at("LSTM", slower.sizes, 1, True) is None
    assert table(ROW, slower).at("LSTM", (30, 4, 8, 16), 1, True) is None  # one neighbour is not faster
    assert table(ROW).at("LSTM", (30, 5, 9, 20), 1, True) == ROW
    less = replace(ROW, T=40, cpu=(1.4, 1.5, 1.6))
    assert table(ROW, less).at("LSTM", (30, 4, 8, 16), 1, True) == less  # what is promised is the least
    for far in ((100, 4, 8, 16), (20, 7, 8, 16), (20, 4, 16, 16), (20, 4, 8, 8)):
        assert table(ROW).at("LSTM", far, 1, True) is None
    assert table(ROW).at("LSTM", ROW.sizes, 2, True) is None
    assert table(ROW).at("LSTM", ROW.sizes, 1, False) is None
    assert table(ROW).at("GRU", ROW.sizes, 1, True) is None
    assert table().at("LSTM", ROW.sizes, 1, True) is None


def test_faster_by_a_margin_and_beyond_the_spread() -> None:
    assert ROW.sooner
    assert not replace(ROW, cpu=(1.03, 1.04, 1.05), fused=(1.0, 1.0, 1.0)).sooner
    assert not replace(ROW, cpu=(1.0, 2.0, 2.1), fused=(0.9, 1.0, 1.1)).sooner


def test_the_file_holds_a_row_a_line() -> None:
    one = table(ROW, replace(ROW, differentiated=False))
    assert Calibration.from_json(one.to_json()) == one
    assert len(one.to_json().splitlines()) == 4


def test_it_holds_for_the_instruction_set_and_the_version_of_torch() -> None:
    assert table().holds
    assert not replace(table(), variant="another").holds
    assert not replace(table(), torch="1.0.0").holds
    major, minor, *_ = torch.__version__.split(".")
    assert replace(table(), torch=f"{major}.{minor}.99+cpu").holds


def test_the_shipped_tables_are_there() -> None:
    tables = calibration.shipped()
    assert len({table.processor for table in tables}) == len(tables) > 0
    for each in tables:
        assert {row.threads for row in each.rows} <= {1, 2}
        assert {row.differentiated for row in each.rows} == {True, False}


def test_of_the_shipped_tables_that_of_this_kind_of_processor_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calibrated: Callable[..., Path]
) -> None:
    """One that somebody names was made where it is used, whatever the processor is called."""
    kinds = {"a.json": "Intel(R) Xeon(R)", "b.json": "AMD EPYC"}
    for name, processor in kinds.items():
        (tmp_path / name).write_text(replace(table(ROW), processor=processor).to_json())
    monkeypatch.setattr(calibration, "SHIPPED", tmp_path)
    for intel in (True, False):
        monkeypatch.delenv(VARIABLE, raising=False)
        monkeypatch.setattr(calibration._walks, "intel", lambda intel=intel: intel)
        calibration.calibration.cache_clear()
        found = calibration.calibration()
        assert found is not None
        assert found.processor == kinds["a.json" if intel else "b.json"]
        monkeypatch.setenv(VARIABLE, str(tmp_path / "a.json"))
        calibration.calibration.cache_clear()
        assert calibration.calibration() is not None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"rows": 3}',
        table(ROW).to_json().replace("LSTM", "ABC"),
        table(ROW).to_json().replace('"T": 20', '"T": 0'),
        table(ROW).to_json().replace("[1.9, 2.0, 2.1]", "[2.0]"),
        table(ROW).to_json().replace("[1.9, 2.0, 2.1]", "[2.0, 1.0, 3.0]"),
    ],
)
def test_what_is_no_calibration_is_an_error_that_names_the_variable(text: str, calibrated: Callable[..., Path]) -> None:
    file = calibrated(text=text)
    with pytest.raises(
        ValueError, match=rf"{VARIABLE} must be 'off' or name a file of bptt bench --calibrate: got"
    ) as e:
        bptt.nn.LSTM(8, 16)(torch.randn(20, 4, 8))
    assert str(file) in str(e.value)


def test_a_file_that_is_not_there(calibrated: Callable[..., Path]) -> None:
    calibrated(ROW).unlink()
    with pytest.raises(ValueError, match=f"{VARIABLE} must be"):
        bptt.nn.LSTM(8, 16)(torch.randn(20, 4, 8))


def test_off_is_no_table(monkeypatch: pytest.MonkeyPatch, calibrated: Callable[..., Path]) -> None:
    calibrated(ROW)
    monkeypatch.setenv(VARIABLE, "off")
    calibration.calibration.cache_clear()
    assert calibration.calibration() is None


@each_kind
def test_explain_says_which_and_by_how_much(kind: str, calibrated: Callable[..., Path]) -> None:
    calibrated(*everywhere(20, 4, 8, 16))
    layer, x = getattr(bptt.nn, kind)(8, 16), torch.randn(20, 4, 8)
    passes = "measured at (T, B, I, H) = (20, 4, 8, 16)"
    assert bptt.explain(layer, x).startswith(
        f"kernel 'fused' for {kind.lower()}, torch.float32 on cpu: 'cpu': takes 2.00 times as long as 'fused', "
        f"{passes} forward and backward on 1 thread\n"
    )
    with torch.no_grad():
        assert f"{passes} without a gradient on 1 thread\n" in bptt.explain(layer, x)
    first = getattr(bptt.nn, kind)(8, 16, batch_first=True)
    assert "kernel 'fused'" in bptt.explain(first, x.transpose(0, 1))
    assert "kernel 'fused'" not in bptt.explain(first, x)
    for other in ({"num_layers": 2}, {"bidirectional": True}, {"memory": "states"}, {"memory": "checkpoints"}):
        assert "kernel 'cpu'" in bptt.explain(getattr(bptt.nn, kind)(8, 16, **other), x)
    for policy in ("chunked:5", "truncated:4/2", "randomized:0.5"):
        assert "kernel 'cpu'" in bptt.explain(getattr(bptt.nn, kind)(8, 16, gradient=policy), x)
    assert "named by" in bptt.explain(getattr(bptt.nn, kind)(8, 16, kernel="cpu"), x)
    assert "kernel 'cpu'" in bptt.explain(getattr(bptt.nn, kind)(8, 16, dtype=torch.float64), x.double())


def both(kind: str, **settings: Any) -> tuple[Any, Any]:
    """A layer under "auto", and one of the same weights by the walks."""
    one = getattr(bptt.nn, kind)(8, 16, **settings)
    other = getattr(bptt.nn, kind)(8, 16, **settings, kernel="cpu")
    other.load_state_dict(one.state_dict())
    return one, other


def given(kind: str, asked: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    x, hx = torch.randn(20, 4, 8), [torch.randn(1, 4, 16) for _ in range(1 + (kind == "LSTM"))]
    return x.requires_grad_(asked), tuple(h.requires_grad_(asked) for h in hx)


def call(layer: Any, x: Tensor, hx: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    y, final = layer(x, hx[0] if len(hx) == 1 else hx)
    return (y, final) if len(hx) == 1 else (y, *final)


def close(one: Any, other: Any) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@each_kind
@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_same_numbers(kind: str, asked: bool, bias: bool, calibrated: Callable[..., Path], ran: list[str]) -> None:
    """Outputs, all gradients, cotangents of the final state and expanded ones, a graph that is kept, frozen weights."""
    calibrated(*everywhere(20, 4, 8, 16))
    one, other = both(kind, bias=bias)
    x, hx = given(kind, asked)
    for frozen in (False, True):
        for layer in (one, other):
            layer.weight_hh_l0.requires_grad_(not frozen)
        outputs, expected = call(one, x, hx), call(other, x, hx)
        close(outputs, expected)
        for end in (slice(None), slice(0, 1), slice(1, None)):
            found = []
            for layer, results in ((one, outputs), (other, expected)):
                leaves = [t for t in (x, *hx, *layer.parameters()) if t.requires_grad]
                weights = [torch.ones(()).expand_as(r) * (i + 1) for i, r in enumerate(results[end])]
                found.append(torch.autograd.grad(results[end], leaves, weights, retain_graph=True))
            close(*found)
    assert ran.count("taped") == 2
    assert ran.count("pulled") == 6
    with torch.no_grad():
        close(call(one, x, hx), call(other, x, hx))
    assert ran[-1] == "infer"


@each_kind
def test_higher_orders(kind: str, calibrated: Callable[..., Path], ran: list[str]) -> None:
    calibrated(*everywhere(20, 4, 8, 16))
    found = []
    x, hx = given(kind, True)
    for layer in both(kind):
        outputs = call(layer, x, hx)
        leaves = [x, *hx, *layer.parameters()]
        first = torch.autograd.grad(outputs[0].square().sum(), leaves, create_graph=True)
        found.append((*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
    assert ran == ["taped", "pulled"]  # the latter for the part of the second gradient that goes through y alone


@each_kind
def test_outputs_and_inputs_that_are_written_to(kind: str, calibrated: Callable[..., Path]) -> None:
    """Outputs may be; weights may not before the backward call, which says so; a freed graph is told too."""
    calibrated(*everywhere(20, 4, 8, 16))
    one, other = both(kind)
    x, hx = given(kind, False)
    found = []
    for layer in (one, other):
        outputs = call(layer, x, hx)
        loss = sum(o.sum() for o in outputs)
        for output in outputs:
            output.detach().zero_()
        found.append(torch.autograd.grad(loss, list(layer.parameters())))
    close(*found)
    y = call(one, x, hx)[0]
    with torch.no_grad():
        one.weight_hh_l0.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    y = call(one, x, hx)[0]
    y.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()


@each_kind
def test_observed_backward(kind: str, calibrated: Callable[..., Path], ran: list[str]) -> None:
    """A profiler that starts between the two passes sees the engine's operators, which make a tape of their own."""
    calibrated(*everywhere(20, 4, 8, 16))
    one, other = both(kind)
    x, hx = given(kind, True)
    y = call(one, x, hx)[0]
    with torch.profiler.profile():
        found = torch.autograd.grad(y.square().sum(), [x, *hx, *one.parameters()])
    close(found, torch.autograd.grad(call(other, x, hx)[0].square().sum(), [x, *hx, *other.parameters()]))
    assert ran == ["taped"]


@each_kind
def test_what_is_not_measured_runs_by_the_walks(kind: str, calibrated: Callable[..., Path], ran: list[str]) -> None:
    calibrated(*everywhere(20, 4, 8, 16))
    x = torch.randn(20, 4, 8)
    make = getattr(bptt.nn, kind)
    for settings in ({"memory": "states"}, {"memory": "checkpoints:steps=5"}, {"gradient": "chunked:5"}):
        make(8, 16, **settings)(x)
    make(8, 16)(x, resets=torch.zeros(20, 4, dtype=torch.bool))
    make(8, 16, dtype=torch.float64)(x.double())
    make(8, 16, kernel="cpu")(x)
    make(8, 16)(torch.randn(20, 4, 8)[:, :1])
    with torch.autocast("cpu"):
        make(8, 16)(x.bfloat16())
    with torch.autograd.graph.save_on_cpu():
        make(8, 16)(x)[0].sum().backward()
    bptt.gradients(make(8, 16), x, torch.randn(20, 4, 16))
    assert ran == []
    with torch.no_grad():  # whatever the policy: there is no gradient
        make(8, 16, gradient="chunked:5")(x)
        make(8, 16, memory="states")(x)
    make(8, 16, batch_first=True)(x.transpose(0, 1))
    assert ran == ["infer", "infer", "taped"]


def test_no_tensor_is_kept(calibrated: Callable[..., Path]) -> None:
    calibrated(*everywhere(20, 4, 8, 16))
    layer, x = bptt.nn.LSTM(8, 16), torch.randn(20, 4, 8, requires_grad=True)
    seen = []
    for backward in (True, False):
        y, (h, c) = layer(x)
        seen += [weakref.ref(t) for t in (y, h, c)]
        if backward:
            (y.sum() + c.sum()).backward()
        del y, h, c
    gc.collect()
    assert [ref() for ref in seen] == [None] * 6
