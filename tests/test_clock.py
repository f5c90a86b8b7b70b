"""How time is taken: in turn, medians, and a guard."""

from __future__ import annotations

import pytest

from bptt.clock import SAMPLE, Guard, Product, Timing, interleaved


def test_contenders_take_turns(monkeypatch: pytest.MonkeyPatch):
    order: list[str] = []
    monkeypatch.setattr("bptt.clock.perf_counter", lambda: float(len(order)))
    times = interleaved({name: lambda name=name: order.append(name) for name in "ab"}, 0.0, least=3, pause=0.0)
    assert [timing.samples for timing in times.values()] == [3, 3]
    assert "".join(order) == "aabb" + "ab" + "ba" + "ab"  # to warm up, then round by round


def test_time_is_that_of_one_call(monkeypatch: pytest.MonkeyPatch):
    clock = [0.0]

    def lasting(seconds: float):
        def call():
            clock[0] += seconds

        return call

    monkeypatch.setattr("bptt.clock.perf_counter", lambda: clock[0])
    times = interleaved({"short": lasting(1e-4), "long": lasting(0.5)}, seconds=5.1, least=2, pause=0.0)
    assert times["short"].median == pytest.approx(1e-4)
    assert times["long"].median == pytest.approx(0.5)
    assert times["long"].samples == 10


def test_calls_about_as_long_as_a_sample_are_timed_alike(monkeypatch: pytest.MonkeyPatch):
    """Each takes twice as long after the other as after itself; neither may be timed in the one way alone."""
    clock, last = [0.0], [""]

    def call(name: str, seconds: float):
        def run():
            clock[0] += seconds * (1 if last[0] == name else 2)
            last[0] = name

        return run

    monkeypatch.setattr("bptt.clock.perf_counter", lambda: clock[0])
    calls = {"one": call("one", 0.9 * SAMPLE), "two": call("two", 1.1 * SAMPLE), "far": call("far", 3 * SAMPLE)}
    times = interleaved(calls, seconds=0.0, least=4, pause=0.0)
    assert [t.median / SAMPLE for t in times.values()] == pytest.approx([0.9, 1.1, 3])


def test_a_call_without_duration_is_not_repeated_for_ever(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("bptt.clock.perf_counter", lambda: 0.0)
    counted: list[int] = []
    times = interleaved({"nothing": lambda: counted.append(1)}, seconds=0.0, least=2, pause=0.0)
    assert times["nothing"].median == 0
    assert len(counted) < 10_000


def test_times_are_told_apart_by_their_quartiles_and_their_difference():
    one = Timing(1.0, 0.95, 1.05, 9)
    assert one.apart(Timing(1.2, 1.15, 1.25, 9))
    assert Timing(1.2, 1.15, 1.25, 9).apart(one)
    assert not one.apart(Timing(1.2, 1.0, 1.25, 9))  # the ranges meet
    assert not one.apart(Timing(1.4, 1.1, 1.7, 9))  # the difference is less than a spread
    assert not one.apart(one)


@pytest.mark.parametrize(("cores", "said"), [((2.0, 1.95, 0.4), False), ((2.0, 1.2, 1.1), True)])
def test_the_guard_goes_by_the_median_of_its_looks(
    cores: tuple[float, ...], said: bool, monkeypatch: pytest.MonkeyPatch
):
    found = iter(cores)
    monkeypatch.setattr("bptt.clock.product", lambda order: Product(1e9, next(found)))
    guard = Guard()
    guard.threads = 2
    assert not guard.disturbed
    interleaved({"a": lambda: None}, seconds=0.0, least=2, pause=0.0, guard=guard)  # before both rounds, and after
    assert len(guard.cores) == 3
    assert guard.disturbed is said
