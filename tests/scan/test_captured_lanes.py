"""Captured tensors with a row for each lane: another number of lanes needs no new trace."""

import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bptt import scan
from bptt.scan.kept import Kept

from .loops import DOUBLE, POLICIES, Agree, H, T, X, expected, measured, random

compiled = importlib.import_module("bptt.scan.compiled")


def attending(states: Tensor, w: Tensor) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        a = torch.softmax((states @ h.unsqueeze(2)).squeeze(2), 1)
        h = torch.tanh((a.unsqueeze(1) @ states).squeeze(1) + x @ w)
        return h, a

    return step


@pytest.mark.parametrize("policy", ["full", "truncated"])
def test_one_trace_for_any_number_of_lanes(policy: str, monkeypatch: pytest.MonkeyPatch, agree: Agree) -> None:
    monkeypatch.setattr(compiled, "_KEPT", Kept(8))
    torch.manual_seed(0)
    w = random(X, H)
    for lanes in (3, 5, 2, 3):
        states = random(lanes, 6, H)
        case = attending(states, w), random(lanes, H), random(T, lanes, X), [states, w]
        agree(measured(case, POLICIES[policy], kernel="eager"), expected(case, POLICIES[policy]))
    (entries,) = compiled._KEPT.others.values()
    assert len(entries) == 1


def by_lane(states: Tensor, w: Tensor, bias: Tensor) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        a = torch.softmax(torch.bmm(states, h.unsqueeze(2)).squeeze(2), 1)
        h = torch.tanh(torch.bmm(a.unsqueeze(1), states).squeeze(1) + x @ w + bias)
        return h, a

    return step


@pytest.mark.parametrize("kernel", ["interpreter", "eager"])
def test_one_lane_is_a_lane(kernel: str, monkeypatch: pytest.MonkeyPatch, agree: Agree) -> None:
    monkeypatch.setattr(compiled, "_KEPT", Kept(8))
    torch.manual_seed(0)
    w, bias = random(X, H), random(1, H)  # one row that is the same for all lanes
    for lanes in (1, 3):
        states = random(lanes, 6, H)
        case = by_lane(states, w, bias), random(lanes, H), random(T, lanes, X), [states, w, bias]
        for policy in ("full", "truncated"):
            agree(measured(case, POLICIES[policy], kernel=kernel), expected(case, POLICIES[policy]))
    (entries,) = compiled._KEPT.others.values()
    assert [entry.traced.lanes.count(True) for entry in entries] == [1]


def test_other_sizes_need_another_trace(monkeypatch: pytest.MonkeyPatch, agree: Agree) -> None:
    monkeypatch.setattr(compiled, "_KEPT", Kept(8))
    torch.manual_seed(0)
    w = random(X, H)
    for items in (6, 7):
        states = random(3, items, H)
        case = attending(states, w), random(3, H), random(T, 3, X), [states, w]
        agree(measured(case, POLICIES["full"], kernel="eager"), expected(case, POLICIES["full"]))
    assert sum(map(len, compiled._KEPT.others.values())) == 2


def test_too_few_rows_are_found_out() -> None:
    torch.manual_seed(0)
    w = random(X, H)
    for lanes in (3, 3):
        states = random(lanes, 6, H)
        scan(attending(states, w), random(lanes, H), random(T, lanes, X), kernel="eager")
    with pytest.raises(RuntimeError, match="a captured tensor has 2 rows, and the carry 3"):
        scan(attending(random(2, 6, H), w), random(3, H), random(T, 3, X), kernel="eager")


@pytest.mark.parametrize("kernel", ["eager", "interpreter"])
def test_strides_that_change_after_the_first_step(kernel: str, agree: Agree) -> None:
    torch.manual_seed(0)
    w, u = random(X, H), random(H, H)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh((w.t() @ x.t()).t() + (u @ h.reshape(-1, H).t()).t())
        return h, h.t().flatten().view(H, -1).t()

    first = torch.randn(H, 3, dtype=DOUBLE).t().requires_grad_()
    xs = torch.randn(3, X, T, dtype=DOUBLE).permute(2, 0, 1).requires_grad_()
    case = step, first, xs, [w, u]
    for policy in ("full", "truncated_every"):
        agree(measured(case, POLICIES[policy], kernel=kernel), expected(case, POLICIES[policy]))
