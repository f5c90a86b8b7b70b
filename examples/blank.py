"""Fill in the blank: a name is read once, other words follow, and at the end the name is asked for.

    John had entered the room ... hi to ___

The one word that matters lies `distance` steps before the blank. Every other word is drawn at random, so nothing else
tells the name: a net that has not kept it guesses right one time in eight.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bptt.train import LanguageModel

NAMES = ("John", "Jane", "Mary", "Paul", "Anna", "Carl", "Ruth", "Hugh")
WORDS = ("had", "entered", "the", "room", "and", "said", "hi", "to")
BLANK = len(NAMES) + len(WORDS)
VOCABULARY = (*NAMES, *WORDS, "___")
CHANCE = 1 / len(NAMES)
RECALLED = 0.9  # mean accuracy from which a name counts as recalled

LANES = 32
HIDDEN = 64
LEARNING_RATE = 0.003
CLIP = 1.0
SETTINGS = {
    "names": len(NAMES),
    "words": len(WORDS),
    "lanes": LANES,
    "hidden": HIDDEN,
    "optimiser": "adam",
    "learning_rate": LEARNING_RATE,
    "clip": CLIP,
}


def sentences(distance: int, lanes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens int64 `[distance + 1, lanes]`, the name first and the blank last, and the names int64 `[lanes]`."""
    tokens = torch.randint(len(NAMES), BLANK, (distance + 1, lanes), generator=generator)
    names = torch.randint(len(NAMES), (lanes,), generator=generator)
    tokens[0], tokens[-1] = names, BLANK
    return tokens, names


def network(cell: str, gradient: str = "full", hidden: int = HIDDEN) -> LanguageModel:
    """Embedding, one recurrent layer, linear output over the vocabulary."""
    return LanguageModel(len(VOCABULARY), cell=cell, hidden=hidden, embedding=16, gradient=gradient)


def train(model: LanguageModel, distance: int, steps: int, seed: int) -> Iterator[int]:
    """Adam on fresh sentences; the loss is that of the blank alone. Yields the number of steps taken so far."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    for step in range(1, steps + 1):
        tokens, names = sentences(distance, LANES, generator)
        logits, _ = model(tokens)
        optimiser.zero_grad()
        cross_entropy(logits[-1], names).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimiser.step()
        yield step


@torch.no_grad()
def accuracy(model: LanguageModel, distance: int, lanes: int = 1000) -> float:
    """The fraction of names recalled in sentences that training has not drawn."""
    tokens, names = sentences(distance, lanes, torch.Generator().manual_seed(2**40))
    logits, _ = model(tokens)
    return float((logits[-1].argmax(-1) == names).double().mean())


def recalled_up_to(rows: Sequence[dict[str, Any]]) -> int:
    """The distance up to which all names were recalled, in the mean over the rows of a distance; 0 for none.

    >>> recalled_up_to([{"distance": 4, "accuracy": 1.0}, {"distance": 8, "accuracy": 0.2}])
    4
    """
    found = 0
    for distance in sorted({row["distance"] for row in rows}):
        if statistics.fmean(row["accuracy"] for row in rows if row["distance"] == distance) < RECALLED:
            break
        found = distance
    return found
