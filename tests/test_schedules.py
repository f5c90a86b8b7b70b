"""Checkpoint schedules as literals, and what every one of them must do."""

from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bptt.schedules import Schedule, advances, binomial

LITERALS = {
    (1, 0): "R0",
    (2, 0): "A0-1 R1 R0",
    (3, 0): "A0-2 R2 A0-1 R1 R0",
    (3, 2): "A0-1 S1 A1-2 S2 R2 D2 R1 D1 R0",
    (4, 1): "A0-1 S1 A1-3 R3 A1-2 R2 R1 D1 R0",  # as good as "A0-2 S2 A2-3 R3 R2 D2 A0-1 R1 R0"
    (5, 4): "A0-1 S1 A1-2 S2 A2-3 S3 A3-4 S4 R4 D4 R3 D3 R2 D2 R1 D1 R0",
    (10, 2): "A0-4 S4 A4-7 S7 A7-9 R9 A7-8 R8 R7 D7 A4-5 S5 A5-6 R6 R5 D5 R4 D4 A0-1 S1 A1-2 S2 A2-3 R3 R2 D2 R1 D1 R0",
}


@pytest.mark.parametrize("case", LITERALS, ids=str)
def test_literals(case):
    segments, slots = case
    text = LITERALS[case]
    assert str(binomial(segments, slots)) == text
    assert Schedule.parse(text).actions == Schedule.parse(f" {text}\n").actions
    assert str(Schedule.parse(text)) == text


@given(st.integers(1, 70), st.integers(0, 12))
def test_every_segment_is_reversed_once_from_its_own_state(segments, slots):
    schedule = binomial(segments, slots)
    stored, at, most, advanced = {0}, None, 0, 0
    reversed_ = []
    for action in schedule.actions:
        if action.kind == "A":
            assert action.first in stored | {at}
            assert action.first < action.last
            advanced += action.last - action.first
            at = action.last
        elif action.kind == "S":
            assert at == action.first
            stored.add(action.first)
        elif action.kind == "D":
            stored.remove(action.first)
        else:
            assert action.first in stored | {at}
            reversed_.append(action.first)
            at = None
        most = max(most, len(stored) - 1)
    assert reversed_ == list(range(segments))[::-1]
    assert stored == {0}
    assert most <= slots
    assert advanced == advances(segments, slots)
    assert Schedule.parse(str(schedule)) == schedule


@pytest.mark.parametrize("slots", range(6))
@pytest.mark.parametrize("segments", range(1, 30))
def test_the_closed_form_is_the_least(segments, slots):
    """Against the recursion: t(N, c) = min over m of m + t(N - m, c - 1) + t(m, c)."""
    known: dict[tuple[int, int], int] = {}

    def least(n: int, c: int) -> int:
        if n == 1:
            return 0
        if c == 0:
            return n * (n - 1) // 2
        if (n, c) not in known:
            known[n, c] = min(m + least(n - m, c - 1) + least(m, c) for m in range(1, n))
        return known[n, c]

    assert advances(segments, slots) == least(segments, slots)
    c = slots + 1
    r = next(r for r in range(100) if comb(c + r, c) >= segments)
    assert advances(segments, slots) == r * segments - (comb(c + r, r - 1) if r else 0)


@pytest.mark.parametrize(("segments", "slots"), [(1, 0), (5, 0), (5, 4), (9, 2), (12, 3), (17, 1)])
def test_a_part_is_reversed_alone(segments, slots):
    """From the states stored on the way forward, each segment of the part once, in order, and nothing needless."""
    schedule = binomial(segments, slots)
    for first in range(segments):
        for last in range(first, segments):
            actions = schedule.only(first, last)
            stored, at, reversed_ = {0, *schedule.stored_forward}, -1, []
            for i, action in enumerate(actions):
                if action.kind == "A":
                    assert at == action.first or action.first in stored
                    at = action.last
                    assert actions[i + 1].first == at  # of use
                elif action.kind == "S":
                    assert at == action.first
                    stored.add(at)
                elif action.kind == "R":
                    assert at == action.first or action.first in stored
                    reversed_.append(action.first)
                else:
                    stored.remove(action.first)
                assert len(stored) <= slots + 1
            assert reversed_ == list(range(last, first - 1, -1))
    assert schedule.only(0, segments - 1) == schedule.backward


@pytest.mark.parametrize(("segments", "slots"), [(5, 4), (5, 1), (9, 2), (30, 3), (200, 5), (200, 20), (60, 58)])
def test_states_in_memory_where_the_first_ones_cannot_be_freed(segments, slots):
    """What `Checkpoints.slots` reckons with: those stored on the way forward stay to the end."""
    held = binomial(segments, slots).held
    assert slots <= held <= (slots if slots == segments - 1 else 2 * slots)


def test_one_level_runs_every_segment_once_more():
    assert advances(50, 49) == 49
    assert binomial(50, 49).stored_forward == tuple(range(1, 50))


def test_bad_arguments():
    with pytest.raises(ValueError, match="segments must be at least 1"):
        binomial(0, 1)
    with pytest.raises(ValueError, match="slots at least 0"):
        binomial(3, -1)
    with pytest.raises(ValueError, match=r"words like A0-3.*: got 'B3'"):
        Schedule.parse("A0-3 B3")
