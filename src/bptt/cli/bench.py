"""`bptt bench`: how fast, against what else there is."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Annotated

import typer

from ..train import InputError
from ..train.options import CELLS
from .bench_options import (
    CALIBRATION_FILE,
    COMPILE_SECONDS,
    FLAGS,
    LAYER_SHAPES,
    STEP_CELLS,
    STEP_SHAPES,
    TABLES,
    USUAL_STEP_SHAPES,
    USUAL_STEPS,
    USUAL_TABLES,
    cells_of,
    check_kernel,
    names_of,
    shapes_of,
    threads_of,
)

__all__ = ["bench"]

COMPILERS = ("c++", "g++", "clang++")
"""One of them is what torch.compile needs."""


def bench(
    tables: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TABLE]...", help=f"{', '.join(TABLES)} (default: the first four)", show_default=False),
    ] = None,
    cell: Annotated[
        str | None,
        typer.Option(
            "--cell",
            "--cells",
            metavar="CELL,...",
            help=f"which cells (default: {', '.join(CELLS)}; of steps {', '.join(USUAL_STEPS)})",
            show_default=False,
        ),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            "--shape",
            "--shapes",
            metavar="T,B,I,H",
            help=f"shape of the layers, or T,B,H of the steps; may be given again (default: {LAYER_SHAPES} and "
            f"{USUAL_STEP_SHAPES} of them)",
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
            "--all", help=f"all {len(STEP_CELLS)} cells of the steps, on {STEP_SHAPES} shapes: an hour and more"
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
            f"kernel='auto' goes by the file that the environment variable {CALIBRATION_FILE} names",
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
    chosen = names_of("table", tables, TABLES) if tables else ("layers",) if quick else USUAL_TABLES
    if calibrate:
        given = {"a table": tables, "--peers": peers, "--quick": quick, "--add": add, "--kernel": kernel != "auto"}
        if excluded := [name for name, value in given.items() if value]:
            raise InputError(f"calibrate measures all that auto chooses between: got it with {', '.join(excluded)}")
        if json is None:
            raise InputError("calibrate writes a file: give --json FILE")
    for option, value in (("shape", shape), ("peers", peers)):
        if value and not calibrate and not {"layers", "steps"} & {*chosen}:
            raise InputError(f"{option} is for the tables layers and steps: got {option} with {', '.join(chosen)}")
    for option, flag in (("all", everything), ("compile", compiled)):
        if flag and (calibrate or "steps" not in chosen):
            raise InputError(f"{option} is for the table steps: got {option} with {', '.join(chosen)}")
    if quick and everything:
        raise InputError("quick and all exclude one another: got both")
    if compiled and not any(map(shutil.which, COMPILERS)):
        raise InputError(f"compile needs a C++ compiler, one of {', '.join(COMPILERS)}: found none")
    if peers is not None:
        names_of("peers", peers.split(","), FLAGS)
    if seconds is not None and not 0 <= seconds < math.inf:
        raise InputError(f"seconds must be a finite number of at least 0: got {seconds}")
    if not 0 < compile_seconds < math.inf:
        raise InputError(f"compile-seconds must be a finite number above 0: got {compile_seconds}")
    if json is not None and (json.is_dir() or not json.parent.is_dir()):
        raise InputError(f"json must be a file in a directory that is there: got {str(json)!r}")
    if add and json is None:
        raise InputError("add is for a file of measurements: give --json FILE")
    cells_of(("layers",) if calibrate else chosen, cell, everything)
    shapes_of(("layers",) if calibrate else chosen, shape or [])
    counts = threads_of(threads)
    if not calibrate:
        check_kernel(chosen, kernel)

    from .benched import run_bench

    return run_bench(
        tables=None if calibrate else chosen,
        cell=cell,
        shape=shape or [],
        threads=counts,
        peers=peers,
        kernel=kernel,
        seconds=seconds,
        quick=quick,
        everything=everything,
        compiled=compiled,
        compile_seconds=compile_seconds,
        json=json,
        add=add,
    )
