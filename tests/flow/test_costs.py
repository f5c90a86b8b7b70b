"""What is said of cost: true for what was measured, the same for the same machine, or not said."""

from __future__ import annotations

from typing import Any

import measurements as made
import numpy as np
import pytest

from bptt.clock import Timing
from bptt.flow import Comparison, Row, conclusion, verdict
from bptt.flow.costs import better, memory_of_all, recommended, total_error


def row(policy: str, error: float, median: float, low: float, high: float, **fields: Any) -> Row:
    return made.row(policy, error, 0.0, median, time=Timing(median, low, high, 9), **fields)


def compared(*rows: Row, **fields: Any) -> Comparison:
    return made.comparison(rows=rows, **fields)


FULL = row("full", 0.0, 1.02e-3, 1.00e-3, 1.05e-3, bytes=6 << 20)


def test_total_error_is_the_root_mean_square():
    assert total_error(made.row("x", 0.3, 0.16, 1.0)) == pytest.approx(0.5)


def test_what_costs_the_same_is_no_reason_to_be_inexact():
    near = row("chunked:5", 0.05, 1.01e-3, 0.99e-3, 1.06e-3, bytes=6 << 20)
    found = compared(FULL, near)
    assert conclusion(found) == (
        "Use full: it is exact and costs no more here (1.02 ms against 1.01 ms for chunked:5; quartiles overlap)"
    )
    assert recommended(found) is None
    assert verdict(found).advice == ()


def test_nothing_is_said_of_memory_that_differs():
    near = row("chunked:5", 0.05, 1.01e-3, 0.99e-3, 1.06e-3, bytes=3 << 20)
    assert conclusion(compared(FULL, near)).startswith("Use full: it is exact and takes no longer here (")


@pytest.mark.parametrize("seed", range(20))
def test_identical_runs_give_the_same_conclusion(seed: int):
    """All policies take as long; the noise of a run is 5 % of it, and each of four runs has its own."""
    generator = np.random.default_rng(seed)
    errors = {"full": 0.0, "chunked:5": 0.4, "chunked:20": 0.08, "truncated:5": 0.3, "truncated:20": 0.02}
    said = set()
    for _ in range(4):
        times = {name: Timing.of((1e-3 * (1 + 0.05 * generator.standard_normal(9))).tolist()) for name in errors}
        rows = (made.row(name, error, 0.0, 1.0, time=times[name]) for name, error in errors.items())
        said.add(conclusion(compared(*rows)).partition(" (")[0].replace("hardly", "no"))
    assert said == {"Use full: it is exact and takes no longer here"}


@pytest.mark.parametrize("noise", [0.05, 0.1, 0.2])
def test_noise_is_rarely_taken_for_a_saving(noise: float):
    """Nine policies that take as long, nine samples of each: two comparisons of a hundred may err, and no more."""
    generator = np.random.default_rng(0)
    wrong = 0
    for _ in range(300):
        times = [Timing.of(np.exp(noise * generator.standard_normal(9)).tolist()) for _ in range(9)]
        rows = [made.row("full", 0.0, 0.0, 1.0, time=times[0])]
        rows += [made.row(f"chunked:{i}", 0.01, 0.0, 1.0, time=time) for i, time in enumerate(times[1:], 1)]
        wrong += recommended(compared(*rows)) is not None
    assert wrong <= 6


def test_a_saving_that_the_clock_sees():
    near = row("chunked:35", 0.012, 0.61e-3, 0.60e-3, 0.63e-3)
    found = compared(FULL, near)
    assert conclusion(found) == (
        "chunked:35 takes 60 % of the time of full (0.61 ms against 1.02 ms; quartiles apart) and is 1.2 % off"
    )
    (advice,) = verdict(found).advice
    assert advice == (
        'gradient="chunked:35" saves 40 % of the time of full and is 1.2 % off the full gradient '
        "(policies: 0.61 ms against 1.02 ms)"
    )
    assert verdict(compared(FULL, near, own="chunked:35")).advice == ()


def test_a_spread_larger_than_the_difference_says_nothing():
    wide = row("chunked:35", 0.012, 0.61e-3, 0.3e-3, 0.95e-3)
    found = compared(FULL, wide)
    assert conclusion(found).startswith("Use full: it is exact")
    assert "within their spread" in conclusion(found)
    assert verdict(found).advice == ()


def test_of_those_as_fast_the_one_that_errs_least():
    rows = [row(f"chunked:{k}", 0.9 / k, 0.5e-3 + 1e-6 * k, 0.48e-3, 0.53e-3) for k in (10, 20, 30)]
    assert recommended(compared(FULL, *rows)) is rows[-1]


def test_fast_and_far_off():
    far = row("chunked:2", 0.5, 0.5e-3, 0.49e-3, 0.51e-3)
    slow = row("truncated:9", 0.01, 8e-3, 7.9e-3, 8.1e-3)
    assert conclusion(compared(FULL, far, slow)) == (
        "Use full: it is exact, and no policy within 10 % of it is faster here; chunked:2 takes 49 % of its time "
        "(0.5 ms against 1.02 ms; quartiles apart) and is 50 % off"
    )
    assert conclusion(compared(FULL)) == "Nothing to compare with the full gradient"
    assert conclusion(compared(far, slow)) == "truncated:9 comes closest to the full gradient: 1 % off"
    assert conclusion(compared(far)).endswith("chunked:2 errs least, by 50 %")


def test_slower_by_less_than_is_worth_a_word():
    near = row("chunked:35", 0.012, 0.96e-3, 0.955e-3, 0.965e-3)
    steady = row("full", 0.0, 1.02e-3, 1.015e-3, 1.025e-3)
    assert conclusion(compared(steady, near)) == (
        "Use full: it is exact and takes hardly longer here (1.02 ms against 0.96 ms for chunked:35; quartiles apart)"
    )


def test_on_a_disturbed_machine_nothing_is_said_of_time():
    near = row("chunked:35", 0.012, 0.1e-3, 0.09e-3, 0.11e-3)
    found = compared(FULL, near, threads=2, cores=1.234)
    assert conclusion(found) == (
        "chunked:35 comes closest to the full gradient: 1.2 % off; nothing is said of time: the machine was disturbed "
        "(a product on 2 threads got 1.2 cores)"
    )
    assert verdict(found).advice == ()


def test_the_policy_in_use_is_judged_too():
    used = row("chunked:5", 0.45, 1.01e-3, 0.99e-3, 1.06e-3)
    found = compared(FULL, used, own="chunked:5")
    assert better(found) is FULL
    (advice,) = verdict(found).advice
    assert advice == (
        'gradient="full" is exact, and no saving by chunked:5, which is 45 % off, could be measured '
        "(policies: 1.02 ms against 1.01 ms)"
    )
    assert better(compared(FULL, row("truncated:99", 1e-9, 1e-3, 0.9e-3, 1.1e-3), own="truncated:99")) is None
    assert better(compared(FULL, row("chunked:5", 0.45, 0.5e-3, 0.49e-3, 0.51e-3), own="chunked:5")) is None


def test_memory_that_all_have_in_common():
    assert memory_of_all(compared(FULL, row("chunked:5", 0.4, 1.0, 1.0, 1.0, bytes=(6 << 20) + 100))) == "6"
    assert memory_of_all(compared(FULL, row("chunked:5", 0.4, 1.0, 1.0, 1.0, bytes=5 << 20))) is None
    assert memory_of_all(compared(row("full", 0.0, 1.0, 1.0, 1.0))) is None
