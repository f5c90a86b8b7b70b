"""`bptt bench`: how fast, against what else there is."""

from __future__ import annotations

import importlib.util
import math
import statistics
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .. import kernels, nn
from ..bench import (
    SHAPES,
    TABLES,
    TOLERANCE,
    Machine,
    Plan,
    Results,
    Row,
    can_hold,
    cores,
    judge,
    measured,
)
from ..bench.words import digits, threads_in_words
from ..train import InputError
from ..train.atomic import write
from .comparison import compare
from .info import processor

__all__ = ["bench"]

FLAGS = {"torch": "torch.nn", "jax": "JAX"}
"""What --peers says, and whom it means."""

QUICK = ((100, 1, 32, 32), (100, 32, 128, 128), (35, 32, 256, 256))


def bench(
    tables: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TABLE]...", help=f"{', '.join(TABLES)} (default: the first four)", show_default=False),
    ] = None,
    cell: Annotated[str, typer.Option(metavar="CELL,...", help="which cells")] = ",".join(nn.LAYERS),
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="T,B,I,H", help=f"shape of the layers; may be given again (default: {len(SHAPES)} of them)"
        ),
    ] = None,
    threads: Annotated[
        str | None, typer.Option(metavar="N,...", help="numbers of threads (default: 1,2)", show_default=False)
    ] = None,
    peers: Annotated[
        str | None,
        typer.Option(
            metavar="PEER,...", help=f"whom to compare layers with: {', '.join(FLAGS)} (default: those there are)"
        ),
    ] = None,
    kernel: Annotated[str, typer.Option(help="bptt's kernel")] = "auto",
    seconds: Annotated[
        float | None, typer.Option(help="of each row, about (default: 2, quick 0.3)", show_default=False)
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="three shapes of the layers, a few runs of each")] = False,
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="save the measurements")] = None,
) -> int:
    """Time bptt against torch.nn, JAX and hand-written code: same inputs, in turn, medians.

    Nothing is timed that has not passed its check; exit status 1 names what failed.
    Each number of threads has a process of its own, held to as many cores.
    Ctrl-C shows what has been measured so far.
    """
    console = Console()
    if not console.is_terminal:  # a log has no width of its own; rich would assume 80 and cut columns off
        console = Console(width=140)
    plan = Plan(
        tables=_names("table", tables, TABLES) if tables else ("layers",) if quick else Plan.tables,
        cells=_names("cell", cell.split(","), nn.LAYERS),
        shapes=tuple(map(_shape, shape)) if shape else QUICK if quick else SHAPES,
        peers=_peers(peers, console),
        kernel=kernel,
        seconds=(0.3 if quick else 2.0) if seconds is None else seconds,
        least=3 if quick else 5,
    )
    _check(plan)
    for option, value in (("shape", shape), ("peers", peers)):
        if value and "layers" not in plan.tables:
            raise InputError(f"{option} is for the table layers: got {option} with {', '.join(plan.tables)}")
    counts = _threads(threads)
    if json is not None and (json.is_dir() or not json.parent.is_dir()):
        raise InputError(f"json must be a file in a directory that is there: got {str(json)!r}")
    if wrong := [f"{row.net} {row.policy}" for row in compare() if not row.agrees]:
        console.print(f"not timed: these disagree with the equations, see bptt check: {'; '.join(wrong)}", style="red")
        return 1
    rows: list[Row] = []
    try:
        with _progress(len(plan.cases()) * len(counts)) as progress:
            for count in counts:
                with closing(measured(plan, count)) as measurement:
                    for row in measurement:
                        rows.append(row)
                        progress(row)
    except KeyboardInterrupt:
        _show(rows, console)
        raise
    _show(rows, console)
    if json is not None:
        results = Results(Machine.here(processor(), cores()), kernel, tuple(rows))
        write(json, results.to_json().encode())
        console.print(f"saved in {json}", markup=False, highlight=False, soft_wrap=True)
    return 1 if any(row.wrong for row in rows) else 0


def _names(option: str, given: Sequence[str], allowed: Collection[str]) -> tuple[str, ...]:
    """Names out of `allowed`, each once, or an InputError."""
    for name in given:
        if name not in allowed:
            raise InputError(f"{option} must be one of {', '.join(allowed)}: got {name!r}")
    return tuple(dict.fromkeys(given))


def _shape(text: str) -> tuple[int, int, int, int]:
    try:
        T, B, inputs, H = map(int, text.split(","))
    except ValueError:
        T = B = inputs = H = 0
    if min(T, B, inputs, H) < 1:
        raise InputError(f"shape must be four whole numbers of at least 1, T,B,I,H: got {text!r}")
    return T, B, inputs, H


def _threads(text: str | None) -> list[int]:
    if text is None:
        return [count for count in (1, 2) if count <= cores()]
    counts = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if not all(1 <= count <= cores() for count in counts):
        raise InputError(f"threads must be whole numbers in [1, {cores()}], the cores there are: got {text!r}")
    return list(dict.fromkeys(counts))


