"""`bptt compare`: gradient policies against the full gradient, on the same batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .. import policies
from ..flow import POLICIES, Comparison, Recording, Row, Scanned, conclusion
from ..flow import compare as compared
from ..flow.costs import disturbance, duration, mebibytes, memory_of_all
from ..train import InputError
from ..train.extras import require
from .scanned import load
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
    subject,
)

__all__ = ["compare"]


def compare(
    run: RunArgument = None,
    more: Annotated[
        list[str] | None, typer.Argument(metavar="[POLICY]...", help="policies to compare", show_default=False)
    ] = None,
    gradient: Annotated[
        list[str] | None, typer.Option("--gradient", help=f"policies to compare (default: {' '.join(POLICIES)})")
    ] = None,
    scan: Annotated[
        str | None,
        typer.Option(
            "--scan",
            metavar="MODULE:FUNCTION",
            help="a scan of your own instead: a function that returns bptt.flow.scanned(...)",
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
    repeats: Annotated[int, typer.Option(help="samples of each policy's time, at least 5")] = 9,
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
    require("matplotlib", "plots")
    named = [*(gradient or []), *(more or [])]
    alone = cell is not None or scan is not None
    if run is not None and alone and not run.exists():  # without a run, the first policy stands in its place
        run, named = None, [*(gradient or []), str(run), *(more or [])]
    try:
        chosen = [policies.parse(text) for text in named or POLICIES]
    except ValueError as error:
        raise InputError(str(error)) from None
    fresh = {"cell": cell, "hidden": hidden, "layers": layers, "nonlinearity": nonlinearity, "radius": radius}
    if scan is None:
        of = subject(run, steps, lanes, **fresh, seed=seed)
        name, directory = of.name, of.directory
        measured: Recording | Scanned = of.recording
    else:
        given = {"steps": steps, "lanes": lanes, **fresh, "a run": run}
        if named_too := [option for option, value in given.items() if value is not None]:
            raise InputError(f"a scan has its own step and batch: leave out {', '.join(named_too)}")
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
    shown.print(_table(found))
    for text in _conditions(found):
        shown.print(text, highlight=False, markup=False)
    directory = directory if out is None else out
    directory.mkdir(parents=True, exist_ok=True)
    picture = directory / "comparison.png"
    plots = require("bptt.plots", "plots")
    plots.comparison(found).savefig(picture)
    shown.print(f"picture: {picture}", highlight=False, markup=False, soft_wrap=True)


def _table(found: Comparison) -> Table:
    table = Table(
        box=SIMPLE_HEAD,
        caption="bias, variance: relative to the full gradient's norm and its square; exact, or ± a standard error; "
        "in brackets: sampled though the variance is infinite on long sequences, so that neither means much; "
        "time: median and quartiles" + ("" if found.own is None else "; *: the network's own policy"),
    )
    table.add_column("gradient", no_wrap=True)
    memory = memory_of_all(found) is None
    for name in ("bias", "cosine", "variance", "time, ms", *(("memory, MiB",) if memory else ())):
        table.add_column(name, justify="right", no_wrap=True)
    for row in found.rows:
        own = " *" if row.policy == found.own else ""
        table.add_row(row.policy + own, *_cells(row), *((mebibytes(row),) if memory else ()))
    return table


def _cells(row: Row) -> tuple[str, ...]:
    def number(value: float, error: float) -> str:
        return f"{value:.3g}" + (f" ± {error:.1g}" if error else "")

    bias, variance = number(row.bias, row.bias_error), number(row.variance, row.variance_error)
    if not row.reliable:
        bias, variance = f"({bias})", f"({variance})"
    return bias, f"{row.cosine:.4f}", variance, duration(row)


def _conditions(found: Comparison) -> Iterator[str]:
    """What the table shows, and what it is subject to."""
    said = conclusion(found)
    yield said
    memory = memory_of_all(found)
    if memory is not None:
        yield f"memory of one forward and backward: {memory} MiB under each"
    if found.disturbed and disturbance(found) not in said:
        yield f"the times are not to be trusted: {disturbance(found)}"
    yield _condition(found)


def _condition(found: Comparison) -> str:
    """The condition for a finite variance, with the measured contraction: (6.18)."""
    rate, critical = found.contraction, found.critical_p
    if critical >= 1:
        return f"adjoints change by {rate:.3g} per step: no keep probability bounds the variance on long sequences"
    return (
        f"adjoints change by {rate:.3g} per step: the variance of randomized truncation stays finite on long sequences "
        f"for p > {rate:.3g}^2 = {critical:.3g}"
    )
