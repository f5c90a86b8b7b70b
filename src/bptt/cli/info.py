"""`bptt info`: what there is to compute with."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

__all__ = ["info"]


def info() -> None:
    """Show versions, processor, threads, kernels and optional packages."""
    from .inventory import rows

    table = Table(show_header=False, box=None)
    for name, value in rows():
        table.add_row(escape(name), escape(value))
    Console().print(table, soft_wrap=True)
