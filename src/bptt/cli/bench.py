"""`bptt bench`: how fast, against what else there is."""

from __future__ import annotations

import importlib.util
import math
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .. import kernels, nn
from ..bench import (
    CALIBRATED,
    CALIBRATED_CELLS,
    CALIBRATION_TABLES,
    COMPILE_SECONDS,
    SHAPES,
    STEP_CELLS,
    STEP_SHAPES,
    TABLES,
    Machine,
    Results,
    Row,
    Selection,
    calibration_of,
    can_hold,
    cores,
    measured,
)
from ..scan import KERNELS, scan
from ..train import InputError
from ..train.atomic import write
from .comparison import compare
from .inventory import processor
from .timings import line, show

__all__ = ["bench"]

FLAGS = {"torch": "torch.nn", "jax": "JAX"}
"""What --peers says, and whom it means."""

COMPILERS = ("c++", "g++", "clang++")
"""One of them is what torch.compile needs."""

SHOWN = [name for name in TABLES if name not in CALIBRATION_TABLES]

QUICK = ((100, 1, 32, 32), (100, 32, 128, 128), (35, 32, 256, 256))


def bench(
    tables: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TABLE]...", help=f"{', '.join(SHOWN)} (default: the first four)", show_default=False),
    ] = None,
    cell: Annotated[
        str | None,
        typer.Option(
            "--cell",
            "--cells",
            metavar="CELL,...",
            help=f"which cells (default: {', '.join(nn.LAYERS)}; of steps {', '.join(Selection.step_cells)})",
            show_default=False,
        ),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            "--shape",
            "--shapes",
            metavar="T,B,I,H",
            help=f"shape of the layers, or T,B,H of the steps; may be given again (default: {len(SHAPES)} and "
            f"{len(Selection.step_shapes)} of them)",
        ),
    ] = None,
    threads: Annotated[
        str | None, typer.Option(metavar="N,...", help="numbers of threads (default: 1,2)", show_default=False)
    ] = None,
    peers: Annotated[
        str | None,
        typer.Option(
            metavar="PEER,...",
            help=f"whom to compare layers with, and steps: {', '.join(FLAGS)} (default: those there are)",
        ),
    ] = None,
    kernel: Annotated[str, typer.Option(help="bptt's kernel, and its scan's of the steps")] = "auto",
    seconds: Annotated[
        float | None, typer.Option(help="of each row, about (default: 2, quick 0.3)", show_default=False)
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="three shapes of the layers, one of the steps, a few runs of each")
    ] = False,
    everything: Annotated[
        bool,
        typer.Option(
            "--all", help=f"all {len(STEP_CELLS)} cells of the steps, on {len(STEP_SHAPES)} shapes: an hour and more"
        ),
    ] = False,
    compiled: Annotated[
        bool, typer.Option("--compile", help="torch.compile of each step too: minutes, and takes a C++ compiler")
    ] = False,
    compile_seconds: Annotated[
        float, typer.Option(metavar="S", help="that torch.compile of one step may take; beyond, its row says so")
    ] = COMPILE_SECONDS,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="measure where torch's own layers are faster on this CPU, and save it by --json: "
            f"kernel='auto' goes by the file that the environment variable {kernels.VARIABLE} names",
        ),
    ] = False,
    json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="save the measurements, after each row")
    ] = None,
    add: Annotated[
        bool, typer.Option("--add", help="to the rows that FILE holds: what it has of all contenders is not run again")
    ] = False,
) -> int:
    """Time bptt against torch.nn, JAX and hand-written code: same inputs, in turn, medians.

    Nothing is timed that has not passed its check; exit status 1 names what failed.
    Each number of threads has a process of its own, held to as many cores.
    Ctrl-C shows what has been measured so far; --json and --add go on from there another time.
    """
    console = Console()
    if not console.is_terminal:  # a log has no width of its own; rich would assume 80 and cut columns off
        console = Console(width=140)
    chosen = _names("table", tables, SHOWN) if tables else ("layers",) if quick else Selection.tables
    if calibrate:
        given = {"a table": tables, "--peers": peers, "--quick": quick, "--add": add, "--kernel": kernel != "auto"}
        if excluded := [name for name, value in given.items() if value]:
            raise InputError(f"calibrate measures all that auto chooses between: got it with {', '.join(excluded)}")
        if json is None:
            raise InputError("calibrate writes a file: give --json FILE")
        chosen = CALIBRATION_TABLES
    steps = "steps" in chosen
    for option, value in (("shape", shape), ("peers", peers)):
        if calibrate:
            break
        if value and not {"layers", "steps"} & {*chosen}:
            raise InputError(f"{option} is for the tables layers and steps: got {option} with {', '.join(chosen)}")
    for option, flag in (("all", everything), ("compile", compiled)):
        if flag and not steps:
            raise InputError(f"{option} is for the table steps: got {option} with {', '.join(chosen)}")
    if quick and everything:
        raise InputError("quick and all exclude one another: got both")
    if compiled and not any(map(shutil.which, COMPILERS)):
        raise InputError(f"compile needs a C++ compiler, one of {', '.join(COMPILERS)}: found none")
    cells, step_cells = _cells(chosen, cell or (",".join(CALIBRATED_CELLS) if calibrate else None), everything)
    shapes, step_shapes = _shapes(("layers",) if calibrate else chosen, shape or [])
    selection = Selection(
        tables=chosen,
        cells=cells,
        shapes=shapes or (CALIBRATED if calibrate else QUICK if quick else SHAPES),
        peers=() if calibrate else _peers(peers, console),
        kernel=kernel,
        seconds=(0.3 if quick or calibrate else 2.0) if seconds is None else seconds,
        least=3 if quick else 5,
        step_cells=step_cells,
        step_shapes=step_shapes or STEP_SHAPES[: None if everything else 1 if quick else len(Selection.step_shapes)],
        policies=not quick,
        compiled=compiled,
        compile_seconds=compile_seconds,
    )
    _check(selection)
    counts = _threads(threads)
    if json is not None and (json.is_dir() or not json.parent.is_dir()):
        raise InputError(f"json must be a file in a directory that is there: got {str(json)!r}")
    results = _begun(json, add, Results(Machine.here(processor(), cores()), kernel, ()))
    selection = replace(selection, known=results.rows)
    if wrong := [f"{row.net} {row.policy}" for row in compare() if not row.agrees]:
        console.print(f"not timed: these disagree with the equations, see bptt check: {'; '.join(wrong)}", style="red")
        return 1
    rows: list[Row] = []
    try:
        with _progress(sum(len(selection.left(count)) for count in counts)) as progress:
            for count in filter(selection.left, counts):
                with closing(measured(selection, count)) as measurement:
                    for row in measurement:
                        rows.append(replace(row, commit=results.machine.commit))
                        progress(row)
                        results = results.extended(rows[-1:])
                        if json is not None:
                            write(json, _text(results, calibrate))
    except KeyboardInterrupt:
        show(rows, console)
        raise
    show(rows, console)
    if json is not None:
        write(json, _text(results, calibrate))
        console.print(f"saved in {json}", markup=False, highlight=False, soft_wrap=True)
    return 1 if any(row.wrong for row in rows) else 0


