"""`bptt check`: do all ways to the gradient agree on this machine, and is somebody's layer right?"""

from __future__ import annotations

from typing import Annotated

import typer

from .check_options import check_asked

__all__ = ["check"]


def check(
    module: Annotated[
        str | None,
        typer.Option(
            metavar="PACKAGE.CLASS",
            help="audit this layer instead: any importable recurrent layer with torch.nn's call form, as torch.nn.LSTM",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="where the audited layer runs: cpu, cuda, mps (default: cpu)", show_default=False)
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="precision the audited layer runs in: float64, float32 (default: float64, on mps float32)",
            show_default=False,
        ),
    ] = None,
) -> int:
    """Compare kernels, equations, autograd and finite differences on small nets of every cell.

    Prints the largest relative error of each against the NumPy equations, over outputs, final states and all gradients.
    With --module: the same for somebody's layer, tensor by tensor: layers, directions, packed batches, dropout.
    Exit status 1 if one is above its tolerance.
    """
    check_asked(module, device, dtype)

    from .checked import audited, compared

    return compared() if module is None else audited(module, device or "cpu", dtype)
