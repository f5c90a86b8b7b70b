"""What the trainings share: a model, its data, and what a row of the table is."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

T, B, I, H = 100, 16, 16, 64
"""Steps, sequences of a batch, features and units of the generic trainings."""

PIECE = 25
"""Steps of a piece where a training is truncated."""


@dataclass(frozen=True)
class Row:
    """A training, or an inference, that is run twice: with torch's layers and with ours.

    name: of the framework and the layer. package: the distribution whose version is told, and whose modules `needs`
    must be there. what: what is run, in words. losses: given whether the layers are ours, and how many updates; the
    loss of every update, or the outputs of an inference.
    """

    name: str
    package: str
    needs: tuple[str, ...]
    what: str
    losses: Callable[[bool, int], list[float]]


class Tagger(nn.Module):
    """A layer and what reads its outputs at all steps."""

    def __init__(self, cell: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn = getattr(nn, cell)(I, H, batch_first=True)
        self.head = nn.Linear(H, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    """Noise `[B, T, I]`, and the running mean of its first feature `[B, T, 1]`, which takes memory to tell."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(count):
        x = torch.randn(B, T, I, generator=generator)
        made.append((x, x[..., :1].cumsum(1) / torch.arange(1, T + 1)[:, None]))
    return made


def samples(count: int) -> torch.utils.data.TensorDataset:
    """The same as a data set of single sequences, in the order of the batches."""
    x, y = zip(*batches(count), strict=True)
    return torch.utils.data.TensorDataset(torch.cat(x), torch.cat(y))


@contextmanager
def folder() -> Iterator[str]:
    """A folder for what a framework leaves."""
    with tempfile.TemporaryDirectory() as path:
        yield path
