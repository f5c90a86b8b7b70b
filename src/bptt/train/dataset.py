"""A text, split and numbered."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from torch import Tensor

from . import corpus
from .config import Config
from .errors import InputError
from .vocabulary import Vocabulary, tokenize

__all__ = ["Dataset", "prepare"]


@dataclass(frozen=True)
class Dataset:
    """A numbered text in two parts.

    train, heldout: int64 `[N]`; the held-out part, the end of the text, may be absent. sha256: of the preprocessed
    text before `limit`, to recognise it when a run is resumed.
    """

    vocabulary: Vocabulary
    train: Tensor
    heldout: Tensor | None
    sha256: str


def prepare(config: Config) -> Dataset:
    """Read, limit, split, number. The vocabulary comes from the training part alone.

    Raises InputError when the text is missing, not UTF-8, or too short for one batch.
    """
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
