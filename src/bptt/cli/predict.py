"""`bptt predict`: how a series goes on, or which class sequences are of, by a trained model."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from ..train import RunDirectory, atomic
from ..train.extras import require
from ..train.forecasting import Forecast, forecast
from ..train.scaling import Scaling
from ..train.tables import Numbers, read_table
from ..train.trained import load
from .classes import classify, target_of

__all__ = ["predict"]


def predict(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="run directory of bptt train --series or --classify")],
    data: Annotated[Path, typer.Argument(metavar="DATA", help="data with the columns, or features, of the run's own")],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="CSV to write, with its picture beside (default: RUN/forecast.csv or RUN/classes.csv)"
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="torch device")] = "cpu",
) -> None:
    """Forecast the steps behind the last row of a table, for each of its groups; a regression predicts every row.

    Of sequences, the likeliest class of each and the probability of every class; where they have labels, also how many
    are right. Writes a CSV file and a picture.
    """
    if RunDirectory.open(run).config().task == "classify":
        typer.echo(classify(run, data, target_of(run / "classes.csv" if out is None else out), device))
        return
    plots = require("bptt.plots", "plots") if require("matplotlib", "plots") else None
    directory = RunDirectory.open(run)
    model, scaling, _ = load(directory, device, "series")
    found = forecast(model, scaling, read_table(data))
    target = target_of(run / "forecast.csv" if out is None else out)
    atomic.write(target, _table(found, scaling).encode())
    picture = target.with_suffix(".png")
    known, predicted = _drawn(found, scaling)
    steps = None if scaling.horizon else range(len(found[0].times))
    ahead = f"{scaling.horizon} steps ahead" if scaling.horizon else "by regression"
    assert plots is not None
    plots.forecast(known, predicted, steps, f"{', '.join(scaling.targets)}, {ahead}").savefig(picture)
    rows = sum(len(each.times) for each in found)
    typer.echo(f"{target}: {rows} rows; picture: {picture}")


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


def _drawn(found: list[Forecast], scaling: Scaling) -> tuple[dict[str, Numbers], dict[str, Numbers]]:
    """(what was known, what is predicted), by group and target."""
    known, predicted = {}, {}
    alone = len(scaling.targets) == 1
    for each in found:
        for i, target in enumerate(scaling.targets):
            name = each.group.name if alone and each.group.name else " ".join(filter(None, (each.group.name, target)))
            predicted[name] = each.values[:, i]
            past = each.group.targets
            known[name] = past[:, i] if past.shape[1] == len(scaling.targets) else np.full(len(past), np.nan)
    return known, predicted