def _text(results: Results, calibrate: bool) -> bytes:
    """What a file holds: all that was measured, or what a calibration says of it."""
    return (calibration_of(results.rows, results.machine) if calibrate else results).to_json().encode()


def _begun(file: Path | None, add: bool, new: Results) -> Results:
    """What a file holds, on the present machine and day; without `add`, nothing."""
    if not add:
        return new
    if file is None:
        raise InputError("add is for a file of measurements: give --json FILE")
    if not file.exists():
        return new
    try:
        old = Results.from_json(file.read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} holds no measurements of bptt bench: {error}") from None
    if differs := old.machine.differs(new.machine):
        pairs = (f"{name} {getattr(old.machine, name)}, here {getattr(new.machine, name)}" for name in differs)
        raise InputError(f"{file} was measured elsewhere, or with other versions: {'; '.join(pairs)}")
    if old.kernel != new.kernel:
        raise InputError(f"kernel must be that of {file}, {old.kernel}: got {new.kernel}")
    return replace(new, rows=old.rows)


def _names(option: str, given: Sequence[str], allowed: Collection[str]) -> tuple[str, ...]:
    """Names out of `allowed`, each once, or an InputError."""
    for name in given:
        if name not in allowed:
            raise InputError(f"{option} must be one of {', '.join(allowed)}: got {name!r}")
    return tuple(dict.fromkeys(given))


