"""Text from a trained model, one token at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from .carried import State
from .corpus import PREPROCESSORS
from .drawing import check_drawing
from .errors import InputError
from .model import LanguageModel
from .vocabulary import UNKNOWN, Vocabulary, tokenize

__all__ = ["generate", "read_prompt"]


def read_prompt(prompt: str, vocabulary: Vocabulary, preprocess: str) -> Sequence[int]:
    """Token numbers of a prompt, treated as the training text was.

    A token the vocabulary lacks becomes <unk> if training knew <unk>; else InputError names it.
    """
    tokens = tokenize(PREPROCESSORS[preprocess](prompt), vocabulary.level)
    if not vocabulary.counts[0] and (unknown := vocabulary.unknown(tokens)):
        raise InputError(f"prompt holds what the training text did not: {', '.join(map(repr, unknown))}")
    ids: list[int] = vocabulary.encode(tokens).tolist()
    return ids


def generate(
    model: LanguageModel,
    vocabulary: Vocabulary,
    prompt: Sequence[int],
    length: int,
    *,
    temperature: float = 1.0,
    seed: int = 0,
) -> Iterator[int]:
    """`length` tokens after the prompt, each drawn from softmax(logits / temperature) given all before it.

    temperature: 0 takes the likeliest token. An empty prompt is continued from a first token drawn by frequency.
    <unk> is never drawn.
    Raises ValueError for a negative length, a temperature that is negative or not finite, a seed that no run can have.
    """
    check_drawing(length, temperature, seed)
    generator = torch.Generator("cpu").manual_seed(seed)
    return _draw(model, vocabulary, prompt, length, temperature, generator)


def _draw(
    model: LanguageModel,
    vocabulary: Vocabulary,
    prompt: Sequence[int],
    length: int,
    temperature: float,
    generator: torch.Generator,
) -> Iterator[int]:
    device = model.output.weight.device
    unknown = vocabulary.index[UNKNOWN]
    logits = torch.tensor(vocabulary.counts, dtype=torch.float64, device="cpu").log()
    state: State = None
    feed = list(prompt)
    for _ in range(length):
        if feed:
            with torch.no_grad():
                output, state = model(torch.tensor(feed, device=device)[:, None], state)
            logits = output[-1, 0].double().cpu()
        logits[unknown] = -math.inf
        if temperature == 0:
            token = int(logits.argmax())
        else:
            scaled = (logits - logits.max()) / temperature  # at most 0, so that a tiny temperature cannot overflow
            token = int(torch.multinomial(scaled.softmax(0), 1, generator=generator))
        yield token
        feed = [token]
