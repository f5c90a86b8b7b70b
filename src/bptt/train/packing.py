"""Where documents of any lengths lie in B lanes: worked out from the lengths alone, window by window.

Each document, in order, goes to the lane that is free first (of several, the one with the lowest number). One of n
tokens takes n - 1 steps; one of fewer than 2 takes none and is passed over.
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .window import Window

__all__ = ["PackedEpochs", "Packing", "Piece"]


@dataclass
class Piece:
    """A document in a lane: its predictions are those of steps start up to stop, counted from the epoch's first.

    item: the document or its number. document: what can be sliced, None until it is first needed.
    """

    item: Any
    lane: int
    start: int
    stop: int
    document: Any = None


class Packing:
    """Where the documents of an epoch lie, window by window.

    items: (document or its number, tokens), in order. share: the lanes whose pieces are kept.
    index: the window it stands at. pieces: those that reach into that window or lie after it. free: a heap of
    (the step from which a lane is free, lane).
    """

    def __init__(self, items: Iterator[tuple[Any, int]], lanes: int, length: int, share: range) -> None:
        self.items, self.length, self.share = items, length, share
        self.free = [(0, lane) for lane in range(lanes)]  # equal steps, lanes in order: a heap
        self.index = 0
        self.pieces: list[Piece] = []

    @property
    def end(self) -> int:
        """The step after the last that is taken; final once a window has a lane that is free."""
        return max(self.free)[0]

    def seek(self, index: int | None) -> bool:
        """Go on to a window, or to the end (None). False where there is no such window."""
        first = None if index is None else index * self.length
        while first is None or self.free[0][0] < first + self.length:
            item = next(self.items, None)
            if item is None:
                break
            document, size = item
            if size < 2:
                continue
            start, lane = self.free[0]
            heapq.heapreplace(self.free, (start + size - 1, lane))
            if first is not None and lane in self.share and start + size - 1 > first:
                self.pieces.append(Piece(document, lane, start, start + size - 1))
        if index is None or first is None:
            return False
        self.index = index
        self.pieces = [piece for piece in self.pieces if piece.stop > first]
        return self.end > first


class PackedEpochs(ABC):
    """Windows over epochs of which each has its own packing; asked for in order they cost only their own reading."""

    length: int
    _at: tuple[int, Packing] | None = None
    _counted: tuple[int, int] | None = None

    @abstractmethod
    def _pack(self, epoch: int) -> Packing:
        """The packing of an epoch, at its first window."""

    @abstractmethod
    def _window(self, packing: Packing, epoch: int) -> Window:
        """The window where the packing stands."""

    def windows(self, epoch: int) -> int:
        """Windows of an epoch (from 0)."""
        if self._counted is None or self._counted[0] != epoch:
            packing = self._pack(epoch)
            packing.seek(None)
            self._counted = epoch, -(-packing.end // self.length)
        return self._counted[1]

    def window(self, epoch: int, index: int) -> Window:
        """One window. Raises IndexError past the last. Windows asked for in order cost only their own reading."""
        if self._at is None or self._at[0] != epoch or self._at[1].index > index:
            self._at = epoch, self._pack(epoch)
        packing = self._at[1]
        if index < 0 or not packing.seek(index):
            raise IndexError(f"epoch {epoch} has no window {index}")
        return self._window(packing, epoch)

    def __getstate__(self) -> dict[str, Any]:
        """What a worker is sent: not where `window` stands, since a stream in use cannot be sent."""
        return self.__dict__ | {"_at": None}
