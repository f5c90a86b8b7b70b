"""`bptt check`: do all ways to the gradient agree on this machine?"""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .comparison import compare, sources, tolerance

__all__ = ["check"]


def check() -> int:
    """Compare kernels, equations, autograd and finite differences on small nets of every cell.

    Prints the largest relative error of each against the NumPy equations, over outputs, final states and all gradients.
    Exit status 1 if one is above its tolerance.
    """
    console = Console()
    if not console.is_terminal:  # a log has no width of its own; rich would assume 80 and cut columns off
        console = Console(width=120)
    table = Table(title="largest relative error against the equations", caption="-: not applicable", box=SIMPLE_HEAD)
    table.add_column("cell", no_wrap=True)
    table.add_column("gradient", no_wrap=True)
    for source in sources():
        table.add_column("\n".join([*source.split(), f"<= {tolerance(source):.0e}"]), justify="right")
    rows = list(compare())
    wrong = sum(not row.agrees for row in rows)
    for row in rows:
        cells = []
        for source, error in row.errors.items():
            bad = error is not None and error > tolerance(source)
            text = "-" if error is None else f"{error:.1e}"
            cells.append(f"[bold red]{text} ![/]" if bad else text)
        table.add_row(row.net, row.policy, *cells)
    console.print(table)
    console.print(
        "all agree" if not wrong else f"{wrong} of {len(rows)} rows disagree", style="bold red" if wrong else "green"
    )
    return 1 if wrong else 0
