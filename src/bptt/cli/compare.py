"""`bptt compare`: gradient policies against the full gradient, on the same batch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from .. import policies
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
    check_scan,
    check_subject,
)

if TYPE_CHECKING:
    from ..flow import Recording, Scanned

__all__ = ["compare"]

LEAST_REPEATS = 5
"""As `bptt.flow.compare` has it."""


def compare(
    run: RunArgument = None,
    more: Annotated[
        list[str] | None, typer.Argument(metavar="[POLICY]...", help="policies to compare", show_default=False)
    ] = None,
    gradient: Annotated[
        list[str] | None,
        typer.Option(
            "--gradient",
            metavar="POLICY",
            help=f"policies to compare (default: {len(policies.COMPARED)}, one or two of each kind)",
        ),
    ] = None,
    scan: Annotated[
        str | None,
        typer.Option(
            "--scan",
            metavar="SCAN",
            help="a scan of your own instead: MODULE:FUNCTION, which returns flow.scanned(...)",
        ),
    ] = None,
    cell: CellOption = None,
    hidden: HiddenOption = None,
    layers: LayersOption = None,
    nonlinearity: NonlinearityOption = None,
    radius: RadiusOption = None,
    steps: StepsOption = None,
    lanes: LanesOption = None,
    draws: Annotated[int, typer.Option(help="of a random policy, where its cuts are too many to enumerate")] = 200,
    repeats: Annotated[int, typer.Option(help=f"samples of each policy's time, at least {LEAST_REPEATS}")] = 9,
    seed: SeedOption = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="where comparison.png goes (default: RUN/flow, or flow)")
    ] = None,
) -> None:
    """Compare gradient policies: bias, cosine, variance, time and memory, as a table and a picture.

    The policy that the network is trained with is always among them, and marked with a star.

    Of a run's network on its own text, of a fresh layer (--cell) on noise, or of a step of your own (--scan). Policies
    follow --gradient:

    bptt compare RUN --gradient full chunked:35 truncated:20 randomized:0.9
    """
    named = [*(gradient or []), *(more or [])]
    alone = cell is not None or scan is not None
    if run is not None and alone and not run.exists():  # without a run, the first policy stands in its place
        run, named = None, [*(gradient or []), str(run), *(more or [])]
    try:
        chosen = [policies.parse(text) for text in named or policies.COMPARED]
    except ValueError as error:
        raise InputError(str(error)) from None
    if draws < 2:
        raise InputError(f"draws must be at least 2, for a variance: got {draws}")
    if repeats < LEAST_REPEATS:
        raise InputError(f"repeats must be at least {LEAST_REPEATS}, for a median with its quartiles: got {repeats}")
    fresh: dict[str, Any] = {"cell": cell, "hidden": hidden, "layers": layers}
    fresh |= {"nonlinearity": nonlinearity, "radius": radius}
    if scan is None:
        check_subject(run, steps, lanes, **fresh, seed=seed)
    else:
        given = {"steps": steps, "lanes": lanes, **fresh, "a run": run}
        if named_too := [option for option, value in given.items() if value is not None]:
            raise InputError(f"a scan has its own step and batch: leave out {', '.join(named_too)}")
        check_scan(scan)
    require("matplotlib", "plots")

    from ..flow import compare as compared
    from .compared import conditions, table
    from .scanned import load
    from .subject import subject

    if scan is None:
        of = subject(run, steps, lanes, **fresh, seed=seed)
        name, directory = of.name, of.directory
        measured: Recording | Scanned = of.recording
    else:
        measured, name, directory = load(scan), scan, Path("flow")
    console = Console(stderr=True)
    try:
        with console.status(f"comparing {len(chosen)} policies"):
            found = compared(measured, policies=chosen, draws=draws, repeats=repeats, seed=seed or 0)
    except ValueError as error:
        raise InputError(str(error)) from None
    shown = Console()
    if not shown.is_terminal:  # a log has no width of its own; rich would assume 80 and cut columns off
        shown = Console(width=120)
    shown.print(f"{name}: {found.T} steps, {found.B} lanes", highlight=False, markup=False)
    shown.print(table(found))
    for text in conditions(found):
        shown.print(text, highlight=False, markup=False)
    directory = directory if out is None else out
    directory.mkdir(parents=True, exist_ok=True)
    picture = directory / "comparison.png"
    plots = require("bptt.plots", "plots")
    write_picture(plots.comparison(found), picture)
    shown.print(f"picture: {picture}", highlight=False, markup=False, soft_wrap=True)
