"""`bptt flow`: what happens to the gradient on its way back through time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.cells import set_cell_size
from rich.console import Console

from ..train import InputError
from ..train.extras import require
from .pictures import write_picture
from .subject_options import (
    CellOption,
    HiddenOption,
    LanesOption,
    LayersOption,
    NonlinearityOption,
    RadiusOption,
    RunArgument,
    SeedOption,
    StepsOption,
    check_subject,
)

if TYPE_CHECKING:
    from ..flow import Survey
    from .subject import Subject

__all__ = ["flow", "measured", "require_pictures", "settled", "write_report"]


def flow(
    run: RunArgument = None,
    cell: CellOption = None,
    hidden: HiddenOption = None,
    layers: LayersOption = None,
    nonlinearity: NonlinearityOption = None,
    radius: RadiusOption = None,
    steps: StepsOption = None,
    lanes: LanesOption = None,
    lags: Annotated[int | None, typer.Option(help="lags of the map (default: all of the window)")] = None,
    seed: SeedOption = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="where report.html goes (default: RUN/flow, or flow)")
    ] = None,
    lang: Annotated[
        str, typer.Option(help="language of the verdict, the report and the pictures: en (English) or zh (中文)")
    ] = "en",
) -> None:
    """Measure how far gradients travel: a verdict on the screen, report.html and pictures in a directory.

    Of a run's network on its own text, or of a fresh layer (--cell) on noise. Without --steps and --lags the window is
    lengthened until the horizon settles, to 1024 steps at most.
    """
    if lags is not None and lags < 1:
        raise InputError(f"lags must be at least 1: got {lags}")
    if lang not in ("en", "zh"):
        raise InputError(f"lang must be en or zh: got {lang!r}")
    fresh: dict[str, Any] = {"cell": cell, "hidden": hidden, "layers": layers}
    fresh |= {"nonlinearity": nonlinearity, "radius": radius, "seed": seed}
    check_subject(run, steps, lanes, **fresh)
    require_pictures()

    from ..flow.language import language, say
    from .subject import subject

    console = Console(stderr=True)

    def make(steps: int | None) -> Subject:
        return subject(run, steps, lanes, **fresh)

    with language(lang):
        if steps is None and lags is None:
            of = settled(make, console)
            found = measured(of, of.recording.T, console)
        else:
            of = make(steps)
            found = measured(of, of.recording.T if lags is None else lags, console)
        written = write_report(found, of.directory if out is None else out)
        told = say("report: {path}, pictures beside it", path=written) + _in_english(lang)
        typer.echo(f"{of.name}\n{opening(found)}\n\n{found.verdict}\n\n{told}")


def _in_english(lang: str) -> str:
    """That the pictures are not in the language asked for, where no font has its letters."""
    from ..flow.language import say

    style = require("bptt.plots", "plots").style
    if lang not in style.FONTS or style.font_of(lang) is not None:
        return ""
    return say("; their words are English: no font here has Chinese letters (install one, such as Noto Sans CJK SC)")


def opening(found: Survey) -> str:
    """What was measured on what, a line each."""
    return "\n".join(f"  {set_cell_size(name, 8)}  {words}" for name, words in found.setting.entries)


def require_pictures() -> None:
    """Raise InputError where what draws is not installed: heard of before anything is measured."""
    require("matplotlib", "plots")
    require("plotly", "report")


def settled(make: Callable[[int | None], Subject], console: Console) -> Subject:
    """What is measured, in a window that is long enough for its horizon, shown on the way."""
    from .window import long_enough

    with console.status("looking for the horizon") as status:
        return long_enough(make, lambda steps: status.update(f"looking for the horizon in {steps} steps"))


def measured(of: Subject, lags: int | None, console: Console) -> Survey:
    """Everything measured, shown on the way."""
    from rich.progress import BarColumn, Progress, TextColumn

    from ..flow import STAGES, survey
    from ..flow.language import say
    from .window import LONGER, unsettled

    with Progress(
        TextColumn("measuring {task.description}"), BarColumn(bar_width=20), console=console, transient=True
    ) as bar:
        task = bar.add_task("", total=len(STAGES))
        found = survey(
            of.recording,
            name=of.name,
            lags=lags,
            records=of.records,
            data=of.data,
            seed=of.seed,
            on_stage=lambda stage: bar.update(task, description=stage, completed=STAGES.index(stage)),
        )
    notes = of.notes
    if not notes and found.lags is not None and unsettled(found.lags):
        T, K = of.recording.T, int(found.lags.measured.max())
        longer = f"--steps {LONGER * T}" if lags is None or lags >= T else f"--lags {min(LONGER * K, T)}"
        text = "The horizon has not settled in {steps} steps; measure longer: {longer}"
        notes = (say(text, steps=K, longer=longer),)
    return replace(found, notes=notes)


def write_report(found: Survey, directory: Path) -> Path:
    """report.html, and every picture as a PNG beside it."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, figure in require("bptt.plots", "plots").figures(found):
        write_picture(figure, directory / f"{name}.png")
    written: Path = require("bptt.report", "report").write(directory / "report.html", found)
    return written
