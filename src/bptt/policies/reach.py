"""The reach of a policy on a sequence of a given length: which losses form a block, and how far back a block reaches.

Steps are counted from 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["EVERYTHING", "Reach"]


@dataclass(frozen=True)
class Reach:
    """The reach of a policy on a sequence of a given length: the data that the block sweep interprets.

    window: steps that each block reaches back from its last step, that step included; `None` is all of them.
    every: losses per block, counted from the first step on; `None` is one block of all losses.
    stops_at_start: a block stops at its own first step, so that blocks never overlap (then window == every).
    """

    window: int | None
    every: int | None
    stops_at_start: bool

    def first(self, block_first: int, block_last: int) -> int:
        """The earliest step that a block [block_first, block_last] reaches (0-based, inclusive)."""
        if self.stops_at_start:
            return block_first
        return 0 if self.window is None else max(0, block_last - self.window + 1)

    @property
    def overlaps(self) -> bool:
        """Whether several blocks may reach the same step, where each of them has an adjoint of its own."""
        return self.every is not None and not self.stops_at_start

    def within(self, T: int) -> Reach:
        """The same reach on sequences of at most T steps: a window that covers all of them is `EVERYTHING`.

        >>> Reach(20, 5, stops_at_start=False).within(20) == EVERYTHING
        True
        """
        return self if self.window is None or self.window < T else EVERYTHING

    def where_whole(self, T: int, lengths: torch.Tensor | None = None) -> Reach:
        """The same reach on sequences of T steps, or of these lengths `[B]`: whole blocks that reach back as far as
        they are long do not overlap.

        >>> Reach(4, 4, stops_at_start=False).where_whole(12)
        Reach(window=4, every=4, stops_at_start=True)
        """
        if self.every is None or self.window != self.every:
            return self
        whole = T % self.every == 0 if lengths is None else not (lengths % self.every).any()
        return replace(self, stops_at_start=True) if whole else self

    def crosses(self, t: int) -> bool:
        """Whether one of the blocks walks over the edge between the steps t-1 and t, where they do not overlap."""
        return self.every is None or t % self.every != 0

    def on(self, a: int, b: int) -> Reach | None:
        """The reach of the same blocks, which do not overlap, on the steps a to b-1 alone; None where there is none:
        the part begins within one block and ends in another.

        >>> chunks = Reach(4, 4, stops_at_start=True)
        >>> chunks.on(8, 18) == chunks, chunks.on(9, 12) == EVERYTHING, chunks.on(9, 13)
        (True, True, None)
        """
        if self.every is None or a // self.every == (b - 1) // self.every:
            return EVERYTHING
        return None if self.crosses(a) else self

    def segment_starts(self, T: int, steps: int) -> tuple[int, ...]:
        """Where segments of about so many steps begin, for whatever runs in segments, and T.

        Of blocks that do not overlap a segment has some whole ones, or is a part of one. Where they do, it begins
        anywhere.

        >>> Reach(4, 4, stops_at_start=True).segment_starts(10, 3), EVERYTHING.segment_starts(10, 4)
        ((0, 3, 4, 7, 8, 10), (0, 4, 8, 10))
        """
        block = T if self.every is None or self.overlaps else self.every
        if block <= steps:
            return (*range(0, T, steps // block * block), T)
        return (*[a for c in range(0, T, block) for a in range(c, min(c + block, T), steps)], T)

    def blocks(self, T: int) -> list[tuple[int, int, int]]:
        """The blocks of a sequence of T steps as (earliest step reached, first loss, last loss), in order.

        >>> Reach(3, 2, stops_at_start=False).blocks(5)
        [(0, 0, 1), (1, 2, 3), (2, 4, 4)]
        >>> Reach(2, 2, stops_at_start=True).blocks(5)
        [(0, 0, 1), (2, 2, 3), (4, 4, 4)]
        """
        every = T if self.every is None else self.every
        spans = [(a, min(a + every, T) - 1) for a in range(0, T, max(every, 1))]
        return [(self.first(a, b), a, b) for a, b in spans]


EVERYTHING = Reach(None, None, stops_at_start=False)
"""The reach of one block of all losses, back to the first step."""
