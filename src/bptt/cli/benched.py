"""What `bptt bench` runs, once its options are known to make sense."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .. import kernels, nn
from ..bench import (
    CALIBRATED,
    CALIBRATED_CELLS,
    CALIBRATION_TABLES,
    SHAPES,
    STEP_CELLS,
    STEP_SHAPES,
    Machine,
    Results,
    Row,
    Selection,
    calibration_of,
    can_hold,
    measured,
)
from ..scan import scan
from ..train import InputError
from ..train.atomic import write
from .bench_options import FLAGS, cells_of, cores, names_of, shapes_of
from .comparison import compare
from .inventory import processor
from .timings import line, show

__all__ = ["run_bench"]

QUICK = ((100, 1, 32, 32), (100, 32, 128, 128), (35, 32, 256, 256))


def run_bench(
    *,
    tables: Sequence[str] | None,
    cell: str | None,
    shape: Sequence[str],
    threads: Sequence[int],
    peers: str | None,
    kernel: str,
    seconds: float | None,
    quick: bool,
    everything: bool,
    compiled: bool,
    compile_seconds: float,
    json: Path | None,
    add: bool,
) -> int:
    """Time what `bptt bench` was asked for; returns the exit status. tables: None to calibrate."""
    console = Console()
    if not console.is_terminal:  # a log has no width of its own; rich would assume 80 and cut columns off
        console = Console(width=140)
    calibrate = tables is None
    chosen = CALIBRATION_TABLES if tables is None else tuple(tables)
    cells, step_cells = cells_of(chosen, cell or (",".join(CALIBRATED_CELLS) if calibrate else None), everything)
    shapes, step_shapes = shapes_of(("layers",) if calibrate else chosen, shape)
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
    results = _begun(json, add, Results(Machine.here(processor(), cores()), kernel, ()))
    selection = replace(selection, known=results.rows)
    if wrong := [f"{row.net} {row.policy}" for row in compare() if not row.agrees]:
        console.print(f"not timed: these disagree with the equations, see bptt check: {'; '.join(wrong)}", style="red")
        return 1
    rows: list[Row] = []
    try:
        with _progress(sum(len(selection.left(count)) for count in threads)) as progress:
            for count in filter(selection.left, threads):
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
    if not add or file is None or not file.exists():
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


def _peers(text: str | None, console: Console) -> tuple[str, ...]:
    given = tuple(FLAGS) if text is None else names_of("peers", text.split(","), FLAGS)
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
    """An InputError where the kernel cannot run one of the steps."""
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
