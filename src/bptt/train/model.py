"""The network: embedding or one-hot, recurrent layers, linear output; and the baseline it must beat."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from ..policies import Policy
from .carried import State
from .recurrence import recurrent_layers

__all__ = ["LanguageModel", "Network", "unigram_perplexity"]


class Network(torch.nn.Module):
    """What a task trains: called with its `arguments`, it returns (predictions, the state after the last step).

    recurrent: its recurrent layers, from `recurrent_layers`.
    """

    recurrent: Any


class LanguageModel(Network):
    """o_t = V dropout(h_t) + c, with h_t from recurrent layers over an embedding (or the one-hot code) of token t.

    size: tokens in the vocabulary. cell: as for `recurrent_layers`. nonlinearity: of the rnn cell; None: tanh.
    embedding: its size; 0 feeds one-hot vectors.
    dropout: probability of zeroing an entry of the embedding, between layers, and before the output.
    gradient, memory, kernel: the recurrent layer's.
    """

    def __init__(
        self,
        size: int,
        *,
        cell: str = "lstm",
        nonlinearity: str | None = None,
        layers: int = 1,
        hidden: int = 256,
        embedding: int = 0,
        dropout: float = 0.0,
        gradient: str | Policy = "full",
        memory: str = "auto",
        kernel: str = "auto",
    ) -> None:
        super().__init__()
        self.size = size
        self.embedding = torch.nn.Embedding(size, embedding) if embedding else None
        self.dropout = torch.nn.Dropout(dropout)
        self.recurrent = recurrent_layers(
            cell,
            embedding or size,
            hidden,
            nonlinearity=nonlinearity,
            layers=layers,
            dropout=dropout,
            gradient=gradient,
            memory=memory,
            kernel=kernel,
        )
        self.output = torch.nn.Linear(hidden, size)

    def forward(self, ids: Tensor, state: State = None, resets: Tensor | None = None) -> tuple[Tensor, State]:
        """Logits `[T, B, V]` and the final state, from tokens int64 `[T, B]` and an initial state (zero if None).

        resets: bool `[T, B]`, where the state is zeroed before a step: at the starts of documents.
        """
        if self.embedding is None:
            x = one_hot(ids, self.size).to(self.output.weight.dtype)
        else:
            x = self.dropout(self.embedding(ids))
        given = {} if resets is None else {"resets": resets}
        y, state = self.recurrent(x, state, **given)
        return self.output(self.dropout(y)), state


def unigram_perplexity(counts: Sequence[int], predicted: Iterable[Tensor]) -> float:
    """Perplexity of guessing every token by its frequency in the training text, add-one smoothed.

    p(v) = (count_v + 1) / (sum of counts + V).  predicted: the ids of the tokens that a model predicts, in pieces.

    >>> round(unigram_perplexity([0, 3, 2, 1], [torch.tensor([1, 2])]), 6)  # sqrt(10/4 * 10/3)
    2.886751
    """
    frequency = torch.tensor(counts, dtype=torch.float64, device="cpu") + 1
    nll = (frequency.sum() / frequency).log()
    total, tokens = 0.0, 0
    for ids in predicted:
        total, tokens = total + float(nll[ids].sum()), tokens + len(ids)
    return math.exp(total / tokens)
