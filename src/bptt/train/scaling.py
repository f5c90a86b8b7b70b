"""What a run on a series keeps of its data: the columns, how they are standardised, and what errors are measured by."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import InputError
from .tables import Numbers

__all__ = ["Scaling", "filled", "naive_errors", "scaled_error"]


@dataclass(frozen=True)
class Scaling:
    """Columns and their scales, all from the training part.

    targets, inputs: names of columns; a forecast has the targets among its inputs, first. horizon: steps ahead; 0: the
    targets of the same step, from the inputs. season: of the seasonal-naive forecast.
    mean, scale: of each input. gaps: whether an input has missing values, so that the network is told where.
    step: the scale of each target's change from one step to the next, of a regression of the target itself. middle: of
    each target, its mean. naive, seasonal: the mean absolute error of the naive and seasonal-naive forecast of the next
    step in the training part.
    """

    targets: tuple[str, ...]
    inputs: tuple[str, ...]
    time: str | None
    group: str | None
    horizon: int
    season: int
    mean: tuple[float, ...]
    scale: tuple[float, ...]
    gaps: tuple[bool, ...]
    step: tuple[float, ...]
    middle: tuple[float, ...]
    naive: tuple[float, ...]
    seasonal: tuple[float, ...]

    @property
    def width(self) -> int:
        """Numbers that the network reads at a step."""
        return len(self.inputs) + sum(self.gaps) + (len(self.targets) if self.horizon else 0)

    @property
    def outputs(self) -> int:
        """Numbers that it predicts at a step, target by target, each for all steps ahead."""
        return len(self.targets) * max(1, self.horizon)

    def read(self, inputs: Numbers) -> Tensor:
        """What the network reads, float64 `[n, width]`, of the columns of one group `[n, inputs]`.

        A missing value is filled with the last one known, before the first with the training mean; where the training
        data have gaps in a column, a further number is 1 at them. A forecast also reads each target's last change.
        """
        x = filled(inputs, np.asarray(self.mean))
        parts = [(x - self.mean) / self.scale]
        parts += [np.isnan(inputs[:, i : i + 1]).astype(float) for i, gaps in enumerate(self.gaps) if gaps]
        if self.horizon:
            y = x[:, : len(self.targets)]
            parts.append(np.diff(y, axis=0, prepend=y[:1]) / self.step)
        return torch.from_numpy(np.concatenate(parts, axis=1))

    def aims(self, inputs: Numbers, targets: Numbers) -> Tensor:
        """What it is to predict, float64 `[n, outputs]`, NaN where that is missing.

        Of a forecast: the target h steps ahead less its last known value, in units of `step`; else standardised.
        """
        base, n = self.bases(inputs), len(targets)
        result = np.full((n, len(self.targets), max(1, self.horizon)), np.nan)
        for h in range(result.shape[2]):
            ahead = h + 1 if self.horizon else 0
            result[: max(0, n - ahead), :, h] = (targets[ahead:] - base[: max(0, n - ahead)]) / self.step
        return torch.from_numpy(result.reshape(n, -1))

    def bases(self, inputs: Numbers) -> Numbers:
        """What predictions count from, `[n, targets]`."""
        if self.horizon:
            return filled(inputs, np.asarray(self.mean))[:, : len(self.targets)]
        return np.broadcast_to(np.asarray(self.middle), (len(inputs), len(self.targets)))

    def values(self, predicted: Tensor, inputs: Numbers) -> Numbers:
        """Predictions `[n, outputs]` in the units of the data: `[n, targets, max(1, horizon)]`."""
        shape = len(predicted), len(self.targets), max(1, self.horizon)
        steps = predicted.double().cpu().numpy().reshape(shape)
        return self.bases(inputs)[:, :, None] + steps * np.asarray(self.step)[:, None]

    def to_json(self) -> str:
        """The text form that `from_json` reads."""
        return json.dumps(asdict(self), ensure_ascii=False, indent=0) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Scaling:
        """The inverse of `to_json`. Raises InputError for anything else."""
        try:
            entries = json.loads(text)
            given: dict[str, Any] = {
                f.name: tuple(v) if isinstance(v := entries[f.name], list) else v for f in fields(cls)
            }
            result = cls(**given)
            for name in ("mean", "scale", "gaps", "step", "middle", "naive", "seasonal"):
                of = result.inputs if name in ("mean", "scale", "gaps") else result.targets
                if np.asarray(getattr(result, name), float).shape != (len(of),):
                    raise ValueError
            if not all(isinstance(n, int) and n >= 0 for n in (result.horizon, result.season)):
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise InputError("the scaling must be a JSON object as a run on a series writes it") from None
        return result


def filled(values: Numbers, first: Numbers) -> Numbers:
    """`[n, C]` with missing values replaced by the last known one of their column; before there is one, by `first`.

    >>> filled(np.array([[np.nan], [1.0], [np.nan]]), np.array([5.0])).ravel().tolist()
    [5.0, 1.0, 1.0]
    """
    result = values.copy()
    last: Any = first
    for i, row in enumerate(result):
        last = np.where(np.isnan(row), last, row)
        result[i] = last
    return result


def naive_errors(series: list[Numbers], season: int) -> tuple[float, ...]:
    """The mean absolute change of each column over `season` steps, over all groups; NaN where there is none.

    The scale of MASE: Hyndman and Koehler 2006, "Another look at measures of forecast accuracy", section 3.
    """
    changes = np.concatenate([np.abs(y[season:] - y[:-season]) for y in series])
    known = (~np.isnan(changes)).sum(0)
    return tuple((np.nansum(changes, 0) / np.where(known, known, np.nan)).tolist())


def scaled_error(mae: Numbers, naive: tuple[float, ...]) -> float:
    """MASE: the mean over the targets of their error in units of the naive one; NaN where no target has both.

    >>> scaled_error(np.array([1.0, 3.0, 4.0]), (2.0, 2.0, 0.0))
    1.0
    """
    units = np.asarray(naive)
    there = ~np.isnan(mae) & (units > 0)
    return float((mae[there] / units[there]).mean()) if there.any() else float("nan")
