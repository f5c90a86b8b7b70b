"""What a classifier's numbers mean: its classes, and how its inputs were scaled."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..columns import check_features
from ..errors import InputError
from .sequences import Floats, Sequences

__all__ = ["Classes"]


@dataclass(frozen=True)
class Classes:
    """C classes, and the I features of the training sequences with their mean and standard deviation.

    An input is (value - mean) / scale; scale: 1 where a feature is constant. A missing value is the mean. masked:
    whether training lacked values: then each feature has a second input, 1 where it is missing, else 0.

    >>> made = Classes.of(Sequences.of(np.array([[1.0], [3.0]]), [1, 1], labels=["no", "yes"], source="here"))
    >>> made.names, made.mean, made.scale, Classes.from_json(made.to_json()) == made
    (('no', 'yes'), (2.0,), (1.0,), True)
    """

    names: tuple[str, ...]
    features: tuple[str, ...]
    mean: tuple[float, ...]
    scale: tuple[float, ...]
    masked: bool

    @classmethod
    def of(cls, train: Sequences) -> Classes:
        """Of training sequences with labels. Raises InputError for fewer than two classes."""
        names = _in_order({*(train.labels or ())})
        if len(names) < 2:
            raise InputError(f"{train.source} must have at least two classes: got {len(names)}, {', '.join(names)}")
        with np.errstate(over="ignore", invalid="ignore"):
            mean, scale = np.nanmean(train.values, axis=0), np.nanstd(train.values, axis=0)
        if not np.isfinite([mean, scale]).all():
            feature = train.features[int(np.isfinite(mean + scale).argmin())]
            raise InputError(f"{train.source}: feature {feature} has values too large for a mean and a deviation")
        scale[scale == 0] = 1.0
        return cls(names, train.features, tuple(mean.tolist()), tuple(scale.tolist()), train.missing > 0)

    @property
    def inputs(self) -> int:
        """Inputs of the network at a step."""
        return len(self.features) * (2 if self.masked else 1)

    def scaled(self, values: Floats, dtype: torch.dtype) -> Tensor:
        """The inputs `[n, inputs]` that values `[n, I]` are to the network, on the CPU."""
        missing = np.isnan(values)
        scaled = np.where(missing, 0.0, (values - np.array(self.mean)) / np.array(self.scale))
        both = np.concatenate([scaled, missing], axis=1) if self.masked else scaled
        return torch.from_numpy(both).to(dtype)

    def fit(self, other: Sequences) -> None:
        """Raise InputError where sequences have other features than those of the training."""
        check_features(other.source, self.features, other.features)

    def numbers(self, of: Sequences) -> Tensor:
        """The labels int64 `[N]` by their place among the classes. Raises InputError for an unknown one."""
        index = {name: number for number, name in enumerate(self.names)}
        for name, label in zip(of.names, of.labels or (), strict=True):
            if label not in index:
                known = ", ".join(self.names[:10]) + (", ..." if len(self.names) > 10 else "")
                raise InputError(f"{of.source}: sequence {name} has the class {label!r}, which training lacks: {known}")
        return torch.tensor([index[label] for label in of.labels or ()], dtype=torch.int64, device="cpu")

    def to_json(self) -> str:
        """The text form that `from_json` reads."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Classes:
        """The inverse of `to_json`. Raises InputError for anything else."""
        try:
            entries = json.loads(text)
            parts: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value for name, value in entries.items()
            }
            made = cls(**parts)
            whole = len(made.features) == len(made.mean) == len(made.scale) and len(made.names) > 1
            if not whole or not all(isinstance(x, float) for x in (*made.mean, *made.scale)):
                raise ValueError("parts that do not belong together")
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            names = ", ".join(entry.name for entry in fields(cls))
            raise InputError(f"the classes of the run cannot be read, as {names}: {error}") from None
        return made


def _in_order(labels: set[str]) -> tuple[str, ...]:
    """Whole numbers by size, else by the alphabet."""
    return tuple(sorted(labels, key=int if _whole(labels) else str))


def _whole(labels: Sequence[str] | set[str]) -> bool:
    return all(label.removeprefix("-").isdecimal() and str(int(label)) == label for label in labels)
