"""Text, split and numbered, and the language model over its characters or words."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ...flow.language import say
from .. import corpus
from ..batches import Batches, RandomWindows, Sequential
from ..carried import State
from ..config import Config
from ..documents import Numbered, Texts
from ..errors import InputError
from ..found import STORED
from ..lanes import Lanes
from ..model import LanguageModel, unigram_perplexity
from ..records import perplexity
from ..vocabulary import Vocabulary, tokenize
from ..window import IGNORE, Window
from .stream import inspected

__all__ = ["Part", "Text", "in_order", "predicted", "token_count"]


Part = Tensor | Numbered
"""A text, its token ids int64 `[N]`, or documents."""

LARGE = 10_000
"""Words in a vocabulary above which it is told how many were seen more than once."""


@dataclass(frozen=True)
class Text:
    """A text in two parts, both of one text or both of documents.

    heldout: the end of the text, or the last documents; it may be absent. sha256: of the preprocessed text before
    `limit`, to recognise it when a run is resumed.
    """

    name: ClassVar[str] = "text"
    file: ClassVar[str] = STORED["text"]
    what: ClassVar[str] = "vocabulary"
    data: ClassVar[str] = "text"
    units: ClassVar[str] = "tokens"

    vocabulary: Vocabulary
    train: Part
    heldout: Part | None
    sha256: str

    @property
    def stored(self) -> Vocabulary:
        return self.vocabulary

    @classmethod
    def prepare(cls, config: Config) -> Text:
        """Read, limit, split, number. The vocabulary comes from the training part alone.

        Raises InputError when the text is missing, not UTF-8, or too short for one batch.
        """
        if config.documents is not None:
            return _separate(config, config.documents)
        return _joined(config)

    @classmethod
    def read(cls, text: str) -> Vocabulary:
        return Vocabulary.from_json(text)

    @classmethod
    def network(cls, config: Config, stored: Vocabulary) -> LanguageModel:
        return LanguageModel(
            len(stored),
            cell=config.cell,
            nonlinearity=config.nonlinearity,
            layers=config.layers,
            hidden=config.hidden,
            embedding=config.embedding,
            dropout=config.dropout,
            gradient=config.gradient,
            memory=config.memory,
            kernel=config.kernel,
        )

    @classmethod
    def trial(cls, stored: Vocabulary) -> tuple[Tensor, ...]:
        return (torch.zeros(1, 1, dtype=torch.int64, device="cpu"),)

    def batches(self, config: Config) -> Batches:
        """The windows to train on."""
        if isinstance(self.train, Numbered):
            return Lanes(self.train, config.batch, config.seq_length, shuffle=True, seed=config.seed)
        if config.batching == "sequential":
            return Sequential(self.train, config.seq_length, config.batch)
        return RandomWindows(self.train, config.seq_length, config.batch, config.seed)

    def in_order(self, part: Part, config: Config) -> Batches:
        """The windows of a part in its order, the state carried: each prediction once, in at most `batch` lanes."""
        return in_order(part, config.batch, config.seq_length)

    def carries(self, config: Config) -> bool:
        return config.batching == "sequential"

    def longest(self, config: Config) -> int:
        return min(config.seq_length, token_count(self.train))

    def arguments(self, batch: Window, state: State, like: Tensor) -> tuple[Any, ...]:
        resets = () if batch.resets is None else (batch.resets.to(like.device),)
        return batch.inputs.to(like.device), state, *resets

    def loss(self, output: Any, batch: Window) -> Tensor:
        """Summed NLL in nats."""
        logits = output[0]
        targets = batch.targets.to(logits.device).flatten()
        return cross_entropy(logits.flatten(0, 1), targets, ignore_index=IGNORE, reduction="sum")

    def counts(self, output: Any, batch: Window) -> Tensor:
        return torch.zeros(0, dtype=torch.float64, device="cpu")

    def measures(self, counts: list[float]) -> dict[str, float]:
        return {}

    def pictures(self, counts: list[float]) -> Iterator[tuple[str, Any]]:
        return iter(())

    def perplexity(self, loss: float) -> float:
        return perplexity(loss)

    def about(self) -> str:
        return (
            f"{token_count(self.train):,} tokens to train on, {token_count(self.heldout):,} held out, "
            f"{len(self.vocabulary)} in the vocabulary"
        )

    def baseline(self) -> str:
        return f"guessing by frequency has perplexity {self.unigram():.2f}"

    def unigram(self) -> float:
        """The perplexity of guessing by frequency: of the held-out text, or without one of the training text."""
        part = self.train if self.heldout is None else self.heldout
        return unigram_perplexity(self.vocabulary.counts, predicted(part))

    def shortfall(self, loss: float, measures: Mapping[str, float | None]) -> str:
        guessing = self.unigram()
        if loss < math.log(guessing):
            return ""
        found = self.perplexity(loss)
        return f"a held-out perplexity of {found:.4g} is no better than guessing by frequency, {guessing:.4g}"

    def hints(self, config: Config) -> list[str]:
        size, counts = len(self.vocabulary), self.vocabulary.counts
        if self.vocabulary.level != "word" or config.min_count > 1 or size <= LARGE:
            return []
        often = sum(n > 1 for n in counts)
        return [f"most of the weights belong to words: --min-count 2 would leave {often:,} of {size:,}"]

    def inspected(self, config: Config, steps: int | None, lanes: int | None) -> tuple[list[Any], str]:
        part = self.train if self.heldout is None else self.heldout
        text = "{source}, its text of {count}" if self.heldout is None else "{source}, its held-out part of {count}"
        tokens = token_count(part)
        counted = say("{count} characters" if config.tokens == "char" else "{count} words", count=f"{tokens:,}")
        said = say(text, source=config.source, count=counted)
        carries = config.batching == "sequential"
        return inspected(config, steps, lanes, lambda B, T: in_order(part, B, T), tokens, self, carries), said


def in_order(part: Part, lanes: int, length: int) -> Batches:
    """The windows of a part in its order, the state carried: each prediction once, in at most `lanes` lanes."""
    if isinstance(part, Numbered):
        return Lanes(part, lanes, length)
    return Sequential(part, length, min(lanes, len(part) - 1))


def token_count(part: Part | None) -> int:
    """Tokens of a part, 0 for none."""
    return 0 if part is None else part.tokens if isinstance(part, Numbered) else len(part)


def predicted(part: Part) -> Iterable[Tensor]:
    """The ids of the tokens that a model predicts, in pieces: all but the first, that of every document."""
    return part.predicted() if isinstance(part, Numbered) else (part[1:],)


def _joined(config: Config) -> Text:
    """One text, whose end is held out."""
    text = corpus.load(config.corpus, config.text, config.preprocess)
    tokens = tokenize(text, config.tokens)
    if config.limit:
        tokens = tokens[: config.limit]
    held = round(len(tokens) * config.heldout)
    if config.heldout and held < 2:
        raise InputError(
            f"heldout={config.heldout:g} of {len(tokens)} tokens leaves {held} held-out tokens, at least 2 are needed: "
            "give more text, or --heldout 0"
        )
    cut = len(tokens) - held
    need = config.batch + 1 if config.batching == "sequential" else 2 * config.seq_length
    if cut < need:
        wants = f"batch={config.batch} lanes need" if config.batching == "sequential" else "random windows need"
        raise InputError(f"the text is too short: {cut} tokens to train on, {wants} at least {need}")
    vocabulary = Vocabulary.build(tokens[:cut], config.tokens, config.min_count)
    return Text(
        vocabulary,
        vocabulary.encode(tokens[:cut]),
        vocabulary.encode(tokens[cut:]) if held else None,
        hashlib.sha256(text.encode()).hexdigest(),
    )


def _separate(config: Config, split: str) -> Text:
    """A text of documents, each preprocessed by itself; the last of them are held out."""
    path = Path(config.text or "")
    if split == "files":
        texts = Texts.directory(path)
    elif split.startswith("jsonl:"):
        texts = Texts.json_lines(path, split.removeprefix("jsonl:"))
    else:
        texts = {"lines": Texts.lines, "paragraphs": Texts.paragraphs}[split](path)
    if config.preprocess != "none":
        texts = texts.changed(corpus.PREPROCESSORS[config.preprocess])
    cut = len(texts) - round(len(texts) * config.heldout)
    digest, counts = _read_through(texts, cut, config.tokens)
    vocabulary = Vocabulary.counted(counts, config.tokens, config.min_count)
    parts = [Numbered(texts.part(*ends), vocabulary) for ends in ((0, cut), (cut, len(texts)))]
    for part, name in zip(parts, ("train on", "hold out"), strict=True):
        if (part or config.heldout) and not (part.sizes > 1).any():
            raise InputError(
                f"{path} is too short: of {len(texts)} documents {len(part)} are left to {name}, none of at least "
                "2 tokens" + ("; give more, or --heldout 0" if config.heldout else "")
            )
    predictions = int((parts[0].sizes - 1).clip(min=0).sum())
    if predictions < config.batch:
        raise InputError(
            f"{path} is too short: its documents have {predictions} tokens to predict, batch={config.batch} lanes need "
            f"at least {config.batch}"
        )
    return Text(vocabulary, parts[0], parts[1] if len(parts[1]) else None, digest)


def _read_through(texts: Texts, cut: int, level: str) -> tuple[str, Counter[str]]:
    """(SHA-256 of all documents, how often each token occurs in those before `cut`)."""
    whole, one, counts = hashlib.sha256(), hashlib.sha256(), Counter[str]()
    at = 0
    for index, _, text in texts.pieces(level):
        if index != at:  # each by its own, so that no two ways of cutting a text into documents are alike
            whole.update(one.digest())
            one, at = hashlib.sha256(), index
        one.update(text.encode())
        if index < cut:
            counts.update(tokenize(text, level))
    whole.update(one.digest())
    return whole.hexdigest(), counts
