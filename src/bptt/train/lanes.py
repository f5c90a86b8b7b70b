"""Documents of any lengths in B lanes: the state is carried within a document and reset at its start.

Legend: T steps per window, B lanes over all ranks, n tokens of a document, which are n - 1 predictions.

Where each document lies follows from the lengths alone (`packing`), so every rank and every data-loader worker works it
out for itself, and reads only what its own windows hold.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any, Protocol, TypeGuard, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from .batches import epoch_generator
from .packing import PackedEpochs, Packing
from .processes import Processes
from .reading import Place, Reading
from .window import IGNORE, Window

__all__ = ["Documents", "Lanes"]


class Documents(Protocol):
    """Documents by number: what has their count and gives each one."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def __getitem__(self, index: int, /) -> Any:
        """Token ids `[n]`: with a length, to be sliced."""
        ...


class Lanes(PackedEpochs, IterableDataset[Window]):
    """Windows `[T, B]` over many documents: each token but a document's first is predicted exactly once an epoch.

    A lane whose document has ended takes the next one at the very next step, with `resets` True there and nowhere else.
    At the end of an epoch lanes that have run out are padded (input 0, target `IGNORE`), and the last window is
    shorter. Documents of fewer than 2 tokens predict nothing and are passed over.

    documents: a sequence, each item the token ids of a document: a list, an integer array or tensor, or anything with
    a length of which slices can be taken (see `bptt.train.documents`; only the slices in use are read). Or an iterable
    that yields such items anew each time, possibly without end: an epoch is then one pass, in its own order.
    lanes: B, over all ranks. length: T.
    shuffle: a new order every epoch, which depends on (seed, epoch) alone; for sequences.
    epochs: how many an iteration goes through; None: without end. Each iteration begins at epoch 0: in a loop that
    makes one for each epoch call `set_epoch` first, as with torch's DistributedSampler.
    rank, world: this process's number and how many there are; it gets its lanes (`bptt.train.processes`) of the very
    windows that one process would get. All ranks have as many windows: where the lanes of one have run out, its
    `tokens` is 0, while `total` counts all ranks and is never 0. Each rank and each worker works through all lengths,
    so an iterable is read in full by each of them.

    A step's loss is the summed NLL over `full` (on every rank; gradients are summed over ranks, so where they are
    averaged, times `world`): every token weighs the same.

    Under `torch.utils.data.DataLoader(lanes, batch_size=None, num_workers=n)` worker w makes every n-th window from
    the w-th on: the windows that arrive are the same, in the same order, for every n. The default batch_size of 1 gives
    the same windows, and a larger one raises, since each window continues the state of the one before. Where a library
    divides a loader's batches among processes itself, as accelerate does, keep it from that: each rank reads its own.

    A position is (epoch, index) and nothing else, so a run can go on at any window (`state_dict`, `load_state_dict`),
    also with another number of ranks or workers. Going there takes a pass over the lengths before it. Workers get a
    copy of this object when they start: set the position before, and leave out `persistent_workers`.

    skipped: documents of fewer than 2 tokens, None for an iterable.

    Raises TypeError for documents that are neither, or are an iterator, which could be read only once, and ValueError
    for impossible numbers, for ranks without a lane, and for documents that predict nothing.

    >>> lanes = Lanes([[1, 2, 3], [4, 5], [6, 7, 8, 9], [0]], lanes=2, length=3)
    >>> for w in lanes:
    ...     print(w.inputs.T.tolist(), w.targets.T.tolist(), w.resets.int().T.tolist(), w.tokens)
    [[1, 2, 0], [4, 6, 7]] [[2, 3, -100], [5, 7, 8]] [[1, 0, 0], [1, 1, 0]] 5
    [[0], [8]] [[-100], [9]] [[0], [0]] 1
    """

    def __init__(
        self,
        documents: Documents | Iterable[Any],
        lanes: int,
        length: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        epochs: int | None = 1,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        numbers = {"lanes": lanes, "length": length, "world": world, "rank": rank, "seed": seed, "epochs": epochs}
        for name, value in numbers.items():
            if value is None:
                continue
            if isinstance(value, bool) or not hasattr(value, "__index__"):
                raise TypeError(f"{name} must be a whole number: got {value!r}")
            if value < 1 and name not in ("rank", "seed"):
                raise ValueError(f"{name} must be at least 1: got {value}")
        if not 0 <= rank < world:
            raise ValueError(f"rank must be in [0, {world}) for world={world}: got {rank}")
        if lanes < world:
            raise ValueError(f"lanes must be at least world={world}, one for each rank: got {lanes}")
        self.documents, self.lanes, self.length = documents, lanes, length
        self.shuffle, self.seed, self.epochs = shuffle, seed, epochs
        self.rank, self.world = rank, world
        self.share = range(lanes)[Processes(rank, world).lanes(lanes)]
        self.sizes: np.ndarray[Any, np.dtype[np.int64]] | None = None
        self.skipped: int | None = None
        if hasattr(documents, "__len__") and hasattr(documents, "__getitem__") and not isinstance(documents, Mapping):
            self.sizes = _sizes(documents)
            self.skipped = int((self.sizes < 2).sum())
            if self.skipped == len(self.sizes):
                raise ValueError(f"documents must hold one of at least 2 tokens: got {self.skipped} shorter ones")
        elif not isinstance(documents, Iterable) or isinstance(documents, Iterator | Mapping):
            raise TypeError(
                "documents must be a sequence, or an iterable that can be read more than once: "
                f"got {type(documents).__name__}"
            )
        elif shuffle:
            raise ValueError("shuffle=True is for a sequence of documents: an iterable comes in its own order")
        self._first = 0
        self._set: Place | None = None  # where the next iteration starts; None: at the first epoch
        self._reading: Reading | None = None  # the latest iteration

    def of_rank(self, rank: int, world: int) -> Lanes:
        """The lanes of one of several processes, of the same windows."""
        options: dict[str, Any] = {"shuffle": self.shuffle, "seed": self.seed, "epochs": self.epochs}
        return Lanes(self.documents, self.lanes, self.length, rank=rank, world=world, **options)

    @property
    def full(self) -> int:
        """What a step's summed loss is divided by: the predictions, over all ranks, of a window without padding.

        Of a sequence that has fewer in all: these.
        """
        return self.lanes * self.length if self.tokens is None else min(self.lanes * self.length, self.tokens)

    @cached_property
    def tokens(self) -> int | None:
        """Predictions of an epoch, over all ranks; None for an iterable."""
        return None if self.sizes is None else int(self.sizes.sum() - np.count_nonzero(self.sizes))

    def windows(self, epoch: int) -> int:
        """Windows of an epoch (from 0), the same on all ranks. Raises TypeError for an iterable: it may have no end."""
        if self.sizes is None:
            raise TypeError("windows are counted for a sequence of documents: an iterable may have no end")
        return super().windows(epoch if self.shuffle else 0)

    def __iter__(self) -> Reading:
        """The windows from the position that was set (else the first) to the end of the last epoch.

        What this gives has `state_dict` and `load_state_dict` of its own, for several iterations side by side.
        """
        self._reading, self._set = Reading(self, (self._set or self._beginning).here()), None
        return self._reading

    def set_epoch(self, epoch: int) -> None:
        """Let iterations begin with this epoch; where a position was set in it, the next one at that position.

        >>> lanes = Lanes([[1, 2, 3]] * 4, lanes=1, length=8, shuffle=True)
        >>> for epoch in range(10):
        ...     lanes.set_epoch(epoch)
        ...     for window in lanes:
        ...         pass  # train on it
        """
        if epoch < 0:
            raise ValueError(f"epoch must be at least 0: got {epoch}")
        self._first, self._reading = epoch, None
        if self._set is not None and self._set.first != epoch:
            self._set = replace(self._set, first=epoch) if self._set.epoch == epoch else None

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on after the windows that the latest iteration has given.

        Numbers, text and None. Windows that a loader has read ahead, or its workers have made, are not known here:
        there take `state(window)`, or the state of a loader that keeps one, as torchdata's StatefulDataLoader.

        >>> lanes = Lanes([[1, 2, 3, 4]] * 3, lanes=1, length=2, shuffle=True)
        >>> windows = iter(lanes)
        >>> _ = next(windows)
        >>> state, rest = lanes.state_dict(), [w.inputs.tolist() for w in windows]
        >>> lanes.load_state_dict(state)
        >>> [w.inputs.tolist() for w in lanes] == rest
        True
        """
        return self._written(self._reading.place if self._reading else self._set or self._beginning)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration start where `state_dict` was taken, and end where that one would have.

        A loader's workers start from copies, so that an iteration of theirs does not use the position up: call
        `set_epoch` before each one.

        Raises ValueError for a state of other documents or lanes, and, when the iteration begins, for that of another
        worker of a loader.
        """
        self._set, self._reading = self._read(state), None

    def state(self, after: Window | None = None) -> dict[str, Any]:
        """The position after a window, for `restore`; None: as `state_dict`.

        after: the last window that was used, so that windows a loader has read ahead do not count.
        """
        if after is None:
            return self.state_dict()
        if after.place is None:
            raise ValueError("after must be a window of Lanes: got one without a place")
        epoch, index = after.place
        return self._written(Place(self._first_before(epoch), epoch, index + 1))

    def restore(self, state: dict[str, Any]) -> None:
        """`load_state_dict`, for what `state` gives."""
        self.load_state_dict(state)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_reading": None}

    @property
    def _beginning(self) -> Place:
        return Place(self._first, self._first)

    def _first_before(self, epoch: int) -> int:
        """The first epoch of an iteration that has come to this one."""
        return min(epoch, self._first if self.epochs is None else max(self._first, epoch - self.epochs + 1))

    def _written(self, place: Place) -> dict[str, Any]:
        """A place with what it means."""
        worker = None if place.worker is None else list(place.worker)
        return asdict(place) | {"worker": worker} | self._meaning()

    def _read(self, state: dict[str, Any]) -> Place:
        """The inverse of `_written`."""
        for name, value in self._meaning().items():
            if state.get(name) != value:
                raise ValueError(f"state must be of lanes with {name}={value}: got {name}={state.get(name)}")
        epoch, index = state.get("epoch"), state.get("index")
        if not _count(epoch) or not _count(index):
            raise ValueError(f"state must hold an epoch and an index of at least 0: got {epoch!r} and {index!r}")
        first, over, worker = state.get("first", self._first_before(epoch)), state.get("over", 0), state.get("worker")
        if not _count(first) or first > epoch or not _count(over):
            raise ValueError(f"state must hold first, up to epoch={epoch}, and over: got {first!r} and {over!r}")
        if worker is not None and (len(worker) != 2 or not all(map(_count, worker))):
            raise ValueError(f"state must hold a worker's number and of how many, or None: got worker={worker!r}")
        return Place(first, epoch, index, over, None if worker is None else (worker[0], worker[1]))

    def _meaning(self) -> dict[str, Any]:
        """What must be the same for a position to be the same."""
        count = None if self.sizes is None else len(self.sizes)
        names = ("lanes", "length", "shuffle", "seed")
        known = {"documents": count, "tokens": self.tokens, "sizes": self._digest}
        return {name: getattr(self, name) for name in names} | known

    @cached_property
    def _digest(self) -> str | None:
        """Of all sizes: equal ones lie in the same places."""
        if self.sizes is None:
            return None
        return hashlib.blake2b(np.ascontiguousarray(self.sizes, np.int64).data, digest_size=16).hexdigest()

    def _pack(self, epoch: int) -> Packing:
        return Packing(self._items(epoch), self.lanes, self.length, self.share)

    def _items(self, epoch: int) -> Iterator[tuple[Any, int]]:
        """(document, tokens) in the order of an epoch; of a sequence its number stands for the document."""
        if self.sizes is None:
            return ((document, len(document)) for document in cast(Iterable[Any], self.documents))
        if not self.shuffle:
            return self._ordered(np.arange(len(self.sizes)))
        return self._ordered(
            torch.randperm(len(self.sizes), generator=epoch_generator(self.seed, epoch), device="cpu").numpy()
        )

    def _ordered(self, order: np.ndarray[Any, np.dtype[np.int64]]) -> Iterator[tuple[int, int]]:
        """(number, tokens) of the documents in this order."""
        assert self.sizes is not None
        for i in range(0, len(order), _BLOCK):  # Python's own numbers take several times the room
            some = order[i : i + _BLOCK]
            yield from zip(some.tolist(), self.sizes[some].tolist(), strict=True)

    def _window(self, packing: Packing, epoch: int) -> Window:
        """The window where the packing stands, this rank's lanes."""
        first = packing.index * self.length
        last = min(first + self.length, packing.end)
        shape = last - first, len(self.share)
        inputs = torch.zeros(shape, dtype=torch.int64, device="cpu")
        targets = torch.full(shape, IGNORE, device="cpu")
        resets = torch.zeros(shape, dtype=torch.bool, device="cpu")
        for piece in packing.pieces:
            if piece.document is None:  # opened once, by those who read it
                known = self.sizes is not None
                piece.document = cast(Documents, self.documents)[piece.item] if known else piece.item
            lane = piece.lane - self.share.start
            start, stop = max(piece.start, first), min(piece.stop, last)
            if start >= stop:
                continue
            ids = _ids(piece.document[start - piece.start : stop - piece.start + 1], stop - start + 1)
            inputs[start - first : stop - first, lane] = ids[:-1]
            targets[start - first : stop - first, lane] = ids[1:]
            if start == piece.start:
                resets[start - first, lane] = True
        tokens = int((targets != IGNORE).sum())
        total = sum(min(free, last) - first for free, _ in packing.free if free > first)
        place = epoch, packing.index
        return Window.of(
            inputs, targets, fresh=packing.index == 0, tokens=tokens, resets=resets, total=total, place=place
        )


def _count(value: object) -> TypeGuard[int]:
    return type(value) is int and value >= 0


def _sizes(documents: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Tokens of each document; asked of the sequence if it knows, which saves opening each."""
    known = getattr(documents, "sizes", None)
    return np.fromiter(map(len, documents), np.int64, len(documents)) if known is None else np.asarray(known)


def _ids(values: Any, count: int) -> Tensor:
    """Token ids as int64 `[count]`."""
    if not isinstance(values, Tensor):
        array = np.asarray(values)
        # widened: torch knows no byte order but its own; copied: what lies on a file may be read-only
        values = torch.from_numpy(array.astype(np.int64)) if array.dtype.kind in "iu" else array
    if not isinstance(values, Tensor) or values.dtype not in _INTEGERS or values.shape != (count,):
        raise ValueError(f"documents must be whole numbers [n]: got {values.dtype} {list(values.shape)}, n = {count}")
    if int(values.min()) < 0:
        raise ValueError(f"documents must be token ids of at least 0: got {int(values.min())}")
    return values.to("cpu", torch.int64)


_BLOCK = 1 << 16  # documents whose sizes are looked at together

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
