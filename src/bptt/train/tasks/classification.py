"""Sequences with a class each, split and scaled, and the classifier that reads them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ...flow.language import say
from ..carried import State
from ..config import Config
from ..errors import InputError
from ..found import STORED
from ..options import LANES
from ..window import IGNORE
from .classes import Classes
from .classifier import Classifier, Labelled, Part, Shuffled
from .sequence_files import read_sequences
from .sequences import Sequences
from .stratified import stratified

__all__ = ["Classification", "Prediction", "predictions"]


@dataclass(frozen=True, eq=False)
class Classification:
    """Sequences in two parts, of which the second may be absent, and what their numbers mean.

    sha256: of all sequences and labels, to recognise them when a run is resumed.
    """

    name: ClassVar[str] = "classify"
    file: ClassVar[str] = STORED["classify"]
    what: ClassVar[str] = "classes"
    data: ClassVar[str] = "set of sequences"
    units: ClassVar[str] = "sequences"

    stored: Classes
    train: Part
    heldout: Part | None
    sha256: str

    @classmethod
    def prepare(cls, config: Config) -> Classification:
        """Read, split by class, scale by the training part.

        Raises InputError for files that cannot be read, with fewer than two classes, or too few sequences for a batch.
        """
        train, heldout = _split(config)
        stored = Classes.of(train)
        if heldout is not None:
            stored.fit(heldout)
        dtype = getattr(torch, config.dtype)
        digest = train.sha256() + ("" if heldout is None else heldout.sha256())
        return cls(
            stored, _part(train, stored, dtype), None if heldout is None else _part(heldout, stored, dtype), digest
        )

    @classmethod
    def read(cls, text: str) -> Classes:
        return Classes.from_json(text)

    @classmethod
    def network(cls, config: Config, stored: Classes) -> Classifier:
        return Classifier(
            stored.inputs,
            len(stored.names),
            pool=config.pool,
            cell=config.cell,
            nonlinearity=config.nonlinearity,
            layers=config.layers,
            bidirectional=config.bidirectional,
            hidden=config.hidden,
            dropout=config.dropout,
            gradient=config.gradient,
            memory=config.memory,
            kernel=config.kernel,
        )

    @classmethod
    def trial(cls, stored: Classes) -> tuple[Tensor, ...]:
        return torch.zeros(1, 1, stored.inputs, device="cpu"), torch.ones(1, dtype=torch.int64, device="cpu")

    def batches(self, config: Config) -> Shuffled:
        """The training sequences, in an order of every epoch's own."""
        return Shuffled(self.train, config.batch, config.seed)

    def in_order(self, part: Part, config: Config) -> Shuffled:
        return Shuffled(part, config.batch, None)

    def carries(self, config: Config) -> bool:
        return False

    def longest(self, config: Config) -> int:
        return int(self.train.lengths.max())

    def arguments(self, batch: Labelled, state: State, like: Tensor) -> tuple[Any, ...]:
        return batch.x.to(like), batch.lengths

    def loss(self, output: Any, batch: Labelled) -> Tensor:
        """Summed cross entropy in nats."""
        logits = output[0]
        return cross_entropy(logits, batch.labels.to(logits.device), ignore_index=IGNORE, reduction="sum")

    def counts(self, output: Any, batch: Labelled) -> Tensor:
        """The confusion matrix `[C * C]`, the true class by row."""
        C, there = len(self.stored.names), batch.labels != IGNORE
        cells = batch.labels[there] * C + output[0].argmax(1).cpu()[there]
        return torch.bincount(cells, minlength=C * C).double()

    def measures(self, counts: list[float]) -> dict[str, float]:
        """Accuracy, and that of each class: the share of its sequences that are taken for it."""
        matrix = self.confusion(counts)
        seen, right = matrix.sum(1), matrix.diagonal()
        found = {"accuracy": float(right.sum() / seen.sum())}
        for name, n, r in zip(self.stored.names, seen.tolist(), right.tolist(), strict=True):
            if n:
                found[f"accuracy/{name}"] = r / n
        return found

    def confusion(self, counts: list[float]) -> Tensor:
        """The confusion matrix int64 `[C, C]` that the counts are."""
        C = len(self.stored.names)
        return torch.tensor(counts, dtype=torch.float64, device="cpu").long().reshape(C, C)

    def perplexity(self, loss: float) -> None:
        return None

    def about(self) -> str:
        lengths, held = self.train.lengths, 0 if self.heldout is None else len(self.heldout)
        low, high = int(lengths.min()), int(lengths.max())
        return (
            f"{len(self.train):,} sequences of {low:,}{f' to {high:,}' if high > low else ''} steps to train on, "
            f"{held:,} held out, {len(self.stored.names)} classes, {len(self.stored.features)} features"
        )

    def baseline(self) -> str:
        """The accuracy of the class that training has most often."""
        name, share = self._guess()
        return f"always guessing {name} has accuracy {share:.3f}"

    def _guess(self) -> tuple[str, float]:
        part = self.train if self.heldout is None else self.heldout
        most = int(self.train.labels.bincount().argmax())
        return self.stored.names[most], float((part.labels == most).double().mean())

    def shortfall(self, loss: float, measures: Mapping[str, float | None]) -> str:
        (name, share), accuracy = self._guess(), measures.get("accuracy")
        if accuracy is None or accuracy > share:
            return ""
        return f"a held-out accuracy of {accuracy:.3f} is no better than always guessing {name}, {share:.3f}"

    def hints(self, config: Config) -> list[str]:
        if not self.stored.masked:
            return []
        return ["values are missing: each feature has a second input, 1 where it is missing"]

    def inspected(self, config: Config, steps: int | None, lanes: int | None) -> tuple[list[Any], str]:
        """The longest sequences of the held-out part, cut to the first `steps` steps."""
        part = self.train if self.heldout is None else self.heldout
        lanes = min(LANES, config.batch, len(part)) if lanes is None else lanes
        if lanes < 1 or (steps is not None and steps < 1):
            raise InputError(f"steps and lanes must be at least 1: got steps={steps} and lanes={lanes}")
        longest = int(part.lengths.max())
        if lanes > len(part) or (steps or 0) > longest:
            asked = f"lanes={lanes}" if steps is None else f"steps={steps} and lanes={lanes}"
            raise InputError(f"the sequences to measure on are {len(part)} of at most {longest} steps: got {asked}")
        batch = part.batch(part.lengths.argsort(descending=True, stable=True)[:lanes].sort().values)
        text = "{source}, {lanes} of its {count} held-out sequences, the longest"
        text = "{source}, {lanes} of its {count} training sequences, the longest" if self.heldout is None else text
        said = say(text, source=config.source, lanes=lanes, count=f"{len(part):,}")
        return [batch if steps is None else batch.first(steps)], said

    def pictures(self, counts: list[float]) -> Iterator[tuple[str, Any]]:
        from ... import plots  # where matplotlib is installed

        yield "confusion", plots.confusion(self.confusion(counts).numpy(), self.stored.names)


