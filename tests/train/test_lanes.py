from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader

from bptt.train import Lanes, Window
from bptt.train.window import IGNORE

lengths = st.lists(st.integers(0, 12), min_size=1, max_size=12).filter(lambda sizes: max(sizes) >= 2)


def numbered(sizes: Sequence[int]) -> list[list[int]]:
    """Documents in which no two tokens are the same: 1000 d + i."""
    return [[1000 * d + i for i in range(size)] for d, size in enumerate(sizes)]


def same(one: Window, other: Window) -> None:
    torch.testing.assert_close(one.inputs, other.inputs)
    torch.testing.assert_close(one.targets, other.targets)
    torch.testing.assert_close(one.resets, other.resets)
    assert (one.fresh, one.tokens, one.total, one.place) == (other.fresh, other.tokens, other.total, other.place)


def joined(windows: Sequence[Window]) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets and resets of all steps."""
    resets = [w.resets for w in windows if w.resets is not None]
    return torch.cat([w.inputs for w in windows]), torch.cat([w.targets for w in windows]), torch.cat(resets)


@given(lengths, st.integers(1, 5), st.integers(1, 7), st.booleans())
def test_each_token_but_the_first_of_a_document_is_predicted_exactly_once(
    sizes: list[int], B: int, T: int, shuffle: bool
):
    lanes = Lanes(numbered(sizes), B, T, shuffle=shuffle, seed=5, epochs=2)
    windows = list(lanes)
    for epoch in range(2):
        mine = [w for w in windows if w.place is not None and w.place[0] == epoch]
        assert [w.place for w in mine] == [(epoch, i) for i in range(lanes.windows(epoch))]
        x, y, resets = joined(mine)
        predicted = sorted(y[y != IGNORE].tolist())
        assert predicted == [1000 * d + i for d, size in enumerate(sizes) for i in range(1, size)]
        assert sum(w.tokens for w in mine) == lanes.tokens == len(predicted)
        assert all(w.tokens == w.total == int((w.targets != IGNORE).sum()) > 0 for w in mine)
        assert all(len(w.inputs) == T for w in mine[:-1])
        assert (y != IGNORE)[-1].any()  # no step without a prediction
        assert [w.fresh for w in mine] == [True] + [False] * (len(mine) - 1)
        # resets where, and only where, a document's first token is read
        torch.testing.assert_close(resets, (y != IGNORE) & (x % 1000 == 0))
        # a document stays in one lane, step by step
        counts = y != IGNORE
        torch.testing.assert_close(y[counts], x[counts] + 1)
        goes_on = counts[1:] & ~resets[1:]
        torch.testing.assert_close(x[1:][goes_on], y[:-1][goes_on])
        # a lane is padded only behind its last document
        assert (counts[1:] <= counts[:-1]).all()


def test_the_packing_as_a_picture():
    """A capital is a document's first token, a dot a padded step; a document of n letters is read for n - 1 steps."""
    words = ["Abcde", "Fg", "Hijk", "Z", "", "Lm", "Nopq"]
    lanes = Lanes([[ord(c) for c in word] for word in words], 2, 3)
    assert lanes.skipped == 2
    pictures = []
    for window in lanes:
        steps = zip(window.inputs.T.tolist(), window.targets.T.tolist(), strict=True)
        pictures.append(["".join("." if y < 0 else chr(x) for x, y in zip(*lane, strict=True)) for lane in steps])
    assert pictures == [["Abc", "FHi"], ["dL.", "jNo"], [".", "p"]]


@given(lengths, st.integers(1, 5), st.integers(1, 7), st.integers(1, 4))
def test_ranks_hold_the_lanes_of_one_process(sizes: list[int], B: int, T: int, world: int):
    world = min(world, B)
    whole = list(Lanes(numbered(sizes), B, T, shuffle=True))
    ranks = [list(Lanes(numbered(sizes), B, T, shuffle=True, rank=r, world=world)) for r in range(world)]
    assert {len(windows) for windows in ranks} == {len(whole)}
    for window, *parts in zip(whole, *ranks, strict=True):
        torch.testing.assert_close(torch.cat([p.inputs for p in parts], 1), window.inputs)
        torch.testing.assert_close(torch.cat([p.targets for p in parts], 1), window.targets)
        torch.testing.assert_close(torch.cat([p.resets for p in parts if p.resets is not None], 1), window.resets)
        assert {p.total for p in parts} == {window.tokens} == {sum(p.tokens for p in parts)}
        assert max(p.inputs.shape[1] for p in parts) - min(p.inputs.shape[1] for p in parts) <= 1


