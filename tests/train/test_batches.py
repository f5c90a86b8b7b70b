from __future__ import annotations

import pytest
import torch

from bptt.train import RandomWindows, Sequential
from bptt.train.window import IGNORE

SHAPES = [(n, t, b) for n in (5, 8, 12, 41, 64) for t in (1, 3, 8, 100) for b in (1, 2, 4)]


@pytest.mark.parametrize(("N", "T", "B"), SHAPES)
def test_sequential_predicts_each_token_but_the_first_exactly_once(N: int, T: int, B: int):
    batches = Sequential(torch.arange(N), T, B)
    predicted = torch.cat([w.targets[w.targets != IGNORE] for w in batches])
    assert sorted(predicted.tolist()) == list(range(1, N))


@pytest.mark.parametrize(("N", "T", "B"), SHAPES)
def test_targets_are_one_token_ahead_and_lanes_are_contiguous(N: int, T: int, B: int):
    batches = Sequential(torch.arange(N), T, B)
    windows = list(batches)
    x = torch.cat([w.inputs for w in windows])
    y = torch.cat([w.targets for w in windows])
    counts = y != IGNORE
    torch.testing.assert_close(y[counts], x[counts] + 1)
    for b in range(B):
        lane = x[:, b][counts[:, b]]
        torch.testing.assert_close(lane, lane[0] + torch.arange(len(lane)))


@pytest.mark.parametrize(("N", "T", "B"), SHAPES)
def test_only_the_last_step_of_the_last_window_lacks_targets(N: int, T: int, B: int):
    windows = list(Sequential(torch.arange(N), T, B))
    y = torch.cat([w.targets for w in windows])
    assert (y[:-1] != IGNORE).all()
    assert (y[-1] != IGNORE).any()
    assert [len(w.inputs) for w in windows[:-1]] == [T] * (len(windows) - 1)
    assert [w.fresh for w in windows] == [True] + [False] * (len(windows) - 1)
    assert [w.tokens for w in windows] == [int((w.targets != IGNORE).sum()) for w in windows]
    assert max(w.tokens for w in windows) == Sequential(torch.arange(N), T, B).full


def test_d2l_shape_of_the_time_machine():
    """10,000 tokens in 32 lanes: 312 or 313 predictions a lane; d2l drops 32 x 32 of them and the remainder."""
    windows = list(Sequential(torch.arange(10_000), 35, 32))
    assert [w.inputs.shape for w in windows] == [(35, 32)] * 8 + [(33, 32)]
    assert sum(w.tokens for w in windows) == 9999


def test_sequential_refuses_fewer_predictions_than_lanes():
    with pytest.raises(ValueError, match="at least 5 tokens for 4 lanes: got 4"):
        Sequential(torch.arange(4), 3, 4)


@pytest.mark.parametrize(("N", "T", "B"), [(n, t, b) for n in (20, 41, 64) for t in (1, 3, 8) for b in (1, 2, 4, 50)])
def test_random_windows_do_not_overlap_and_leave_little_out(N: int, T: int, B: int):
    batches = RandomWindows(torch.arange(N), T, B, seed=3)
    for epoch in range(5):
        windows = [batches.window(epoch, i) for i in range(batches.windows(epoch))]
        for w in windows:
            assert w.fresh
            assert w.tokens == w.targets.numel() <= batches.full
            torch.testing.assert_close(w.targets, w.inputs + 1)
            torch.testing.assert_close(w.inputs, w.inputs[0] + torch.arange(T)[:, None])
        predicted = torch.cat([w.targets.flatten() for w in windows]).tolist()
        assert len(set(predicted)) == len(predicted)
        first, last = min(predicted), max(predicted)
        assert len(predicted) == last - first + 1
        assert first <= T
        assert N - 1 - last < T


def test_random_windows_depend_on_seed_and_epoch_alone():
    ids = torch.arange(100)
    one, other = RandomWindows(ids, 5, 4, seed=1), RandomWindows(ids, 5, 4, seed=1)
    one.window(0, 0)
    torch.manual_seed(123)
    torch.testing.assert_close(one.window(7, 2).inputs, other.window(7, 2).inputs)
    assert one.window(1, 0).inputs.tolist() != one.window(2, 0).inputs.tolist()
    assert one.window(0, 0).inputs.tolist() != RandomWindows(ids, 5, 4, seed=2).window(0, 0).inputs.tolist()


def test_random_windows_use_every_offset():
    batches = RandomWindows(torch.arange(50), 5, 4, seed=0)
    offsets = {min(int(batches.window(e, i).inputs.min()) for i in range(batches.windows(e))) for e in range(60)}
    assert offsets == {0, 1, 2, 3, 4}


def test_random_windows_refuse_a_text_that_some_offset_leaves_empty():
    with pytest.raises(ValueError, match="at least 10 tokens for windows of 5: got 9"):
        RandomWindows(torch.arange(9), 5, 1, seed=0)
    batches = RandomWindows(torch.arange(10), 5, 1, seed=0)
    assert min(batches.windows(epoch) for epoch in range(50)) == 1
