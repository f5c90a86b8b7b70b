"""What a policy asks for on a sequence of a given length: which losses form a block, and how far each block walks back.

Steps are counted from 0.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["EVERYTHING", "Reach"]


@dataclass(frozen=True)
class Reach:
    """What a policy asks for on a sequence of a given length: the data the block sweep interprets.

    window: steps each block walks back from its last step, that step included; `None` is all of them.
    every: losses per block, blocks counted from the first step; `None` is one block of all losses.
    stops_at_start: the walk stops at the block's own first step, so that blocks never overlap (then window == every).
    """

    window: int | None
    every: int | None
    stops_at_start: bool

    def first(self, block_first: int, block_last: int) -> int:
        """The earliest step the walk of a block [block_first, block_last] visits (0-based, inclusive)."""
        if self.stops_at_start:
            return block_first
        return 0 if self.window is None else max(0, block_last - self.window + 1)

    @property
    def overlaps(self) -> bool:
        """Whether a step may lie in the walks of several blocks, each of which has an adjoint of its own there."""
        return self.every is not None and not self.stops_at_start

    def within(self, T: int) -> Reach:
        """The same on sequences of at most T steps: a window that has all of them is everything.

        >>> Reach(20, 5, stops_at_start=False).within(20) == EVERYTHING
        True
        """
        return self if self.window is None or self.window < T else EVERYTHING

    def blocks(self, T: int) -> list[tuple[int, int, int]]:
        """Blocks of a sequence of T steps as (earliest step walked to, first loss, last loss), in order.

        >>> Reach(3, 2, stops_at_start=False).blocks(5)
        [(0, 0, 1), (1, 2, 3), (2, 4, 4)]
        >>> Reach(2, 2, stops_at_start=True).blocks(5)
        [(0, 0, 1), (2, 2, 3), (4, 4, 4)]
        """
        every = T if self.every is None else self.every
        spans = [(a, min(a + every, T) - 1) for a in range(0, T, max(every, 1))]
        return [(self.first(a, b), a, b) for a, b in spans]


EVERYTHING = Reach(None, None, stops_at_start=False)
"""One block of all losses, which walks back to the first step."""