def _peers(text: str | None, console: Console) -> tuple[str, ...]:
    given = tuple(FLAGS) if text is None else _names("peers", text.split(","), FLAGS)
    reason = None
    if importlib.util.find_spec("jax") is None:
        reason = "jax is not installed: pip install 'bptt[bench]'"
    elif not can_hold():
        reason = "jax cannot be held to a number of threads on this system: this takes sched_setaffinity"
    if "jax" in given and reason is not None:
        if text is not None:
            raise InputError(reason)
        console.print(f"JAX's column is left out: {reason}", style="yellow", markup=False)
        given = tuple(name for name in given if name != "jax")
    return tuple(FLAGS[name] for name in given)


def _check(plan: Plan) -> None:
    if not 0 <= plan.seconds < math.inf:
        raise InputError(f"seconds must be a finite number of at least 0: got {plan.seconds}")
    if not plan.cases():
        raise InputError(f"cell must be one that {', '.join(plan.tables)} has: got {','.join(plan.cells)!r}")
    for cell in plan.cells:
        try:
            kernels.explain(getattr(nn, cell.upper())(1, 1, kernel=plan.kernel), torch.zeros(1, 1, 1))
        except (ValueError, RuntimeError) as error:
            raise InputError(str(error)) from None


@contextmanager
def _progress(total: int) -> Iterator[Callable[[Row], None]]:
    """What to call with every row: it moves a bar on a terminal, and prints a line elsewhere."""
    console = Console(stderr=True)
    columns = (MofNCompleteColumn(), BarColumn(bar_width=20), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=total)

        def show(row: Row) -> None:
            bar.update(task, advance=1, description=_line(row))
            if not console.is_terminal:
                console.print(_line(row), markup=False, highlight=False, soft_wrap=True)

        yield show


def _line(row: Row) -> str:
    times = ", ".join(f"{name} {_milliseconds(row, name)}" for name in row.errors)
    return f"{row.case}, {threads_in_words(row.threads)}: {times} ms"


def _show(rows: Sequence[Row], console: Console) -> None:
    """One table per kind and number of threads, what is wrong, and which goals are met."""
    for name, threads in dict.fromkeys((row.table, row.threads) for row in rows):
        console.print(_table([row for row in rows if (row.table, row.threads) == (name, threads)]))
    for threads in dict.fromkeys(row.threads for row in rows if row.disturbed):
        got = min(row.cores for row in rows if row.threads == threads)
        console.print(
            f"not to be trusted on {threads_in_words(threads)}: other programs left it {got:.1f} cores",
            style="bold yellow",
            soft_wrap=True,
        )
    for row in rows:
        for name in row.wrong:
            console.print(
                f"not timed: {name} on {row.case} is off by {row.errors[name]:.1e} of the largest entry "
                f"(<= {TOLERANCE:.0e}), {threads_in_words(row.threads)}",
                style="bold red",
                soft_wrap=True,
            )
    for verdict in judge(rows):
        console.print(
            str(verdict), style="green" if verdict.met else "yellow", markup=False, highlight=False, soft_wrap=True
        )


def _table(rows: Sequence[Row]) -> Table:
    rate = statistics.median(row.gemm for row in rows) / 1e9
    held = threads_in_words(rows[0].threads)
    title = f"{TABLES[rows[0].table].title}, {held}, a matrix product runs at {rate:.0f} GFLOP/s"
    layers = any(row.share is not None for row in rows)
    caption = "x: times as long as the first; ~: that differ by less than the spread" + (
        "; share: of those GFLOP/s" if layers else ""
    )
    table = Table(title=title, caption=caption, box=SIMPLE_HEAD)
    table.add_column("T, B, I, H", no_wrap=True)
    table.add_column("cell", no_wrap=True)
    rivals = list(dict.fromkeys(rival for row in rows for rival in row.rivals))
    for header in (f"{rows[0].subject} ms", "quartiles", *(f"{rival} x" for rival in rivals)):
        table.add_column(header, justify="right", no_wrap=True)
    if layers:
        table.add_column("share", justify="right")
    for row in rows:
        case, timing = row.case, row.times.get(row.subject)
        table.add_row(
            ", ".join(map(str, case.shape)),
            case.cell.upper() + (f" {case.gradient}" if case.gradient != "full" else ""),
            _milliseconds(row, row.subject),
            "" if timing is None else f"{digits(timing.low * 1e3)} .. {digits(timing.high * 1e3)}",
            *(_ratio(row, rival) for rival in rivals),
            *([] if row.share is None else [f"{row.share:.0%}"]),
        )
    return table


def _milliseconds(row: Row, name: str) -> str:
    return digits(row.times[name].median * 1e3) if name in row.times else "wrong"


def _ratio(row: Row, rival: str) -> str:
    if rival not in row.errors:
        return ""
    ratio = row.ratio(rival)
    return "wrong" if ratio is None else f"{digits(ratio)} ~" if row.alike(rival) else digits(ratio)