def test_a_rank_that_has_run_out_says_so():
    ranks = [Lanes(numbered([9, 3]), 2, 4, rank=r, world=2) for r in range(2)]
    assert [[w.tokens for w in rank] for rank in ranks] == [[4, 4], [2, 0]]
    assert [[w.total for w in rank] for rank in ranks] == [[6, 4], [6, 4]]
    assert {rank.full for rank in ranks} == {8}
    assert Lanes(numbered([3, 2]), 2, 4).full == 3


@pytest.mark.parametrize(("workers", "rank", "world"), [(1, 0, 1), (2, 0, 1), (2, 1, 2)])
def test_workers_change_nothing(workers: int, rank: int, world: int):
    lanes = Lanes(numbered([5, 9, 2, 14, 3, 3, 7]), 3, 4, shuffle=True, seed=1, epochs=3, rank=rank, world=world)
    expected = list(lanes)
    got = list(DataLoader(lanes, batch_size=None, num_workers=workers))
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        same(one, other)


@given(lengths, st.integers(1, 4), st.integers(1, 5), st.data())
def test_going_on_from_any_window_is_going_on(sizes: list[int], B: int, T: int, data: st.DataObject):
    lanes = Lanes(numbered(sizes), B, T, shuffle=True, seed=3, epochs=2)
    windows = list(lanes)
    done = data.draw(st.integers(0, len(windows) - 1))
    state = pickle.loads(pickle.dumps(lanes.state(windows[done])))
    resumed = Lanes(numbered(sizes), B, T, shuffle=True, seed=3, epochs=2)
    resumed.restore(state)
    assert resumed.state() == state
    rest = list(resumed)
    assert len(rest) == len(windows) - done - 1
    for one, other in zip(rest, windows[done + 1 :], strict=True):
        same(one, other)
    place = windows[done].place
    assert place is not None
    same(lanes.window(*place), windows[done])  # in any order
    same(lanes.window(0, 0), windows[0])
    same(lanes.window(*place), windows[done])


def test_a_state_is_refused_elsewhere():
    state = Lanes(numbered([5, 5]), 2, 3).state()
    for other, name in [
        (Lanes(numbered([5, 5]), 1, 3), "lanes=1: got lanes=2"),
        (Lanes(numbered([5, 5]), 2, 4), "length=4"),
        (Lanes(numbered([5, 5]), 2, 3, seed=1), "seed=1"),
        (Lanes(numbered([5, 5, 0]), 2, 3), "documents=3"),
        (Lanes(numbered([5, 6]), 2, 3), "tokens=9"),
    ]:
        with pytest.raises(ValueError, match=name):
            other.restore(state)
    Lanes(numbered([5, 5]), 2, 3, rank=1, world=2).restore(state)
    for place in [{"epoch": -1}, {"index": -1}, {"index": 0.5}, {"epoch": None}]:
        with pytest.raises(ValueError, match="an epoch and an index of at least 0"):
            Lanes(numbered([5, 5]), 2, 3).restore(state | place)
    with pytest.raises(ValueError, match="got lanes=None"):
        Lanes(numbered([5, 5]), 2, 3).restore({})
    with pytest.raises(ValueError, match="without a place"):
        Lanes(numbered([5, 5]), 2, 3).state(Window.of(torch.zeros(1, 1), torch.zeros(1, 1), fresh=True, tokens=1))


