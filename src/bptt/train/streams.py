"""How streams of numbers lie in lanes, window by window: the state is carried along a stream, reset at its start."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from .batches import epoch_generator
from .packing import PackedEpochs, Packing
from .window import Window

__all__ = ["Stream", "Streams"]

Stream = tuple[Tensor, Tensor]
"""Inputs `[n, I]` and targets `[n, K]`, NaN where there is none."""

_Place = tuple[int, int, int]


class Streams(PackedEpochs):
    """Windows `[T, B, ...]` over streams of any lengths, each step once an epoch.

    streams: at least one, each of at least one step. lanes: B, fewer where there are fewer pieces. length: T.
    seed: to train on: where there are fewer streams than lanes they are cut into pieces of at least T steps, so that
    the lanes are full; where the cuts lie and the order of the pieces follow from (seed, epoch) alone. None: whole, in
    their order.

    >>> x = torch.arange(5.0)[:, None]
    >>> [w.inputs[:, :, 0].tolist() for w in (Streams([(x, x)], 1, 3).window(0, i) for i in range(2))]
    [[[0.0], [1.0], [2.0]], [[3.0], [4.0]]]
    """

    def __init__(self, streams: list[Stream], lanes: int, length: int, seed: int | None = None) -> None:
        self.streams, self.length, self.seed = streams, length, seed
        self.steps = sum(len(x) for x, _ in streams)
        self.longest = max(length, -(-self.steps // lanes)) if seed is not None else self.steps
        self.lanes = min(lanes, len(self._pieces(0)))

    @property
    def full(self) -> int:
        return min(self.lanes * self.length, self.steps) * self.streams[0][1].shape[1]

    def _window(self, packing: Packing, epoch: int) -> Window:
        index = packing.index
        first = index * self.length
        last = min(first + self.length, packing.end)
        x, y = self.streams[0]
        inputs = torch.zeros(last - first, self.lanes, x.shape[1], dtype=x.dtype, device="cpu")
        targets = torch.full((last - first, self.lanes, y.shape[1]), math.nan, dtype=y.dtype, device="cpu")
        resets = torch.zeros(last - first, self.lanes, dtype=torch.bool, device="cpu")
        for piece in packing.pieces:
            start, stop = max(piece.start, first), min(piece.stop, last)
            if start >= stop:
                continue
            number, begin, _ = piece.item
            x, y = self.streams[number]
            at = slice(begin + start - piece.start, begin + stop - piece.start)
            inputs[start - first : stop - first, piece.lane] = x[at]
            targets[start - first : stop - first, piece.lane] = y[at]
            resets[start - first, piece.lane] = start == piece.start
        tokens = int((~targets.isnan()).sum())
        return Window.of(inputs, targets, fresh=index == 0, tokens=tokens, resets=resets, place=(epoch, index))

    def _pieces(self, epoch: int) -> list[_Place]:
        """(stream, first step, step after the last) of every piece, in order."""
        if self.seed is None:
            return [(i, 0, len(x)) for i, (x, _) in enumerate(self.streams)]
        generator = epoch_generator(self.seed, epoch)
        found: list[_Place] = []
        for i, (x, _) in enumerate(self.streams):
            begin = 0
            if len(x) > self.longest and epoch:  # other cuts than in the epochs before
                begin = int(torch.randint(self.longest, (), generator=generator, device="cpu"))
            cuts = sorted({0, *range(begin, len(x), self.longest), len(x)})
            found += [(i, a, b) for a, b in pairwise(cuts)]
        order = torch.randperm(len(found), generator=generator, device="cpu").tolist()
        return [found[k] for k in order]

    def _pack(self, epoch: int) -> Packing:
        items: Iterator[tuple[_Place, int]] = ((p, p[2] - p[1] + 1) for p in self._pieces(epoch))
        return Packing(items, self.lanes, self.length, range(self.lanes))
