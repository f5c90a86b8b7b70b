"""One iteration over windows: where it stands, and how it goes on from there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch.utils.data import get_worker_info

from .packing import Packing
from .window import Window

__all__ = ["Place", "Reading"]


@dataclass(frozen=True)
class Place:
    """Where an iteration stands.

    first: the epoch it began with. epoch, index: of the window that is next. over: how many windows there are from that
    one to this worker's own, which other workers make. worker: (number, of how many), of a DataLoader with several
    workers, each of which has a place of its own; None: the place of all windows.
    """

    first: int
    epoch: int
    index: int = 0
    over: int = 0
    worker: tuple[int, int] | None = None

    def here(self) -> Place:
        """Of the worker that this runs in, where it is of all windows. Raises ValueError where it is another's."""
        found = get_worker_info()
        mine = None if found is None or found.num_workers == 1 else (found.id, found.num_workers)
        if self.worker == mine:
            return self
        if self.worker is None:
            assert mine is not None
            return replace(self, over=mine[0], worker=mine)
        where = "where there are no several workers" if mine is None else "worker {} of {}".format(*mine)
        raise ValueError("state must go to the worker it is of, {} of {}: got {}".format(*self.worker, where))

    def after(self, index: int) -> Place:
        """The place after this worker's window of the same epoch."""
        return replace(self, index=index + 1, over=0 if self.worker is None else self.worker[1] - 1)


class Source(Protocol):
    """What is read: windows by their packing, and places as they are saved."""

    epochs: int | None
    length: int

    def _pack(self, epoch: int) -> Packing: ...

    def _window(self, packing: Packing, epoch: int) -> Window: ...

    def _written(self, place: Place) -> dict[str, Any]: ...

    def _read(self, state: dict[str, Any]) -> Place: ...


class Reading(Iterator[Window]):
    """The windows from a place on that are this worker's."""

    def __init__(self, source: Source, place: Place) -> None:
        self.source, self.place = source, place
        self._packing: Packing | None = None

    def __next__(self) -> Window:
        source = self.source
        while source.epochs is None or self.place.epoch < self.place.first + source.epochs:
            place, packing = self.place, self._packing or source._pack(self.place.epoch)
            self._packing = packing
            index = place.index + place.over
            if packing.seek(index):
                window = source._window(packing, place.epoch)
                self.place = place.after(index)
                return window
            if packing.end == 0:
                raise ValueError("documents must yield one of at least 2 tokens: got none in a whole pass")
            left = max(0, -(-packing.end // source.length) - place.index)
            self.place, self._packing = replace(place, epoch=place.epoch + 1, index=0, over=place.over - left), None
        raise StopIteration

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on after the windows that were read."""
        return self.source._written(self.place)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where a state was taken. Raises ValueError for one of other documents, lanes or workers."""
        self.place, self._packing = self.source._read(state).here(), None