def test_orders_differ_from_epoch_to_epoch_and_depend_on_the_seed():
    def order(seed: int, epoch: int) -> list[int]:
        lanes = Lanes(numbered([4] * 30), 1, 3, shuffle=True, seed=seed)
        return [int(lanes.window(epoch, i).inputs[0, 0]) // 1000 for i in range(30)]

    assert sorted(order(0, 0)) == list(range(30))
    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


@dataclass
class Stream:
    """Documents 0, 1, ..., of 2 to 6 tokens each, and how many were read."""

    stop: int | None = None
    read: int = 0

    def __iter__(self) -> Iterator[list[int]]:
        for d in count() if self.stop is None else range(self.stop):
            self.read += 1
            yield [1000 * d + i for i in range(2 + d * 7 % 5)]


def test_an_endless_stream_is_read_only_as_far_as_its_windows_reach():
    stream = Stream()
    lanes = Lanes(stream, 4, 10, epochs=None)
    windows = list(islice(lanes, 50))
    assert all(w.tokens == 40 for w in windows)
    assert stream.read < 50 * 40
    x, _, resets = joined(windows)
    first = x[resets].tolist()
    assert sorted(first) == [1000 * d for d in range(len(first))]
    resumed = Lanes(Stream(), 4, 10, epochs=None)
    resumed.restore(lanes.state(windows[29]))
    for one, other in zip(islice(resumed, 20), windows[30:], strict=True):
        same(one, other)
    same(lanes.window(0, 7), windows[7])
    same(next(iter(pickle.loads(pickle.dumps(lanes)))), windows[0])
    with pytest.raises(TypeError, match="windows are counted for a sequence"):
        lanes.windows(0)


def test_a_finite_stream_is_a_sequence_read_in_order():
    documents = list(Stream(20))
    for one, other in zip(Lanes(Stream(20), 3, 4, epochs=2), Lanes(documents, 3, 4, epochs=2), strict=True):
        same(one, other)


@pytest.mark.parametrize(
    "form", [tuple, np.array, lambda ids: np.array(ids, ">u2"), lambda ids: torch.tensor(ids, dtype=torch.int32)]
)
def test_documents_of_any_integer_kind(form):
    documents = numbered([5, 3, 7])
    for one, other in zip(Lanes([form(d) for d in documents], 2, 4), Lanes(documents, 2, 4), strict=True):
        same(one, other)


@pytest.mark.parametrize(
    ("documents", "error", "message"),
    [
        ([[1], [], [2]], ValueError, "got 3 shorter ones"),
        ([], ValueError, "at least 2 tokens"),
        (iter([[1, 2]]), TypeError, "read more than once: got list_iterator"),
        (3, TypeError, "got int"),
    ],
)
def test_documents_that_cannot_be_packed(documents, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        Lanes(documents, 2, 3)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([0.5, 1.0], "whole numbers"),
        ("abc", "whole numbers"),
        ([[1, 2], [3, 4]], "whole numbers"),
        ([True, False], "whole numbers"),
        ([1, IGNORE], "at least 0: got -100"),
        (torch.ones(2), "whole numbers"),
    ],
)
def test_documents_that_hold_no_tokens(document, message: str):
    with pytest.raises(ValueError, match=message):
        list(Lanes([document], 1, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lanes": 0}, "lanes must be at least 1: got 0"),
        ({"length": 0}, "length must be at least 1"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"world": 0}, "world must be at least 1"),
        ({"rank": 2, "world": 2}, r"rank must be in \[0, 2\) for world=2: got 2"),
        ({"rank": 0, "world": 3}, "lanes must be at least world=3"),
    ],
)
def test_impossible_numbers(options: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        Lanes([[1, 2]], **{"lanes": 2, "length": 3} | options)


def test_streams_cannot_be_shuffled_nor_be_empty():
    with pytest.raises(ValueError, match="comes in its own order"):
        Lanes(Stream(), 2, 3, shuffle=True)
    with pytest.raises(ValueError, match="got none in a whole pass"):
        list(Lanes(Stream(0), 2, 3, epochs=None))


def test_no_window_past_the_last():
    lanes = Lanes(numbered([5, 5]), 2, 3)
    for index in (-1, 2):
        with pytest.raises(IndexError, match=f"no window {index}"):
            lanes.window(0, index)


def test_a_loop_of_epochs_has_an_order_of_its_own_each():
    def order(lanes):
        return [int(t) for w in lanes for t in w.targets.flatten() if t >= 0]

    documents = [[n, n + 100] for n in range(20)]
    lanes = Lanes(documents, 1, 4, shuffle=True)
    found = []
    for epoch in range(3):
        lanes.set_epoch(epoch)
        found.append(order(lanes))
    assert [*found[0], *found[1], *found[2]] == order(Lanes(documents, 1, 4, shuffle=True, epochs=3))
    assert sorted(found[0]) == sorted(found[1])
    assert found[0] != found[1] != found[2]
    windows = list(lanes)
    again = Lanes(documents, 1, 4, shuffle=True)
    again.restore(lanes.state(windows[1]))  # in epoch 2
    again.set_epoch(2)
    assert order(again) == found[2][8:]
    again.set_epoch(1)
    assert order(again) == found[1]
    with pytest.raises(ValueError, match="epoch must be at least 0: got -1"):
        lanes.set_epoch(-1)


def test_a_state_of_other_documents_is_refused():
    """Of equal count and equal total too: they lie in other places."""
    state = Lanes([[1, 2, 3], [1, 2]], 1, 2).state()
    with pytest.raises(ValueError, match="state must be of lanes with sizes="):
        Lanes([[1, 2], [1, 2, 3]], 1, 2).restore(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 2.5}, "length must be a whole number: got 2.5"),
        ({"lanes": True}, "lanes must be a whole number: got True"),
        ({"seed": 1.5}, "seed must be a whole number: got 1.5"),
        ({"documents": {"a": [1, 2]}}, "documents must be a sequence.*got dict"),
    ],
)
def test_what_is_no_number_or_sequence(options, message):
    with pytest.raises(TypeError, match=message):
        Lanes(**({"documents": [[1, 2, 3]], "lanes": 1, "length": 2} | options))
