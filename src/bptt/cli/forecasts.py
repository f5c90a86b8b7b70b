"""`bptt predict` of a run that forecasts a series."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np

from ..train import RunDirectory, atomic
from ..train.extras import require
from ..train.forecasting import Forecast, forecast
from ..train.scaling import Scaling
from ..train.tables import Numbers, read_table
from ..train.trained import load
from .pictures import write_picture

__all__ = ["write_forecast"]


def write_forecast(run: Path, data: Path, target: Path, device: str) -> str:
    """Write how each group of a table goes on, and its picture; says what was written."""
    plots = require("bptt.plots", "plots") if require("matplotlib", "plots") else None
    model, scaling, _ = load(RunDirectory.open(run), device, "series")
    found = forecast(model, scaling, read_table(data))
    atomic.write(target, _table(found, scaling).encode())
    picture = target.with_suffix(".png")
    known, predicted, times = _drawn(found, scaling)
    steps = None if scaling.horizon else range(max(len(each.times) for each in found))
    ahead = f"{scaling.horizon} steps ahead" if scaling.horizon else "by regression"
    assert plots is not None
    heading = f"{', '.join(scaling.targets)}, {ahead}"
    named = {} if scaling.time is None else {"times": times, "time": scaling.time}
    write_picture(plots.forecast(known, predicted, steps, heading, **named), picture)
    return f"{target}: {sum(len(each.times) for each in found)} rows; picture: {picture}"


def _table(found: list[Forecast], scaling: Scaling) -> str:
    """The forecast as CSV: group, time or step, and the targets."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    group = [] if scaling.group is None else [scaling.group]
    writer.writerow([*group, scaling.time or "step", *scaling.targets])
    for each in found:
        for time, values in zip(each.times, each.values.tolist(), strict=True):
            writer.writerow([*([each.group.name] if group else []), time, *values])
    return text.getvalue()


def _drawn(
    found: list[Forecast], scaling: Scaling
) -> tuple[dict[str, Numbers], dict[str, Numbers], dict[str, list[Any]]]:
    """(what was known, what is predicted, the times of both), by group and target."""
    known, predicted, times = {}, {}, {}
    alone = len(scaling.targets) == 1
    for each in found:
        for i, target in enumerate(scaling.targets):
            name = each.group.name if alone and each.group.name else " ".join(filter(None, (each.group.name, target)))
            predicted[name] = each.values[:, i]
            past = each.group.targets
            known[name] = past[:, i] if past.shape[1] == len(scaling.targets) else np.full(len(past), np.nan)
            later = each.times if scaling.horizon else []
            times[name] = [*(each.group.time or range(len(past))), *later]
    return known, predicted, times
