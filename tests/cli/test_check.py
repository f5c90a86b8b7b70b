from __future__ import annotations

import numpy as np
import pytest

import bptt
from bptt import equations
from bptt.cli import comparison
from bptt.cli.comparison import Row
from bptt.kernels import KERNELS, Eager, Request

from . import command


@pytest.mark.slow
def test_everything_agrees_on_this_machine(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    rows: list[Row] = []

    def compare() -> list[Row]:
        rows.extend(comparison.compare())
        return rows

    monkeypatch.setattr("bptt.cli.checked.compare", compare)
    result = command.bptt(capsys, "check")
    assert result.status == 0, result.out
    assert "all agree" in result.out
    assert len(rows) == len(comparison.NETS) * len(comparison.policies())
    for row in rows:
        assert row.net in result.out
        assert list(row.errors) == comparison.sources()
        assert row.agrees, row
        assert row.errors["autograd"] is not None
        assert row.errors["eager float64"] is not None
        assert (row.errors["differences"] is None) == (row.policy != "full")


def test_every_cell_of_the_equations_is_checked():
    assert {net.cell for net in comparison.NETS.values()} == set(equations.CELLS)


@pytest.mark.parametrize("lacks", ["edge_factors", "resets"])
def test_what_a_kernel_refuses_is_not_compared(monkeypatch: pytest.MonkeyPatch, lacks: str):
    class Narrow(Eager):
        name = "narrow"

        def refuses(self, request: Request) -> str | None:
            return f"it has no {lacks}" if getattr(request, lacks) else super().refuses(request)

    monkeypatch.setattr(comparison, "NETS", {"gru": comparison.Net("gru")})
    monkeypatch.setitem(KERNELS, "narrow", Narrow())
    rows = list(comparison.compare())
    assert all(row.agrees for row in rows)
    refused = [row.policy for row in rows if row.errors["narrow float64"] is None]
    assert refused == [str(p) for p in comparison.policies() if lacks == "resets" or isinstance(p, bptt.Randomized)]


@pytest.mark.parametrize("error", [1e-3, float("inf")])
def test_a_mismatch_is_shown_and_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: float
):
    rows = [Row("gru", "full", dict.fromkeys(comparison.sources(), 0.0) | {"eager float64": error})]
    monkeypatch.setattr("bptt.cli.checked.compare", lambda: iter(rows))
    result = command.bptt(capsys, "check")
    assert result.status == 1
    assert f"{error:.1e} !" in result.out
    assert "1 of 1 rows disagree" in result.out


def test_an_answer_that_is_not_a_number_disagrees():
    truth = {"y": np.ones(3)}
    assert comparison.largest_error({"y": truth["y"] * float("nan")}, truth) == float("inf")
    assert comparison.largest_error({"y": truth["y"] * 1.5}, truth) == 0.5
