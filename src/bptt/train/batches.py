"""How a text becomes windows `[T, B]`: contiguous lanes with a carried state, or random windows with a fresh one.

Legend: N tokens, T steps per window, B lanes. A text of N tokens holds N - 1 predictions: token i+1 from token i.
Windows are found by (epoch, index) alone, so that a run resumes at any of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from .window import IGNORE, Window

__all__ = ["Batch", "Batches", "RandomWindows", "Sequential", "epoch_generator"]


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """The generator of what is drawn for one epoch: it depends on (seed, epoch) alone."""
    return torch.Generator("cpu").manual_seed((seed * 1_000_003 + epoch) % 2**63)


class Batch(Protocol):
    """What is read at once, such as a `Window`: several lanes, whose predictions are counted."""

    @property
    def fresh(self) -> bool:
        """Whether the state before the first step is zero rather than the last batch's."""
        ...

    @property
    def tokens(self) -> int:
        """Predictions that count, in these lanes."""
        ...

    @property
    def total(self) -> int:
        """Predictions that count on all processes together."""
        ...

    @property
    def lanes(self) -> int:
        """How many lanes there are."""
        ...

    def part(self, lanes: slice) -> Batch:
        """Some of the lanes, with the `total` of all. No lanes: the first one, where nothing counts."""
        ...


class Batches(Protocol):
    """Windows, or other batches, by (epoch, index)."""

    @property
    def full(self) -> int:
        """Predictions of the largest batch: what a step's summed loss is divided by."""
        ...

    def windows(self, epoch: int) -> int:
        """Windows of an epoch (from 0)."""
        ...

    def window(self, epoch: int, index: int) -> Batch:
        """One of them."""
        ...


class Sequential:
    """B contiguous lanes, read T steps at a time; the state is carried from window to window.

    The N - 1 predictions are dealt to the lanes in order, so that lane lengths differ by at most one: each token but
    the text's first is predicted exactly once an epoch. The last window is shorter, and in its last step the
    shorter lanes have no target. Every epoch begins with a fresh state.

    ids: int64 `[N]`, N - 1 >= lanes. length: T. lanes: B.

    >>> s = Sequential(torch.arange(8), length=2, lanes=2)
    >>> [s.window(0, i).targets.T.tolist() for i in range(s.windows(0))]
    [[[1, 2], [5, 6]], [[3, 4], [7, -100]]]
    """

    def __init__(self, ids: Tensor, length: int, lanes: int) -> None:
        predictions = len(ids) - 1
        if predictions < lanes:
            raise ValueError(f"ids must hold at least {lanes + 1} tokens for {lanes} lanes: got {len(ids)}")
        shortest, longer = divmod(predictions, lanes)
        lane = torch.arange(lanes, device="cpu")
        self.ids, self.length, self.lanes = ids, length, lanes
        self.first = lane * shortest + lane.clamp(max=longer)  # [B]: where each lane starts in the text
        self.size = shortest + (lane < longer).long()  # [B]: its predictions
        self.longest = int(self.size[0])

    @property
    def full(self) -> int:
        return int(self.size.clamp(max=self.length).sum())

    def windows(self, epoch: int) -> int:
        return -(-self.longest // self.length)

    def window(self, epoch: int, index: int) -> Window:
        step = torch.arange(index * self.length, min((index + 1) * self.length, self.longest), device="cpu")[:, None]
        counts = step < self.size
        position = (self.first + step).clamp(max=len(self.ids) - 2)
        targets = torch.where(counts, self.ids[position + 1], IGNORE)
        return Window.of(self.ids[position], targets, fresh=index == 0, tokens=int(counts.sum()))

    def __iter__(self) -> Iterator[Window]:
        """The windows of one epoch."""
        return (self.window(0, index) for index in range(self.windows(0)))


class RandomWindows:
    """Windows of T steps in random order, B at a time, each with a fresh state.

    An epoch draws an offset in [0, T) and cuts the rest into whole windows: no window repeats within an epoch; the
    tokens before the offset and after the last whole window (fewer than T each) wait for another epoch. The
    last batch may have fewer lanes. Order and offset depend on (seed, epoch) alone.

    ids: int64 `[N]`, N >= 2 T. length: T. lanes: B.
    """

    def __init__(self, ids: Tensor, length: int, lanes: int, seed: int) -> None:
        if len(ids) < 2 * length:  # the largest offset, T - 1, must leave one window and its last target
            raise ValueError(f"ids must hold at least {2 * length} tokens for windows of {length}: got {len(ids)}")
        self.ids, self.length, self.lanes, self.seed = ids, length, lanes, seed
        self._drawn: tuple[int, Tensor] | None = None

    @property
    def full(self) -> int:
        return min(self.lanes, (len(self.ids) - 1) // self.length) * self.length

    def windows(self, epoch: int) -> int:
        return -(-len(self._starts(epoch)) // self.lanes)

    def window(self, epoch: int, index: int) -> Window:
        start = self._starts(epoch)[index * self.lanes : (index + 1) * self.lanes]
        position = start + torch.arange(self.length, device="cpu")[:, None]
        return Window.of(self.ids[position], self.ids[position + 1], fresh=True, tokens=position.numel())

    def _starts(self, epoch: int) -> Tensor:
        """Where the windows of an epoch start, in the order they are used."""
        if self._drawn is None or self._drawn[0] != epoch:
            generator = epoch_generator(self.seed, epoch)
            offset = int(torch.randint(self.length, (), generator=generator, device="cpu"))
            count = (len(self.ids) - 1 - offset) // self.length
            self._drawn = epoch, offset + self.length * torch.randperm(count, generator=generator, device="cpu")
        return self._drawn[1]
