"""Text to numbers and back: characters or words, with an entry for the unknown."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from .errors import InputError

__all__ = ["UNKNOWN", "Level", "Vocabulary", "tokenize"]

Level = Literal["char", "word"]

UNKNOWN = "<unk>"


def tokenize(text: str, level: str) -> Sequence[str]:
    """The tokens of a text: its characters, or what white space separates.

    >>> tokenize("so it is", "word")
    ['so', 'it', 'is']
    """
    return text if level == "char" else text.split()


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by index; index 0 is the unknown.

    level: "char" or "word". tokens: V strings, tokens[0] the unknown. counts: how often each occurs in the training
    split.

    >>> v = Vocabulary.build("abacab", "char")
    >>> v.tokens, v.counts
    (('<unk>', 'a', 'b', 'c'), (0, 3, 2, 1))
    >>> v.encode("cabx").tolist(), v.decode([3, 1, 2])
    ([3, 1, 2, 0], 'cab')
    """

    level: str
    tokens: tuple[str, ...]
    counts: tuple[int, ...]

    @classmethod
    def build(cls, tokens: Iterable[str], level: str, min_count: int = 1) -> Vocabulary:
        """The tokens seen at least `min_count` times, most frequent first; the others count as unknown."""
        return cls.counted(Counter(tokens), level, min_count)

    @classmethod
    def counted(cls, counts: Counter[str], level: str, min_count: int = 1) -> Vocabulary:
        """The same from the number of times that each token was seen."""
        counted = Counter(counts)
        unknown = counted.pop(UNKNOWN, 0) + sum(n for n in counted.values() if n < min_count)
        kept = sorted(((t, n) for t, n in counted.items() if n >= min_count), key=lambda item: (-item[1], item[0]))
        return cls(level, (UNKNOWN, *(t for t, _ in kept)), (unknown, *(n for _, n in kept)))

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def index(self) -> dict[str, int]:
        """The number of each token."""
        return {token: i for i, token in enumerate(self.tokens)}

    @cached_property
    def _of_characters(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The number of each character by its code, 0 after the last that has one."""
        numbers = {ord(token): i for token, i in self.index.items() if len(token) == 1}
        table = np.zeros(max(numbers, default=0) + 2, np.int64)
        table[list(numbers)] = list(numbers.values())
        return table

    def encode(self, tokens: Iterable[str]) -> Tensor:
        """int64 `[N]`, 0 for unknown tokens."""
        if isinstance(tokens, str):
            codes = np.frombuffer(tokens.encode("utf-32-le", "surrogatepass"), np.uint32)
            return torch.from_numpy(self._of_characters[np.minimum(codes, len(self._of_characters) - 1)])
        return torch.tensor([self.index.get(token, 0) for token in tokens], dtype=torch.int64, device="cpu")

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some tokens; words are joined by spaces."""
        return ("" if self.level == "char" else " ").join(self.tokens[i] for i in ids)

    def unknown(self, tokens: Iterable[str]) -> list[str]:
        """The tokens that have no number of their own, each once, in order."""
        return [token for token in dict.fromkeys(tokens) if token not in self.index]

    def to_json(self) -> str:
        """The text form that `from_json` reads."""
        entries = {"level": self.level, "tokens": self.tokens, "counts": self.counts}
        return json.dumps(entries, ensure_ascii=False, indent=0) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Vocabulary:
        """The inverse of `to_json`. Raises InputError for anything else."""
        try:
            entries = json.loads(text)
            level, tokens, counts = entries["level"], tuple(entries["tokens"]), tuple(entries["counts"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise InputError("the vocabulary must be a JSON object with level, tokens and counts") from None
        if level not in get_args(Level) or not all(isinstance(t, str) for t in tokens) or tokens[:1] != (UNKNOWN,):
            raise InputError(f"the vocabulary must have level char or word and tokens that begin with {UNKNOWN}")
        if len(tokens) != len(counts) or not all(isinstance(n, int) and 0 <= n < 2**63 for n in counts):
            raise InputError("the vocabulary must have one count for each token")
        return cls(level, tokens, counts)
