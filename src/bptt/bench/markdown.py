"""The README's tables, from saved results."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from ..nn import LAYERS
from .results import Results, Row
from .tables import TABLES
from .words import digits, threads_in_words

__all__ = ["markdown", "short_markdown"]


def markdown(results: Results) -> str:
    """Where it was measured; then for each number of threads a table of the layers, and one of everything else."""
    machine = results.machine
    jax = f", JAX {machine.jax}" if any("JAX" in row.times for row in results.rows) else ""
    parts = [
        f"{machine.processor}, {machine.instructions}; torch {machine.torch}{jax}, NumPy {machine.numpy}; float32, "
        f"`kernel={results.kernel!r}`, {machine.date}."
    ]
    for threads in sorted({row.threads for row in results.rows}):
        rows = [row for row in results.rows if row.threads == threads]
        layers = [row for row in rows if row.table == "layers"]
        others = [row for row in rows if row.table != "layers"]
        parts += [_layers(layers)] if layers else []
        parts += [_others(others)] if others else []
    return "\n\n".join(parts)


def short_markdown(results: Results) -> str:
    """Where it was measured; then, for the calls of a few steps, a table for each kind and number of threads.

    A line per T and B, a column per H, in it the ratios of all cells.
    """
    machine = results.machine
    disturbed = "; other programs were running beside it" if any(row.disturbed for row in results.rows) else ""
    cells = [cell for cell in LAYERS if any(row.case.cell == cell for row in results.rows)]
    parts = [
        f"{machine.processor}, {machine.instructions}; torch {machine.torch}; float32, I = H, "
        f"`kernel={results.kernel!r}`, {machine.date}{disturbed}. torch.nn's time over bptt's for "
        f"{', '.join(cell.upper() for cell in cells)}; ~ where the two differ by less than the spread of their samples."
    ]
    for table, threads in dict.fromkeys((row.table, row.threads) for row in results.rows):
        by_case = {row.case: row for row in results.rows if (row.table, row.threads) == (table, threads)}
        sizes = list(dict.fromkeys(case.H for case in by_case))
        lines = [
            f"| {TABLES[table].title}, {threads_in_words(threads)}: T, B | {' | '.join(f'H = {H}' for H in sizes)} |",
            "|---|" + "---|" * len(sizes),
        ]
        for T, B in dict.fromkeys((case.T, case.B) for case in by_case):
            found = [[by_case[case] for case in by_case if (case.T, case.B, case.H) == (T, B, H)] for H in sizes]
            entries = [" · ".join(_marked(row) for row in rows) for rows in found]
            lines.append(f"| {T}, {B} | {' | '.join(entries)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _marked(row: Row, rival: str = "torch.nn") -> str:
    return _ratio(row, rival) + ("" if row.ratio(rival) is None or not row.alike(rival) else " ~")


def _layers(rows: Sequence[Row]) -> str:
    """A line per shape, a column per cell."""
    cells = [cell for cell in LAYERS if any(row.case.cell == cell for row in rows)]
    rivals = list(dict.fromkeys(rival for row in rows for rival in row.rivals))
    rate = statistics.median(row.gemm for row in rows) / 1e9
    others = "".join(f" · {rival}'s time over it" for rival in rivals)
    lines = [
        f"{threads_in_words(rows[0].threads).capitalize()}, forward + backward: bptt's time{others} · useful FLOP/s as "
        f"a share of a 2048 x 2048 x 2048 product's by torch's faster library ({rate:.0f} GFLOP/s).",
        "",
        f"| T, B, I, H | {' | '.join(cell.upper() for cell in cells)} |",
        "|---|" + "---|" * len(cells),
    ]
    by_case = {(row.case.shape, row.case.cell): row for row in rows}
    for shape in dict.fromkeys(row.case.shape for row in rows):
        found = [by_case.get((shape, cell)) for cell in cells]
        entries = ["" if row is None else _entry(row, rivals) for row in found]
        lines.append(f"| {', '.join(map(str, shape))} | {' | '.join(entries)} |")
    return "\n".join(lines)


def _entry(row: Row, rivals: Sequence[str]) -> str:
    share = "" if row.share is None else f" · {row.share:.0%}"
    return _time(row) + "".join(f" · {_ratio(row, rival)}" for rival in rivals) + share


def _others(rows: Sequence[Row]) -> str:
    lines = [
        f"| {threads_in_words(rows[0].threads)} | T, B, I, H | bptt | others, times as long |",
        "|---|---|---|---|",
    ]
    for row in rows:
        gradient = f", `{row.case.gradient}`" if row.case.gradient != "full" else ""
        rivals = ", ".join(f"{rival} {_ratio(row, rival)}" for rival in row.rivals)
        shape = ", ".join(map(str, row.case.shape))
        lines.append(
            f"| {TABLES[row.table].title}, {row.case.cell.upper()}{gradient} | {shape} | {_time(row)} | {rivals} |"
        )
    return "\n".join(lines)


def _time(row: Row) -> str:
    return f"{digits(row.times[row.subject].median * 1e3)} ms" if row.subject in row.times else "wrong"


def _ratio(row: Row, rival: str) -> str:
    ratio = row.ratio(rival)
    return "wrong" if ratio is None else f"{digits(ratio)}×"
