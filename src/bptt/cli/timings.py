"""Measured rows as they are shown: lines, tables, what is wrong, and which goals are met."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ..bench import TABLES, TOLERANCE, Row, judge
from ..bench.words import digits, threads_in_words

__all__ = ["line", "show"]

COMPILERS = ("JAX", "compiled")
"""The rivals of steps whose first call compiles."""


def line(row: Row) -> str:
    """One row on one line."""
    times = ", ".join(f"{name} {_milliseconds(row, name)}" for name in row.errors)
    return f"{row.case}, {threads_in_words(row.threads)}: {times} ms"


def show(rows: Sequence[Row], console: Console) -> None:
    """One table per kind and number of threads, what is wrong, and which goals are met."""
    for name, threads in dict.fromkeys((row.table, row.threads) for row in rows):
        some = [row for row in rows if (row.table, row.threads) == (name, threads)]
        console.print(_table(some))
        if name == "steps":
            console.print(_errors(some))
    for threads in dict.fromkeys(row.threads for row in rows if row.disturbed):
        got = min(row.cores for row in rows if row.threads == threads)
        console.print(
            f"not to be trusted on {threads_in_words(threads)}: other programs left it {got:.1f} cores",
            style="bold yellow",
            soft_wrap=True,
        )
    for row in rows:
        for name in row.wrong:
            console.print(
                f"not timed: {name} on {row.case} is off by {row.errors[name]:.1e} of the largest entry "
                f"(<= {TOLERANCE:.0e}), {threads_in_words(row.threads)}",
                style="bold red",
                soft_wrap=True,
            )
        for name, reason in row.missing.items():
            console.print(
                f"not timed: {name} on {row.case}, {threads_in_words(row.threads)}: {reason}",
                style="yellow",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
    for verdict in judge(rows):
        console.print(
            str(verdict), style="green" if verdict.met else "yellow", markup=False, highlight=False, soft_wrap=True
        )


def _table(rows: Sequence[Row]) -> Table:
    rate = statistics.median(row.gemm for row in rows) / 1e9
    held = threads_in_words(rows[0].threads)
    title = f"{TABLES[rows[0].table].title}, {held}, a matrix product runs at {rate:.0f} GFLOP/s"
    layers = any(row.share is not None for row in rows)
    steps = rows[0].table == "steps"
    caption = (
        "x: times as long as the first; ~: that differ by less than the spread"
        + ("; share: of those GFLOP/s" if layers else "")
        + ("; first: that the first call took more than later ones" if steps else "")
    )
    table = Table(title=title, caption=caption, box=SIMPLE_HEAD)
    table.add_column("T, B, H" if steps else "T, B, I, H", no_wrap=True)
    table.add_column("cell", no_wrap=True)
    rivals = list(dict.fromkeys(rival for row in rows for rival in (*row.rivals, *row.missing)))
    for header in (f"{rows[0].subject} ms", "quartiles", *(f"{rival} x" for rival in rivals)):
        table.add_column(header, justify="right", no_wrap=True)
    if layers:
        table.add_column("share", justify="right")
    if steps:
        table.add_column("first ms", justify="right", no_wrap=True)
    for row in rows:
        timing = row.times.get(row.subject)
        table.add_row(
            *_what(row),
            _milliseconds(row, row.subject),
            "" if timing is None else f"{digits(timing.low * 1e3)} .. {digits(timing.high * 1e3)}",
            *(_ratio(row, rival) for rival in rivals),
            *([] if row.share is None else [f"{row.share:.0%}"]),
            *([_first(row, row.subject)] if steps else []),
        )
    return table


def _errors(rows: Sequence[Row]) -> Table:
    """By how much each contender's tensors differ from the loop in float64, and what compilers take at first."""
    title = f"largest errors before the timing, {threads_in_words(rows[0].threads)}"
    caption = f"of the largest entry of a tensor, against the loop in float64; right up to {TOLERANCE:.0e}"
    table = Table(title=title, caption=caption, box=SIMPLE_HEAD)
    table.add_column("T, B, H", no_wrap=True)
    table.add_column("cell", no_wrap=True)
    names = list(dict.fromkeys(name for row in rows for name in row.errors))
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    compilers = [name for name in COMPILERS if name in names]
    for name in compilers:
        table.add_column(f"{name} first ms", justify="right", no_wrap=True)
    for row in rows:
        shown = (f"{row.errors[name]:.1e}" if name in row.errors else "" for name in names)
        table.add_row(*_what(row), *shown, *(_first(row, name) for name in compilers))
    return table


def _first(row: Row, name: str) -> str:
    """Milliseconds that a contender's first call took more than later ones."""
    return digits(row.first[name] * 1e3) if name in row.first else ""


def _what(row: Row) -> tuple[str, str]:
    """The shape and the cell, with its policy where that is not the full gradient, and what else sets it apart."""
    case = row.case
    if row.table == "steps":
        return f"{case.T}, {case.B}, {case.H}", " ".join((case.cell, *case.marks))
    return ", ".join(map(str, case.shape)), " ".join((case.cell.upper(), *case.marks))


def _milliseconds(row: Row, name: str) -> str:
    return digits(row.times[name].median * 1e3) if name in row.times else "wrong"


def _ratio(row: Row, rival: str) -> str:
    if rival not in row.errors:
        return "-" if rival in row.missing else ""
    ratio = row.ratio(rival)
    return "wrong" if ratio is None else f"{digits(ratio)} ~" if row.alike(rival) else digits(ratio)
