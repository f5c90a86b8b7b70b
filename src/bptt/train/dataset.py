"""A text, split and numbered."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from . import corpus
from .batches import Batches, RandomWindows, Sequential
from .config import Config
from .documents import Texts
from .errors import InputError
from .lanes import Lanes
from .tokenfiles import Tokens
from .vocabulary import Vocabulary, tokenize

__all__ = ["Dataset", "prepare"]


@dataclass(frozen=True)
class Dataset:
    """A numbered text in two parts.

    train, heldout: int64 `[N]`; the held-out part, the end of the text, may be absent. sha256: of the preprocessed
    text before `limit`, to recognise it when a run is resumed. offsets, heldout_offsets: where the documents of each
    part begin, and N; None: it is one text.
    """

    vocabulary: Vocabulary
    train: Tensor
    heldout: Tensor | None
    sha256: str
    offsets: tuple[int, ...] | None = None
    heldout_offsets: tuple[int, ...] | None = None

    def batches(self, config: Config) -> Batches:
        """The windows to train on."""
        if self.offsets is not None:
            documents = Tokens(self.train.numpy(), offsets=self.offsets)
            return Lanes(documents, config.batch, config.seq_length, shuffle=True, seed=config.seed)
        if config.batching == "sequential":
            return Sequential(self.train, config.seq_length, config.batch)
        return RandomWindows(self.train, config.seq_length, config.batch, config.seed)

    def in_order(self, ids: Tensor, lanes: int, length: int) -> Batches:
        """The windows of one part in its order, the state carried: each prediction once, in at most `lanes` lanes."""
        offsets = self.heldout_offsets if ids is self.heldout else self.offsets if ids is self.train else None
        if offsets is not None:
            return Lanes(Tokens(ids.numpy(), offsets=offsets), lanes, length)
        return Sequential(ids, length, min(lanes, len(ids) - 1))


def prepare(config: Config) -> Dataset:
    """Read, limit, split, number. The vocabulary comes from the training part alone.

    Raises InputError when the text is missing, not UTF-8, or too short for one batch.
    """
    if config.documents is not None:
        return _separate(config, config.documents)
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
    return Dataset(
        vocabulary,
        vocabulary.encode(tokens[:cut]),
        vocabulary.encode(tokens[cut:]) if held else None,
        hashlib.sha256(text.encode()).hexdigest(),
    )


def _separate(config: Config, split: str) -> Dataset:
    """A text of documents, each preprocessed by itself; the last of them are held out."""
    path = Path(config.text or "")
    if split == "files":
        texts = Texts.directory(path)
    elif split.startswith("jsonl:"):
        texts = Texts.json_lines(path, split.removeprefix("jsonl:"))
    else:
        texts = {"lines": Texts.lines, "paragraphs": Texts.paragraphs}[split](path)
    digest = hashlib.sha256()
    documents = []
    for raw in texts:
        text = corpus.PREPROCESSORS[config.preprocess](raw)
        digest.update(f"{len(text)}:{text}".encode())
        documents.append(tokenize(text, config.tokens))
    cut = len(documents) - round(len(documents) * config.heldout)
    for part, name in ((documents[:cut], "train on"), (documents[cut:], "hold out")):
        if (part or config.heldout) and not any(len(document) > 1 for document in part):
            raise InputError(
                f"{path} is too short: of {len(documents)} documents {len(part)} are left to {name}, none of at least "
                "2 tokens" + ("; give more, or --heldout 0" if config.heldout else "")
            )
    level = config.tokens
    vocabulary = Vocabulary.build(
        (token for document in documents[:cut] for token in document), level, config.min_count
    )
    ids = [vocabulary.encode(document) for document in documents]
    train, held = ids[:cut], ids[cut:]
    return Dataset(
        vocabulary,
        torch.cat(train),
        torch.cat(held) if held else None,
        digest.hexdigest(),
        _offsets(train),
        _offsets(held) if held else None,
    )


def _offsets(documents: list[Tensor]) -> tuple[int, ...]:
    """Where documents begin that are laid one behind the other, and where the last ends."""
    return tuple(accumulate(map(len, documents), initial=0))
