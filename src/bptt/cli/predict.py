"""`bptt predict`: how a series goes on, or which class sequences are of, by a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..train import Config, InputError
from ..train.found import found_file, found_sequences
from ..train.headers import check_predictable
from ..train.runs import options_of

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
    """Forecast how a series goes on, or say which class sequences are of, by the model of a run.

    The steps after the last row of a table, for each of its groups; a regression predicts every row. Of sequences, the
    likeliest class of each and the probability of every class; where they have labels, also how many are right. Writes
    a CSV file and a picture.
    """
    config = options_of(run, "series", "classify")
    task = config.task
    Config.check("device", device)
    if out is not None:
        _check_target(out)
    if task == "classify":
        found_sequences(str(data))
    else:
        found_file("table", str(data))
    check_predictable(config, run, data)

    from .classes import write_classes
    from .forecasts import write_forecast

    if task == "classify":
        typer.echo(write_classes(run, data, run / "classes.csv" if out is None else out, device))
    else:
        typer.echo(write_forecast(run, data, run / "forecast.csv" if out is None else out, device))


def _check_target(out: Path) -> None:
    """Raise InputError for a file to write that is no CSV, or lies nowhere."""
    if out.suffix.lower() != ".csv" or out.is_dir():
        raise InputError(f"out must be the name of a .csv file: got {out}")
    if not out.parent.is_dir():
        raise InputError(f"out {out} must lie in a directory that is there: {out.parent} is none")
