"""Lanes in other people's loops: windows are collated, pinned, moved and rebuilt, and an iteration is resumed."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, default_collate, default_convert

from bptt.train import Lanes, Window, reading
from bptt.train.window import _Tensors

SIZES = [5, 9, 2, 14, 3, 3, 7, 6, 4]


def lanes(**options: Any) -> Lanes:
    documents = [[100 * d + i for i in range(size)] for d, size in enumerate(SIZES)]
    return Lanes(documents, **({"lanes": 3, "length": 4, "shuffle": True, "seed": 1} | options))


def written(window: Window) -> tuple[Any, ...]:
    assert type(window) is Window
    assert window.resets is not None
    tensors = window.inputs.tolist(), window.targets.tolist(), window.resets.tolist()
    return (*tensors, window.fresh, window.tokens, window.total, window.place)


@pytest.mark.parametrize(
    "options", [{}, {"batch_size": None}, {"num_workers": 2}, {"batch_size": 1, "drop_last": True}]
)
def test_a_loader_gives_the_windows_themselves(options: dict[str, Any]):
    expected = [written(w) for w in lanes(epochs=2)]
    assert [written(w) for w in DataLoader(lanes(epochs=2), **options)] == expected


def test_windows_are_not_made_a_batch_of(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match=r"a batch must be one window: got 2.*batch_size=None"):
        next(iter(DataLoader(lanes(), batch_size=2)))
    windows = list(lanes())
    with pytest.raises(ValueError, match=r"must be inputs \[T, B\] and numbers.*batch_size=None.*rank="):
        Window(*(torch.cat(parts) for parts in zip(*windows[:2], strict=True)))  # as accelerate joins them
    with monkeypatch.context() as patch:  # a torch without the table of collate functions
        from torch.utils.data._utils.collate import default_collate_fn_map

        patch.delitem(default_collate_fn_map, Window)
        with pytest.raises(ValueError, match=r"got \[1, 4, 3\] and \[1, 1, 5\]"):
            default_collate(windows[:1])


REBUILT: dict[str, Callable[[Window], Any]] = {
    "fields": lambda w: type(w)(*(t.clone() for t in w)),
    "make": lambda w: w._make(t.clone() for t in w),
    "default_convert": default_convert,
    "tree_map": lambda w: torch.utils._pytree.tree_map(torch.clone, w),
    "pickle": lambda w: pickle.loads(pickle.dumps(w)),
    "deepcopy": copy.deepcopy,
    "joined with itself alone": lambda w: type(w)(*(torch.cat([t])[: len(w.inputs)] for t in w)),
}
"""As loaders and loops take a named tuple to pieces: ignite and torch by fields, accelerate by torch.cat and slices."""


@pytest.mark.parametrize("way", REBUILT)
def test_a_window_comes_through(way: str):
    window = next(iter(lanes()))
    assert written(REBUILT[way](window)) == written(window)


def test_a_window_is_a_tuple_of_tensors():
    window = next(iter(lanes()))
    assert isinstance(window, tuple)
    assert window._fields == _Tensors._fields == ("inputs", "targets", "resets", "numbers")
    assert all(isinstance(part, torch.Tensor) and part.dim() > 0 for part in window)
    inputs, targets, *_ = window
    assert inputs is window.inputs
    assert targets is window.targets


def test_a_window_moves_and_its_numbers_stay():
    window = next(iter(lanes()))
    for moved in (window.to("meta"), window.to(torch.device("meta"), non_blocking=True)):
        assert [part.device.type for part in moved] == ["meta", "meta", "meta", "cpu"]
        assert (moved.tokens, moved.fresh, moved.place) == (window.tokens, window.fresh, window.place)
    bare = Window.of(window.inputs, window.targets, fresh=False, tokens=3)
    assert (bare.to("meta").resets, bare.total, bare.place) == (None, 3, None)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinning needs a GPU")
def test_a_window_is_pinned():
    window = next(iter(DataLoader(lanes(), pin_memory=True)))
    assert all(part.is_pinned() for part in window)


# Resuming ------------------------------------------------------------------------------------------------------------


class Loader:
    """What torchdata's StatefulDataLoader does with a data set: a copy in each of n workers, their windows in turn, and
    of each worker the state behind the windows that were given."""

    def __init__(self, dataset: Lanes, workers: int, patch: pytest.MonkeyPatch, state: Any = None) -> None:
        self.patch, self.workers = patch, workers
        self.turn = 0 if state is None else state["turn"]
        self.copies = [pickle.loads(pickle.dumps(dataset)) for _ in range(max(workers, 1))]
        self.iterators = []
        for w, one in enumerate(self.copies):
            self._in_worker(w)
            if state is not None:
                one.load_state_dict(state["datasets"][w])
            iterator = iter(one)
            if state is not None and state["iterators"] is not None:
                iterator.load_state_dict(state["iterators"][w])
            self.iterators.append(iterator)

    def _in_worker(self, w: int) -> None:
        info = SimpleNamespace(id=w, num_workers=self.workers) if self.workers else None
        self.patch.setattr(reading, "get_worker_info", lambda: info)

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> tuple[Any, ...]:
        for _ in self.iterators:
            w = self.turn
            self.turn = (self.turn + 1) % len(self.iterators)
            self._in_worker(w)
            window = next(self.iterators[w], None)
            if window is not None:
                return written(window)
        self.patch.setattr(reading, "get_worker_info", lambda: None)
        raise StopIteration

    def state(self, iterators: bool) -> Any:
        state = {
            "turn": self.turn,
            "datasets": [one.state_dict() for one in self.copies],
            "iterators": [one.state_dict() for one in self.iterators] if iterators else None,
        }
        return json.loads(json.dumps(state))


@pytest.mark.parametrize("iterators", [True, False])
@pytest.mark.parametrize(("rank", "world"), [(0, 1), (1, 2)])
@pytest.mark.parametrize("workers", [0, 1, 2, 3, 9])
def test_a_loader_resumes_behind_what_it_gave(
    workers: int, rank: int, world: int, iterators: bool, monkeypatch: pytest.MonkeyPatch
):
    options = {"epochs": 3, "rank": rank, "world": world}
    expected = [written(w) for w in lanes(**options)]
    for done in range(len(expected) + 1):
        one = Loader(lanes(**options), workers, monkeypatch)
        assert list(islice(one, done)) == expected[:done]
        resumed = Loader(lanes(**options), workers, monkeypatch, one.state(iterators))
        middle = (len(expected) - done) // 2  # and once more
        assert list(islice(resumed, middle)) == expected[done : done + middle]
        again = Loader(lanes(**options), workers, monkeypatch, resumed.state(iterators))
        assert list(again) == expected[done + middle :]
        if workers == 0:  # the data set is the loader's own: its next iteration is a whole one
            assert [written(w) for w in again.copies[0]] == expected


def test_epochs_are_resumed_where_they_were():
    def run(data: Lanes, epochs: range, stop: int) -> tuple[list[Any], dict[str, Any], int]:
        seen, state = [], data.state_dict()
        for epoch in epochs:
            data.set_epoch(epoch)
            for window in data:
                seen.append(written(window))
                state = data.state_dict()
                if len(seen) == stop:
                    return seen, state, epoch
        return seen, data.state_dict(), epochs.stop

    whole, _, _ = run(lanes(), range(3), 10**6)
    assert [w[-1][0] for w in whole] == sorted(w[-1][0] for w in whole)
    for stop in range(1, len(whole) + 2):
        seen, state, epoch = run(lanes(), range(3), stop)
        resumed = lanes()
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        rest, _, _ = run(resumed, range(epoch, 3), 10**6)
        assert seen + rest == whole


def test_set_epoch_and_a_position():
    data = lanes(epochs=3)
    windows = iter(data)
    seen = [written(w) for w in islice(windows, 8)]  # into epoch 1
    state = data.state_dict()
    assert state["first"] == 0
    assert state["epoch"] == 1
    rest = [written(w) for w in windows]
    for epoch, expected in [(0, rest), (None, rest)]:  # the iteration began with epoch 0, and ends with epoch 2
        other = lanes(epochs=3)
        other.load_state_dict(state)
        if epoch is not None:
            other.set_epoch(epoch)
        assert [written(w) for w in other] == expected
        assert [written(w) for w in other] == seen + rest  # the position is used up
    other = lanes(epochs=3)
    other.load_state_dict(state)
    other.set_epoch(2)
    assert next(iter(other)).place == (2, 0)


def test_iterations_side_by_side_have_states_of_their_own():
    data = lanes()
    expected = [written(w) for w in data]
    train = iter(data)
    next(train)
    state = train.state_dict()
    assert len(list(data)) == len(expected)  # as an evaluation in between
    assert train.state_dict() == state != data.state_dict()
    fresh = iter(lanes())
    fresh.load_state_dict(state)
    assert [written(w) for w in fresh] == [written(w) for w in train] == expected[1:]


def test_a_copy_of_lanes_in_use_begins_anew():
    data = lanes()
    next(iter(data))
    assert next(iter(copy.deepcopy(data))).place == (0, 0)


def test_an_endless_iteration_is_resumed():
    data = lanes(epochs=None)
    windows = iter(data)
    list(islice(windows, 20))
    other = lanes(epochs=None)
    other.load_state_dict(data.state_dict())
    assert [written(w) for w in islice(other, 9)] == [written(w) for w in islice(windows, 9)]


def test_a_state_of_one_worker_goes_to_no_other(monkeypatch: pytest.MonkeyPatch):
    state = Loader(lanes(), 2, monkeypatch).state(False)
    for workers in (0, 3):
        with pytest.raises(ValueError, match="state must go to the worker it is of, 0 of 2: got"):
            Loader(lanes(), workers, monkeypatch, {"turn": 0, "datasets": state["datasets"] * 2, "iterators": None})
    monkeypatch.setattr(reading, "get_worker_info", lambda: None)
    main = lanes()
    windows = iter(main)
    next(windows)
    shared = Loader(lanes(), 2, monkeypatch, {"turn": 0, "datasets": [main.state_dict()] * 2, "iterators": None})
    assert list(shared) == [written(w) for w in windows]  # one of all windows is shared out among any number


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"first": 1}, "first, up to epoch=0"),
        ({"first": -1}, "first, up to epoch=0"),
        ({"over": 0.5}, "and over: got 0 and 0.5"),
        ({"worker": [1]}, "a worker's number and of how many"),
        ({"worker": [1, None]}, "a worker's number and of how many"),
        ({"seed": 7}, "state must be of lanes with seed=1: got seed=7"),
    ],
)
def test_a_state_that_is_none(wrong: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        lanes().load_state_dict(lanes().state_dict() | wrong)


def test_a_state_from_before_there_were_workers_in_it():
    whole = [written(w) for w in lanes(epochs=2)]
    state = {k: v for k, v in lanes().state_dict().items() if k not in ("first", "over", "worker")}
    data = lanes(epochs=2)
    data.restore(state | {"index": 2})
    assert [written(w) for w in data] == whole[2:]


# The packages themselves, where they are installed -------------------------------------------------------------------


def test_torchdata_resumes():
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    expected = [written(w) for w in lanes(epochs=2)]
    for workers in (0, 2):
        loader = stateful(lanes(epochs=2), batch_size=None, num_workers=workers)
        seen = [written(w) for w in islice(loader, 5)]
        resumed = stateful(lanes(epochs=2), batch_size=None, num_workers=workers)
        resumed.load_state_dict(loader.state_dict())
        assert seen + [written(w) for w in resumed] == expected


def test_accelerate_prepares_and_moves():
    accelerate = pytest.importorskip("accelerate")
    assert accelerate.utils.send_to_device(next(iter(lanes())), "meta").inputs.is_meta
    loader = accelerate.Accelerator(cpu=True).prepare(DataLoader(lanes()))
    assert [written(w) for w in loader] == [written(w) for w in lanes()]
    assert next(iter(loader)).place == (1, 0)  # it calls set_epoch


def test_lightning_moves():
    moved = pytest.importorskip("lightning.fabric.utilities.apply_func").move_data_to_device
    window = moved(next(iter(lanes())), torch.device("meta"))
    assert window.inputs.is_meta
    assert window.tokens == 12


def test_ignite_converts():
    convert = pytest.importorskip("ignite.utils").convert_tensor
    assert convert(next(iter(lanes())), device="meta").targets.is_meta
