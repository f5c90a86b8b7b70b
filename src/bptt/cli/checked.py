"""What `bptt check` runs and prints: its own kernels compared, or somebody's layer audited."""

from __future__ import annotations

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ..train import InputError
from .audit import WEIGHTS, AuditResult, audit, load
from .check_options import DTYPES
from .comparison import compare, sources, tolerance

__all__ = ["audited", "compared"]


def compared() -> int:
    """Every kernel against the equations as a table: a row a cell and policy. Returns the exit status."""
    console = _console()
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
            cells.append("-" if error is None else _shown(error, tolerance(source)))
        table.add_row(row.net, row.policy, *cells)
    console.print(table)
    return _said(console, wrong, f"{wrong} of {len(rows)} rows disagree")


def audited(module: str, device: str, dtype: str | None) -> int:
    """The audit as a table: a row a case, a column a tensor; of a weight the worst layer and direction."""
    kind, where = load(module), _device(device)
    dtype = dtype or ("float32" if where.type == "mps" else "float64")
    console = _console()
    rows = list(audit(kind, where, getattr(torch, dtype)))
    columns = ["y", "h_n", "c_n", "x", "h_0", "c_0", *WEIGHTS]
    shown = [column for column in columns if any(_of(row, column) for row in rows)]
    table = Table(
        title=f"{module} on {where}, {dtype}: largest relative error against the equations",
        caption="y, h_n, c_n: values; the others: gradients, from random cotangents.\n"
        f"Agrees up to {DTYPES[dtype]:.0e}. -: not applicable. inf: missing, or not a number.",
        box=SIMPLE_HEAD,
    )
    table.add_column("case")
    for column in shown:
        table.add_column(column, justify="right", no_wrap=True)
    refused = [row for row in rows if row.refused]
    for row in rows:
        errors = [_of(row, column) for column in shown]
        table.add_row(row.case, *(_shown(max(e), DTYPES[dtype]) if e else "-" for e in errors))
    console.print(table)
    for row in refused:
        console.print(f"not audited: {row.case}: {' '.join(row.refused.split())}", style="yellow", markup=False)
    if rows[0].refused:
        raise InputError(
            f"--module must name a recurrent layer with torch.nn's call form: {module} refuses a plain call"
        )
    wrong = sum(bool(row.wrong(dtype)) for row in rows)
    return _said(console, wrong, f"{wrong} of {len(rows) - len(refused)} cases disagree")


def _of(row: AuditResult, column: str) -> list[float]:
    """The errors of a column: of a weight, those of all layers and directions."""
    names = (f"{WEIGHTS[column]}_l",) if column in WEIGHTS else ()
    return [error for name, error in row.errors.items() if name == column or name.startswith(names)]


def _device(name: str) -> torch.device:
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # AssertionError: torch without CUDA
        reason = str(error).splitlines()[0]
        raise InputError(f"--device must be a device this torch can use: got {name!r} ({reason})") from None


def _shown(error: float, tolerance: float) -> str:
    return f"{error:.1e}" if error <= tolerance else f"[bold red]{error:.1e} ![/]"


def _said(console: Console, wrong: int, disagreement: str) -> int:
    console.print(disagreement if wrong else "all agree", style="bold red" if wrong else "green")
    return 1 if wrong else 0


def _console() -> Console:
    console = Console()
    # A log has no width of its own; rich would assume 80 and cut columns off.
    return console if console.is_terminal else Console(width=140)