def _cells(tables: Collection[str], text: str | None, everything: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The cells of the layers, and those of the steps."""
    if text is None:
        return tuple(nn.LAYERS), tuple(STEP_CELLS) if everything else Selection.step_cells
    known = (nn.LAYERS if {*tables} - {"steps"} else {}) | (STEP_CELLS if "steps" in tables else {})
    given = _names("cell", text.split(","), known)
    return tuple(name for name in given if name in nn.LAYERS), tuple(name for name in given if name in STEP_CELLS)


def _shapes(
    tables: Collection[str], given: Sequence[str]
) -> tuple[tuple[tuple[int, int, int, int], ...], tuple[tuple[int, int, int], ...]]:
    """Those of four numbers, for the layers, and those of three, for the steps."""
    forms = {"layers": "four whole numbers of at least 1, T,B,I,H", "steps": "three, T,B,H"}
    layers: list[tuple[int, int, int, int]] = []
    steps: list[tuple[int, int, int]] = []
    for text in given:
        sizes = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
        match sizes:
            case [T, B, I, H] if min(sizes) > 0 and "layers" in tables:
                layers.append((T, B, I, H))
            case [T, B, H] if min(sizes) > 0 and "steps" in tables:
                steps.append((T, B, H))
            case _ if "layers" not in tables:
                raise InputError(f"shape must be three whole numbers of at least 1, T,B,H, for steps: got {text!r}")
            case _:
                wanted = " or ".join(form for name, form in forms.items() if name in tables)
                raise InputError(f"shape must be {wanted}: got {text!r}")
    return tuple(layers), tuple(steps)


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


def _check(selection: Selection) -> None:
    if not 0 <= selection.seconds < math.inf:
        raise InputError(f"seconds must be a finite number of at least 0: got {selection.seconds}")
    if not 0 < selection.compile_seconds < math.inf:
        raise InputError(f"compile-seconds must be a finite number above 0: got {selection.compile_seconds}")
    if not selection.cases():
        raise InputError(f"cell must be one that {', '.join(selection.tables)} has: got {','.join(selection.cells)!r}")
    if {*selection.tables} - {"steps"}:
        for cell in selection.cells:
            try:
                kernels.explain(getattr(nn, cell.upper())(1, 1, kernel=selection.kernel), torch.zeros(1, 1, 1))
            except (ValueError, RuntimeError) as error:
                raise InputError(str(error)) from None
    if "steps" in selection.tables and selection.kernel != "auto":
        _check_steps(selection)


def _check_steps(selection: Selection) -> None:
    """An InputError where the kernel is not one of scan's, or cannot run one of the steps."""
    if selection.kernel not in KERNELS:
        raise InputError(f"kernel must be one of {', '.join(KERNELS)} for steps: got {selection.kernel!r}")
    for cell in selection.step_cells:
        step, carry, xs, _ = STEP_CELLS[cell].make(2, 8, T=2)
        try:
            scan(step, carry, xs, kernel=selection.kernel)
        except (ValueError, RuntimeError) as error:
            raise InputError(f"{cell}: {error}") from None


@contextmanager
def _progress(total: int) -> Iterator[Callable[[Row], None]]:
    """What to call with every row: it moves a bar on a terminal, and prints a line elsewhere."""
    console = Console(stderr=True)
    columns = (MofNCompleteColumn(), BarColumn(bar_width=20), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=total)

        def progressed(row: Row) -> None:
            bar.update(task, advance=1, description=line(row))
            if not console.is_terminal:
                console.print(line(row), markup=False, highlight=False, soft_wrap=True)

        yield progressed
