"""The options that say what `bptt flow` and `bptt compare` measure; `subject` makes it. Nothing here loads torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from ..train import Config, InputError
from ..train.imported import found_module
from ..train.options import CELL, CELLS, LANES, has_kernels, layer_cells, with_nonlinearity
from ..train.runs import options_of

__all__ = [
    "CellOption",
    "HiddenOption",
    "LanesOption",
    "LayersOption",
    "NonlinearityOption",
    "RadiusOption",
    "RunArgument",
    "SeedOption",
    "StepsOption",
    "check_scan",
    "check_subject",
]

NONLINEARITIES = ("tanh", "relu", "sigmoid", "identity")
"""Those of `bptt.nn.RNN`."""

RunArgument = Annotated[
    Path | None, typer.Argument(metavar="[RUN]", help="run directory of bptt train", show_default=False)
]
CellOption = Annotated[
    str | None, typer.Option("--cell", help=f"a fresh layer instead of a run: {', '.join(CELL.choices)}")
]
HiddenOption = Annotated[int | None, typer.Option("--hidden", help="units of the fresh layer (default: 64)")]
LayersOption = Annotated[int | None, typer.Option("--layers", help="layers of the fresh net (default: 1)")]
NonlinearityOption = Annotated[
    str | None, typer.Option("--nonlinearity", help=f"of a fresh rnn: {', '.join(NONLINEARITIES)} (default: tanh)")
]
RadiusOption = Annotated[
    float | None,
    typer.Option(
        "--radius",
        help=f"spectral radius of the recurrent weights of a fresh {', '.join(CELLS)} (default: as torch draws)",
    ),
]
StepsOption = Annotated[
    int | None, typer.Option("--steps", help="T (default: the run's seq_length; 100 for a fresh layer)")
]
LanesOption = Annotated[int | None, typer.Option("--lanes", help=f"B (default: at most {LANES})")]
SeedOption = Annotated[int | None, typer.Option("--seed", help="of a fresh layer and its input (default: 0)")]


def check_subject(run: Path | None, steps: int | None, lanes: int | None, **fresh: Any) -> None:
    """Raise InputError for what is neither a run nor a fresh layer. fresh: the options of one, None if not given."""
    given = {name: value for name, value in fresh.items() if value is not None}
    if run is not None:
        if given:
            names = ", ".join(f"--{name}" for name in given)
            raise InputError(f"a run has its own network: leave out {names}, or give --cell without a run")
        options_of(run)
    elif "cell" not in given:
        raise InputError("give a run directory, or --cell for a fresh layer")
    sizes = {"hidden": given.get("hidden"), "layers": given.get("layers"), "steps": steps, "lanes": lanes}
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1: got {value}")
    if "seed" in given:
        Config.check("seed", given["seed"])
    if run is None:
        _check_cell(Config.check("cell", given["cell"]), given.get("nonlinearity"), given.get("radius"))


def check_scan(text: str) -> None:
    """Raise InputError for text that is no MODULE:FUNCTION, and for a module that is nowhere."""
    module, _, name = text.partition(":")
    if not (module and name):
        raise InputError(
            f"scan must be MODULE:FUNCTION, of a function that returns bptt.flow.scanned(...): got {text!r}"
        )
    found_module("scan", text)


def _check_cell(cell: str, nonlinearity: str | None, radius: float | None) -> None:
    """Raise InputError for a module that is nowhere, and for options of other cells."""
    if ":" in cell:
        found_module("cell", cell)
    if nonlinearity is not None:
        if cell not in with_nonlinearity():
            able = " or ".join(with_nonlinearity())
            raise InputError(f"nonlinearity is for --cell {able}: got {nonlinearity!r} with --cell {cell}")
        if nonlinearity not in NONLINEARITIES:
            raise InputError(f"nonlinearity must be one of {', '.join(NONLINEARITIES)}: got {nonlinearity!r}")
    if radius is not None:
        if not has_kernels(cell):
            able = " or ".join(layer_cells())
            raise InputError(f"radius is for --cell {able}: got {radius:g} with --cell {cell}")
        if not 0 <= radius < math.inf:
            raise InputError(f"radius must be a finite number of at least 0: got {radius:g}")
