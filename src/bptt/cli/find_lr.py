"""`bptt find-lr`: which learning rate to begin with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..train import InputError
from ..train.extras import require
from ..train.rates import check_range
from .checked_options import config_of
from .options import with_training_options

__all__ = ["find_lr"]

LATER = (
    *("learning_rate", "schedule", "warmup", "steps", "epochs", "patience", "on_nonfinite", "adapt_every"),
    *("log_every", "eval_every", "save_every", "keep"),
)
"""Options of a run that a test has no use for; a configuration file may hold them."""


@with_training_options(without=LATER)
def find_lr(
    config_file: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="options from a TOML file; flags win")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="picture to write, with its numbers as .csv beside")] = Path(
        "learning-rate.png"
    ),
    lowest: Annotated[float, typer.Option(help="first learning rate")] = 1e-5,
    highest: Annotated[float, typer.Option(help="last learning rate")] = 10.0,
    tries: Annotated[int, typer.Option(help="steps, each at a higher rate")] = 100,
    **options: Any,
) -> None:
    """Find a learning rate to begin with: train some steps at rising rates, and draw the loss at each.

    Takes the data, model and optimisation options of bptt train, for every task. A network of its own is trained, from
    the first weights; no run is touched. It ends where the loss grows. What it suggests holds for these options.
    """
    check_range(lowest, highest, tries)
    config, _ = config_of(config_file, {name: value for name, value in options.items() if value is not None})
    if out.suffix.lower() != ".png" or out.is_dir():
        raise InputError(f"out must be the name of a .png file: got {out}")
    if not out.parent.is_dir():
        raise InputError(f"out {out} must lie in a directory that is there: {out.parent} is none")
    require("matplotlib", "plots")

    from rich.console import Console

    from ..train import prepare, rate_test
    from ..train.atomic import write
    from .pictures import write_picture

    console = Console(stderr=True)
    with console.status("reading the data") as status:
        found = rate_test(
            prepare(config),
            config,
            lowest=lowest,
            highest=highest,
            steps=tries,
            on_step=lambda step: status.update(f"step {step.step}/{tries}"),
        )
    rows = zip(found.rates.tolist(), found.losses.tolist(), found.smoothed.tolist(), strict=True)
    table = "learning_rate,loss,smoothed\n" + "".join(f"{rate!r},{loss!r},{mean!r}\n" for rate, loss, mean in rows)
    write(out.with_suffix(".csv"), table.encode())
    plots = require("bptt.plots", "plots")
    drawn = plots.rate_test(found.rates, found.losses, found.smoothed, found.suggestion, found.said, found.conditions)
    write_picture(drawn, out)
    typer.echo(f"{found.said}\n  {found.conditions}\npicture: {out}; numbers: {out.with_suffix('.csv')}")
