"""The network that classifies sequences, and the batches that it reads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence, pad_sequence

from ..batches import epoch_generator
from ..model import Network
from ..options import POOLS
from ..recurrence import recurrent_layers
from ..window import IGNORE

__all__ = ["Classifier", "Labelled", "Part", "Shuffled"]


class Classifier(Network):
    """o = V dropout(s) + c over C classes, s the last state of the top layer, or the mean of its states over all steps.

    inputs: at a step. classes: C. pool: "last" or "mean". bidirectional: the last state of each direction counts, of
    the reverse one that at the first step. options: those of `recurrent_layers`.
    """

    def __init__(
        self,
        inputs: int,
        classes: int,
        *,
        cell: str,
        hidden: int,
        pool: str,
        dropout: float,
        bidirectional: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        if pool not in POOLS:
            raise ValueError(f"pool must be one of {', '.join(POOLS)}: got {pool!r}")
        self.pool = pool
        self.bidirectional, width = bidirectional, hidden * (2 if bidirectional else 1)
        self.recurrent = recurrent_layers(cell, inputs, hidden, dropout=dropout, bidirectional=bidirectional, **options)
        self.dropout = torch.nn.Dropout(dropout)
        self.output = torch.nn.Linear(width, classes)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, None]:
        """Logits `[B, C]`, and no state to carry on; from sequences `[T, B, inputs]` of `lengths` int64 `[B]`."""
        lengths = lengths.cpu()
        uneven = bool((lengths != len(x)).any())
        given = pack_padded_sequence(x, lengths, enforce_sorted=False) if uneven else x
        y, _ = self.recurrent(given)
        if isinstance(y, PackedSequence):
            y, _ = pad_packed_sequence(y)
        if self.pool == "mean":
            pooled = y.sum(0) / lengths.to(y)[:, None]
        else:
            pooled = y[lengths.to(y.device) - 1, torch.arange(y.shape[1], device=y.device)] if uneven else y[-1]
            if self.bidirectional:
                forward, _ = pooled.chunk(2, dim=1)
                pooled = torch.cat([forward, y[0].chunk(2, dim=1)[1]], dim=1)
        return self.output(self.dropout(pooled)), None


@dataclass(frozen=True, eq=False)
class Labelled:
    """A batch of B whole sequences.

    x: `[T, B, inputs]`, zero after the end of each. lengths: int64 `[B]`. labels: int64 `[B]`, `IGNORE` where none
    counts. total: labels that count on all processes together.
    """

    x: Tensor
    lengths: Tensor
    labels: Tensor
    total: int

    fresh = True  # a sequence begins with no state

    @property
    def tokens(self) -> int:
        """Labels that count."""
        return int((self.labels != IGNORE).sum())

    @property
    def lanes(self) -> int:
        """B."""
        return len(self.lengths)

    def part(self, lanes: slice) -> Labelled:
        """Some of the sequences, with the `total` of all. None of them: the first one, whose label does not count."""
        if lanes.start == lanes.stop:
            return replace(self.part(slice(0, 1)), labels=torch.full_like(self.labels[:1], IGNORE))
        lengths = self.lengths[lanes]
        return replace(self, x=self.x[: int(lengths.max()), lanes], lengths=lengths, labels=self.labels[lanes])

    def first(self, steps: int) -> Labelled:
        """The first steps of each sequence."""
        return replace(self, x=self.x[:steps], lengths=self.lengths.clamp(max=steps))


@dataclass(frozen=True, eq=False)
class Part:
    """N sequences as the network reads them.

    x: `[sum of lengths, inputs]`. starts: int64 `[N + 1]`. labels: int64 `[N]`, `IGNORE` where there is none.
    """

    x: Tensor
    starts: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> Tensor:
        """Steps of each."""
        return self.starts.diff()

    def batch(self, indices: Tensor) -> Labelled:
        """Some of them, side by side."""
        ends = [(int(self.starts[i]), int(self.starts[i + 1])) for i in indices]
        labels = self.labels[indices]
        padded = pad_sequence([self.x[start:stop] for start, stop in ends])
        return Labelled(padded, self.lengths[indices], labels, int((labels != IGNORE).sum()))


class Shuffled:
    """The sequences of a part, B at a time, each once an epoch.

    seed: of the order, which is another one every epoch and depends on (seed, epoch) alone; None: as they stand.

    >>> part = Part(torch.arange(6.0)[:, None], torch.tensor([0, 1, 3, 6]), torch.tensor([0, 1, 0]))
    >>> [b.lengths.tolist() for b in map(lambda i: Shuffled(part, 2, None).window(0, i), range(2))]
    [[1, 2], [3]]
    """

    def __init__(self, part: Part, size: int, seed: int | None) -> None:
        self.part, self.size, self.seed = part, size, seed
        self._drawn: tuple[int, Tensor] | None = None

    @property
    def full(self) -> int:
        return min(self.size, len(self.part))

    def windows(self, epoch: int) -> int:
        return -(-len(self.part) // self.size)

    def window(self, epoch: int, index: int) -> Labelled:
        """A batch; the last one of an epoch may be smaller."""
        return self.part.batch(self._order(epoch)[index * self.size : (index + 1) * self.size])

    def _order(self, epoch: int) -> Tensor:
        if self.seed is None:
            return torch.arange(len(self.part), device="cpu")
        if self._drawn is None or self._drawn[0] != epoch:
            generator = epoch_generator(self.seed, epoch)
            self._drawn = epoch, torch.randperm(len(self.part), generator=generator, device="cpu")
        return self._drawn[1]
