"""Sequences of several lengths with a label each: what every reader gives, checked once, whatever file it came from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import InputError

__all__ = ["Sequences"]

Floats = npt.NDArray[np.float64]
Whole = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Sequences:
    """N sequences of I features, one after another. `of` makes them, and checks them.

    values: float64 `[sum of lengths, I]`, NaN where one is missing. starts: int64 `[N + 1]`, where each begins in
    `values`, and where the last one ends. labels: N of them, None where none are known. names: of the sequences, for
    messages and predictions. features: names of the I columns. source: the file, for messages.

    >>> two = Sequences.of(np.arange(5.0)[:, None], [2, 3], labels=["a", "b"], source="here")
    >>> len(two), two.lengths.tolist(), two[1].ravel().tolist()
    (2, [2, 3], [2.0, 3.0, 4.0])
    """

    values: Floats
    starts: Whole
    labels: tuple[str, ...] | None
    names: tuple[str, ...]
    features: tuple[str, ...]
    source: str

    @classmethod
    def of(
        cls,
        values: Floats,
        lengths: Sequence[int] | Whole,
        *,
        source: str,
        labels: Sequence[str] | None = None,
        names: Sequence[str] | None = None,
        features: Sequence[str] | None = None,
    ) -> Sequences:
        """From values `[sum of lengths, I]` and lengths `[N]`. names: default 0, 1, ...; features likewise.

        Raises InputError, beginning with `source`, for no sequences, one without steps, without a value or without a
        label, for a feature without a value, and for values that are infinite.
        """
        lengths = np.asarray(lengths, dtype=np.int64)
        count, width = len(lengths), values.shape[1]
        named = tuple(map(str, range(count))) if names is None else tuple(names)
        columns = tuple(map(str, range(width))) if features is None else tuple(features)
        if not count or not width:
            raise InputError(f"{source} is empty: it has {count} sequences of {width} features")
        if not lengths.all():
            raise InputError(f"{source}: sequence {named[int(lengths.argmin())]} has no steps")
        if len(values) != lengths.sum():
            raise InputError(f"{source}: lengths must add up to its {len(values)} steps: got {lengths.sum()}")
        if labels is not None and len(labels) != count:
            raise InputError(f"{source} must have one label for each sequence: got {len(labels)} for {count}")
        given = None if labels is None else tuple(labels)
        made = cls(values, np.append(0, lengths.cumsum()), given, named, columns, source)
        made._check()
        return made

    def _check(self) -> None:
        there = ~np.isnan(self.values)
        if not there.any():
            raise InputError(f"{self.source}: all values are missing")
        if not (some := there.any(0)).all():
            raise InputError(f"{self.source}: all values of feature {self.features[int(some.argmin())]} are missing")
        if not (some := np.logical_or.reduceat(there.any(1), self.starts[:-1])).all():
            raise InputError(f"{self.source}: all values of sequence {self.names[int(some.argmin())]} are missing")
        if len(infinite := np.argwhere(np.isinf(self.values))):
            step, feature = infinite[0]
            index = int(np.searchsorted(self.starts, step, side="right")) - 1
            where = f"sequence {self.names[index]}, step {step - self.starts[index]}, feature {self.features[feature]}"
            raise InputError(f"{self.source}: a value must be a finite number, or missing: got inf in {where}")
        for name, label in zip(self.names, self.labels or (), strict=False):
            if not label:
                raise InputError(f"{self.source}: sequence {name} has no label")

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> Floats:
        """The values `[n, I]` of one sequence."""
        return self.values[self.starts[index] : self.starts[index + 1]]

    @property
    def lengths(self) -> Whole:
        """Steps of each."""
        return np.diff(self.starts)

    @property
    def missing(self) -> int:
        """How many values are missing."""
        return int(np.isnan(self.values).sum())

    def take(self, indices: Sequence[int] | Whole) -> Sequences:
        """Some of them, in the order of the indices, which are not none."""
        labels = None if self.labels is None else tuple(self.labels[i] for i in indices)
        values, lengths = np.concatenate([self[i] for i in indices]), self.lengths[np.asarray(indices)]
        names = tuple(self.names[i] for i in indices)
        return Sequences(values, np.append(0, lengths.cumsum()), labels, names, self.features, self.source)

    def sha256(self) -> str:
        """What tells these sequences and labels from others, wherever they were read."""
        digest = hashlib.sha256()
        for part in (self.values, self.starts):
            digest.update(np.ascontiguousarray(part).tobytes())
        for texts in (self.labels or (), self.features):
            digest.update(repr(texts).encode())
        return digest.hexdigest()
