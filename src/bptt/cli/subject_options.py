"""The options that say what `bptt flow` and `bptt compare` measure; `subject` makes it. Nothing here loads torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..train.options import CELLS, LANES

__all__ = [
    "NAMES",
    "CellOption",
    "HiddenOption",
    "LanesOption",
    "LayersOption",
    "NonlinearityOption",
    "RadiusOption",
    "RunArgument",
    "SeedOption",
    "StepsOption",
]

NAMES = " or ".join(", ".join(CELLS).rsplit(", ", 1))
RunArgument = Annotated[
    Path | None, typer.Argument(metavar="[RUN]", help="run directory of bptt train", show_default=False)
]
CellOption = Annotated[str | None, typer.Option("--cell", help=f"a fresh layer instead of a run: {NAMES}")]
HiddenOption = Annotated[int | None, typer.Option("--hidden", help="units of the fresh layer (default: 64)")]
LayersOption = Annotated[int | None, typer.Option("--layers", help="layers of the fresh net (default: 1)")]
NonlinearityOption = Annotated[
    str | None, typer.Option("--nonlinearity", help="of a fresh rnn: tanh, relu, sigmoid or identity (default: tanh)")
]
RadiusOption = Annotated[
    float | None,
    typer.Option("--radius", help="spectral radius of the fresh recurrent weights (default: as torch draws them)"),
]
StepsOption = Annotated[
    int | None, typer.Option("--steps", help="T (default: the run's seq_length; 100 for a fresh layer)")
]
LanesOption = Annotated[int | None, typer.Option("--lanes", help=f"B (default: at most {LANES})")]
SeedOption = Annotated[int | None, typer.Option("--seed", help="of a fresh layer and its input (default: 0)")]