@dataclass(frozen=True)
class Prediction:
    """Of one sequence: its name, the likeliest class and the probability of each; its own label, where it has one."""

    name: str
    label: str
    probabilities: tuple[float, ...]
    true: str | None


def predictions(model: Classifier, stored: Classes, config: Config, path: Path) -> list[Prediction]:
    """What a trained classifier says of the sequences of a file, with or without labels.

    Raises InputError for a file that cannot be read, or with other features than those of the training.
    """
    found = read_sequences(path, config, labelled=False)
    stored.fit(found)
    weight = next(model.parameters())
    part = _part(replace(found, labels=None), stored, weight.dtype)
    batches = Shuffled(part, config.batch, None)
    rows: list[list[float]] = []
    with torch.no_grad():
        for index in range(batches.windows(0)):
            batch = batches.window(0, index)
            logits, _ = model(batch.x.to(weight), batch.lengths)
            rows += logits.double().softmax(1).tolist()
    labels = found.labels or [None] * len(rows)
    return [
        Prediction(name, stored.names[max(range(len(row)), key=row.__getitem__)], tuple(row), label)
        for name, row, label in zip(found.names, rows, labels, strict=True)
    ]


def _part(of: Sequences, stored: Classes, dtype: torch.dtype) -> Part:
    labels = torch.full((len(of),), IGNORE, device="cpu") if of.labels is None else stored.numbers(of)
    return Part(stored.scaled(of.values, dtype), torch.from_numpy(of.starts), labels)


def _split(config: Config) -> tuple[Sequences, Sequences | None]:
    """(what to train on, what is held out)."""
    whole = read_sequences(Path(config.classify or ""), config)
    if config.heldout_file is not None:
        return whole, read_sequences(Path(config.heldout_file), config)
    if not config.heldout:
        return whole, None
    if len(one := {*(whole.labels or ())}) < 2:
        raise InputError(f"{whole.source} must have at least two classes: got {len(one)}, {', '.join(one)}")
    train, held = stratified(whole.labels or (), config.heldout, config.seed)
    if not held:
        most = Counter(whole.labels).most_common(1)[0][1]
        raise InputError(
            f"heldout={config.heldout:g} of {len(whole)} sequences, at most {most} of a class, holds none out: give "
            "more sequences, heldout_file, or --heldout 0"
        )
    return whole.take(train), whole.take(held)
