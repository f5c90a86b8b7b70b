"""`benchmarks/verdicts.py` on a part of its configurations: no sentence is false, none escapes judgement."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import bptt

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def verdicts(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module("verdicts")
    for name in [name for name in sys.modules if name.split(".")[0] in ("verdicts", "planted")]:
        del sys.modules[name]


@pytest.mark.parametrize("seed", range(12))
def test_no_sentence_is_false(verdicts: ModuleType, seed: int) -> None:
    row = verdicts.measured(seed)
    assert row["wrong"] == []
    assert row["claims"]["agrees"] >= 5


@pytest.mark.slow
def test_no_sentence_is_false_on_other_numbers_than_the_benchmark_has(verdicts: ModuleType) -> None:
    rows = [verdicts.measured(seed) for seed in range(10_000, 10_060)]
    assert [(row["what"], row["wrong"]) for row in rows if row["wrong"]] == []
    long = [row["horizon"] for row in rows if row["long"]]
    assert len(long) >= 15
    assert set(long) == {"told"}  # what can be known is said


def planted_reach(of: Any) -> float:
    return importlib.import_module("planted.truth").reach(of.truth.curves[0], 0.9)


@np.errstate(over="ignore")
def planted_of(family: str) -> Any:
    nets = importlib.import_module("planted.nets")
    first = nets.FAMILIES.index(family)
    for seed in range(first, 3000, len(nets.FAMILIES)):
        of = nets.planted(seed)
        near = 10 <= planted_reach(of) <= 60
        if near and of.what["T"] >= 150 and of.what["loss"] == "every step" and of.what["lengths"] == "whole":
            return of
    raise AssertionError(family)


@pytest.mark.parametrize("family", ["linear, vanishing", "copy task", "LSTM, forget gate by hand"])
def test_the_judge_finds_what_is_false_and_what_it_cannot_read(verdicts: ModuleType, family: str) -> None:
    sentences = importlib.import_module("planted.sentences")
    of = planted_of(family)
    found = bptt.flow.survey(of.model, of.batch, of.loss, policies=[])
    assert found.lags is not None
    assert not {claim.outcome for claim in sentences.judged(found, of)} & set(verdicts.WRONG)
    shorter = replace(found.lags, horizon_90=found.lags.horizon_90 // 2, horizon_99=found.lags.horizon_99 // 3)
    steeper = replace(found.lags, rate=found.lags.rate * 0.9, norm=found.lags.norm * 0.9**found.lags.lag)
    for lags in (shorter, steeper) if family != "copy task" else (shorter,):
        claims = sentences.judged(replace(found, lags=lags), of)
        assert "false" in {claim.outcome for claim in claims if claim.topic in ("by lag", "advice")}
    verdict = found.verdict

    class Said:
        findings = (*verdict.findings, ("by lag", "All is well"), ("moon", "It is full"))
        headline, advice, conditions = "Another headline", ("Change all of it",), ("On a Sunday",)

    claims = sentences.judged(type("Found", (), {"verdict": Said})(), of)
    assert [claim.text for claim in claims if claim.outcome == "unread"] == [
        "All is well",
        "It is full",
        "Change all of it",
        "Another headline",
        "On a Sunday",
    ]


def test_the_truth_is_that_of_a_loop(verdicts: ModuleType) -> None:
    """What is planted, against autograd through the model itself: what each loss sends to the initial state."""
    import torch

    for family in ("linear, several rates", "GRU, update gate by hand", "copy task"):
        of = planted_of(family)
        y = of.model(*of.batch)
        for t in (3, 9):
            layer = of.model.rnn
            hx = torch.zeros(layer.num_layers, y.shape[1], layer.hidden_size, dtype=y.dtype)
            hx = (of.batch[1].clone() if len(of.batch) > 1 else hx).requires_grad_()
            value = (of.model(of.batch[0], hx)[t] * of.errors[t]).sum()
            (back,) = torch.autograd.grad(value, hx)
            true = of.truth.of_loss(t)[0][t + 1]
            np.testing.assert_allclose(float(back[0].norm(dim=-1).mean()), true, rtol=1e-4, atol=1e-7)
