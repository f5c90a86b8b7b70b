"""Steps that are traced often: what is said of them, and when they are traced once more; and what two traces tell."""

import importlib
import queue
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bptt
from bptt import scan

from .loops import Step

compiled = importlib.import_module("bptt.scan.compiled")
T, B, H = 9, 3, 4
AGAIN = "does something else when it is called again with the same carry and x at test_given_up.py:"


@pytest.fixture(autouse=True)
def _no_traces_of_other_tests() -> None:
    compiled._KEPT.clear()


def given() -> tuple[Tensor, Tensor]:
    return torch.randn(B, H), torch.randn(T, B, H)


def scaled(factor: float) -> Step:
    return lambda h, x: (torch.tanh(h * factor + x),) * 2


def reading(factor: float) -> Step:
    return lambda h, x: (torch.tanh(h * (factor if h.sum() > 0 else 1) + x),) * 2


def test_a_named_kernel_runs_however_often_something_changes() -> None:
    h, xs = given()
    for i in range(2 * compiled.MOST_OF_A_KIND):
        _, ys = scan(scaled(i), h, xs, kernel="eager")
        torch.testing.assert_close(ys, scan(scaled(i), h, xs, kernel="replay")[1])


def test_the_reason_of_a_step_that_is_traced_each_time_is_told_too() -> None:
    h, xs = given()
    for i in range(2 * compiled.MOST_OF_A_KIND):
        assert "its Python code reads a value of a tensor" in bptt.explain(reading(i), h, xs[0]).reason
    for i in range(2 * compiled.MOST_OF_A_KIND):
        found = bptt.explain(scaled(i), h, xs[0])
        assert found.kernel == ("interpreter" if i < compiled.MOST_OF_A_KIND else "replay")
    assert found.reason == "it was traced 8 times, and something that it reads is another each time"


def test_a_step_that_has_come_to_rest_is_traced_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "PATIENCE", 3)
    h, xs = given()
    for i in range(compiled.MOST_OF_A_KIND):
        scan(scaled(i), h, xs)
    calm = scaled(0.5)
    calm(h, xs[0])
    kernels = []
    for _ in range(5):
        kernels.append(bptt.explain(calm, h, xs[0]).kernel)
    assert kernels == ["replay", "replay", *["interpreter"] * 3]


# What two traces tell


def by_starred_arguments() -> Callable[[], float]:
    calls: list[int] = []

    def note(*where: list[int]) -> int:
        where[0].append(1)
        return len(where[0])

    return lambda: note(calls)


def by_a_queue() -> Callable[[], float]:
    calls: queue.Queue[int] = queue.Queue()

    def count() -> float:
        calls.put(1)
        return calls.qsize()

    return count


def by_missing_keys() -> Callable[[], float]:
    found: defaultdict[int, int] = defaultdict(int)
    return lambda: len([found[len(found)], *found])


@pytest.mark.parametrize("make", [by_starred_arguments, by_a_queue, by_missing_keys])
def test_a_state_that_no_guard_sees_is_not_taken_for_a_number_of_rows(make: Callable[[], Any]) -> None:
    count = make()

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(h * count() + x)
        return h, h

    h, xs = given()
    with pytest.warns(RuntimeWarning, match="that state has moved on before the first of its steps"):
        assert AGAIN in bptt.explain(step, h, xs[0]).reason
    with torch.no_grad():
        count = make()
        _, ys = scan(step, h, xs, kernel="replay")
    count = make()
    for x, y in zip(xs, ys, strict=True):
        h, _ = step(h, x)
        torch.testing.assert_close(y, h)


# Less precise types on the way


def test_a_step_that_computes_in_less_precision_than_its_results_have_is_compiled() -> None:
    for seed in range(4):
        torch.manual_seed(seed)
        cell, norm = nn.Linear(H, H), nn.LayerNorm(H)

        def step(h: Tensor, x: Tensor, cell: nn.Module = cell, norm: nn.Module = norm) -> tuple[Tensor, Tensor]:
            h = torch.tanh(norm(cell(h)).float() + x)
            return h, h

        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(4):
                assert scan(step, *given(), kernel="eager")[1].dtype == torch.float32
