"""`bptt flow`: what happens to the gradient on its way back through time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from ..flow import STAGES, Survey, survey
from ..train import InputError
from ..train.extras import require
from .subject import (
    CellOption,
    HiddenOption,
    LanesOption,
    LayersOption,
    NonlinearityOption,
    RadiusOption,
    RunArgument,
    SeedOption,
    StepsOption,
    Subject,
    subject,
)

__all__ = ["flow", "measured", "require_pictures", "write_report"]


def flow(
    run: RunArgument = None,
    cell: CellOption = None,
    hidden: HiddenOption = None,
    layers: LayersOption = None,
    nonlinearity: NonlinearityOption = None,
    radius: RadiusOption = None,
    steps: StepsOption = None,
    lanes: LanesOption = None,
    lags: Annotated[int | None, typer.Option(help="lags of the map (default: at most 256)")] = None,
    seed: SeedOption = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="where report.html goes (default: RUN/flow, or flow)")
    ] = None,
) -> None:
    """Measure how far gradients travel: a verdict on the screen, report.html and pictures in a directory.

    Of a run's network on its own text, or of a fresh layer (--cell) on noise.
    """
    require_pictures()
    if lags is not None and lags < 1:
        raise InputError(f"lags must be at least 1: got {lags}")
    of = subject(
        run, steps, lanes, cell=cell, hidden=hidden, layers=layers, nonlinearity=nonlinearity, radius=radius, seed=seed
    )
    found = measured(of, lags, Console(stderr=True))
    written = write_report(found, of.directory if out is None else out)
    typer.echo(f"{of.name}\n\n{found.verdict}\n\nreport: {written}, pictures beside it")


def require_pictures() -> None:
    """Raise InputError where what draws is not installed: heard of before anything is measured."""
    for module, extra in (("matplotlib", "plots"), ("plotly", "report")):
        require(module, extra)


def measured(of: Subject, lags: int | None, console: Console) -> Survey:
    """Everything measured, shown on the way."""
    with Progress(
        TextColumn("measuring {task.description}"), BarColumn(bar_width=20), console=console, transient=True
    ) as bar:
        task = bar.add_task("", total=len(STAGES))
        return survey(
            of.recording,
            name=of.name,
            lags=lags,
            records=of.records,
            on_stage=lambda stage: bar.update(task, description=stage, completed=STAGES.index(stage)),
        )


def write_report(found: Survey, directory: Path) -> Path:
    """report.html, and every picture as a PNG beside it."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, figure in require("bptt.plots", "plots").figures(found):
        figure.savefig(directory / f"{name}.png")
    written: Path = require("bptt.report", "report").write(directory / "report.html", found)
    return written
