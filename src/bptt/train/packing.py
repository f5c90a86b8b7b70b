"""Where documents of any lengths lie in B lanes: worked out from the lengths alone, window by window.

Each document, in order, goes to the lane that is free first (of several, the one with the lowest number). One of n
tokens takes n - 1 steps; one of fewer than 2 takes none and is passed over.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["Packing", "Piece"]


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
