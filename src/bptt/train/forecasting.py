"""How a series goes on, by the network of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .errors import InputError
from .scaling import Scaling
from .tables import Numbers, Table
from .tasks.series import Forecaster, Group, groups_of
from .times import later

__all__ = ["Forecast", "forecast"]


@dataclass(frozen=True, eq=False)
class Forecast:
    """What is predicted of one group.

    group: the rows that were read. times: of the predicted steps: where the times have one distance, in whole months or
    in time, they go on so, else (and without a column of times) the steps after the last row are counted from 1.
    values: float64 `[steps, targets]`.
    """

    group: Group
    times: list[Any]
    values: Numbers


def forecast(model: Forecaster, scaling: Scaling, table: Table) -> list[Forecast]:
    """The `horizon` steps after the last row of each group; of a regression the targets of every row.

    model, scaling: of a run (`bptt.train.trained.load`). table: with the run's columns (`bptt.train.tables`); of a
    regression the targets may be missing. The network reads each group from its first row, its state zero before.

    Raises InputError as for a table to train on.
    """
    known = scaling.targets if scaling.horizon else tuple(n for n in scaling.targets if n in table.columns)
    groups = groups_of(table, scaling.time, scaling.group, known, scaling.inputs)
    weight, found = next(model.parameters()), []
    for group in groups:
        x = scaling.read(group.inputs)[:, None].to(weight)
        with torch.no_grad():
            predicted = model(x)[0][:, 0]
        if not bool(predicted.isfinite().all()):
            raise InputError(f"the forecast{_of(group)} is not finite: its values are too far from those trained on")
        if scaling.horizon:
            values = scaling.values(predicted, group.inputs)[-1].T
            found.append(Forecast(group, later(group.time, scaling.horizon), values))
        else:
            times = list(range(1, len(x) + 1)) if group.time is None else group.time
            found.append(Forecast(group, times, scaling.values(predicted, group.inputs)[:, :, 0]))
    return found


def _of(group: Group) -> str:
    return f" of group {group.name}" if group.name else ""
