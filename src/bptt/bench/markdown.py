"""The tables of the README and of pages, from saved results."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from ..nn import LAYERS
from .bounds import PARTS
from .results import Results, Row, geometric_mean
from .tables import TABLES
from .words import digits, threads_in_words

__all__ = ["bounds_markdown", "markdown", "short_markdown", "steps_markdown"]


def markdown(results: Results) -> str:
    """Where it was measured; then per number of threads a table of layers, one of steps, one of everything else."""
    machine = results.machine
    jax = f", JAX {machine.jax}" if any("JAX" in row.times for row in results.rows) else ""
    commits = {row.commit for row in results.rows}
    several = f", rows of {len(commits)} commits" if len(commits) > 1 else ""
    parts = [
        f"{machine.processor}, {machine.instructions}; torch {machine.torch}{jax}, NumPy {machine.numpy}; float32, "
        f"`kernel={results.kernel!r}`, {machine.date}{several}."
    ]
    for threads in sorted({row.threads for row in results.rows}):
        rows = [row for row in results.rows if row.threads == threads]
        layers = [row for row in rows if row.table == "layers"]
        steps = [row for row in rows if row.table == "steps"]
        others = [row for row in rows if row.table not in ("layers", "steps")]
        parts += [_layers(layers)] if layers else []
        parts += [_steps(steps)] if steps else []
        parts += [_others(others)] if others else []
    return "\n\n".join(parts)


def bounds_markdown(results: Results) -> str:
    """Of every layer its time, and how much of it each part would take alone; a table for each number of threads."""
    parts = [
        f"Of each layer's time, forward + backward, what its parts take alone, in this order: "
        f"{'; '.join(f'*{name}*: {what}' for name, what in PARTS.items())}. Products are torch's, float32, on as many "
        "threads, each of which costs a call; at B = 1 a compiled walk takes less than they do."
    ]
    rows = [row for row in results.rows if row.parts and row.subject in row.times]
    for threads in sorted({row.threads for row in rows}):
        some = [row for row in rows if row.threads == threads]
        cells = list(dict.fromkeys(row.case.cell for row in some))
        lines = [
            f"| {threads_in_words(threads)}: T, B, I, H | {' | '.join(cell.upper() for cell in cells)} |",
            "|---|" + "---|" * len(cells),
        ]
        by_case = {(row.case.shape, row.case.cell): row for row in some}
        for shape in dict.fromkeys(row.case.shape for row in some):
            found = [by_case.get((shape, cell)) for cell in cells]
            entries = ["" if row is None else _bounds(row) for row in found]
            lines.append(f"| {', '.join(map(str, shape))} | {' | '.join(entries)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _bounds(row: Row) -> str:
    time = row.times[row.subject].median
    return " · ".join([_time(row), *(f"{row.parts[name].median / time:.0%}" for name in PARTS)])


SHORT_SHOWN = ("bptt", "torch.nn")
"""Whose ratio `short_markdown` shows of each row; of others a sentence tells the mean."""


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
        others = dict.fromkeys(rival for row in by_case.values() for rival in row.times if rival not in SHORT_SHOWN)
        parts += [_in_words(rival, list(by_case.values())) for rival in others]
    return "\n\n".join(parts)


STEP_RIVALS = {"loop": "the plain loop's time over it", "JAX": "that of JAX's compiled scan"}
"""Whom `steps_markdown` names, and how."""


def steps_markdown(results: Results) -> str:
    """Where it was measured; then a table of the steps on the fewest threads, with the full gradient.

    A line per step, a column per shape, in it the ratios of all rivals; and the largest first call of each line.
    """
    machine, threads = results.machine, min(row.threads for row in results.rows)
    rows = [row for row in results.rows
            if (row.table, row.threads, row.case.gradient) == ("steps", threads, "full")]  # fmt: skip
    rivals = [rival for rival in STEP_RIVALS if any(rival in row.errors for row in rows)]
    disturbed = "; other programs were running beside it" if any(row.disturbed for row in rows) else ""
    versions = f"torch {machine.torch}" + (f", JAX {machine.jax}" if "JAX" in rivals else "")
    said = "".join(f" · {STEP_RIVALS[rival]}" for rival in rivals)
    shapes = list(dict.fromkeys((row.case.T, row.case.B, row.case.H) for row in rows))
    lines = [
        f"{machine.processor}, {machine.instructions}; {versions}; float32, {threads_in_words(threads)}, "
        f"`kernel={results.kernel!r}`, {machine.date}{disturbed}. Forward + backward by `bptt.scan`{said}; and by how "
        "much the first call takes longer.",
        "",
        f"| step: T, B, H | {' | '.join(', '.join(map(str, shape)) for shape in shapes)} | first call |",
        "|---|" + "---|" * (len(shapes) + 1),
    ]
    by_case = {(row.case.cell, (row.case.T, row.case.B, row.case.H)): row for row in rows}
    for cell in dict.fromkeys(row.case.cell for row in rows):
        found = [by_case.get((cell, shape)) for shape in shapes]
        entries = ["" if row is None else " · ".join([_time(row), *(_ratio(row, r) for r in rivals if r in row.errors)])
                   for row in found]  # fmt: skip
        firsts = [row.first[row.subject] for row in found if row is not None and row.subject in row.first]
        first = max(firsts, default=0.0)
        lines.append(f"| {cell} | {' | '.join(entries)} | {digits(first * 1e3)} ms |")
    return "\n".join(lines)


def _in_words(rival: str, rows: Sequence[Row]) -> str:
    """A rival's ratios: their geometric mean for each cell, and the extremes."""
    by_cell = {
        cell: [ratio for row in rows if row.case.cell == cell and (ratio := row.ratio(rival)) is not None]
        for cell in dict.fromkeys(row.case.cell for row in rows)
    }
    told = (
        f"{cell.upper()} {digits(geometric_mean(ratios))}× ({digits(min(ratios))} to {digits(max(ratios))})"
        for cell, ratios in by_cell.items()
        if ratios
    )
    return f"{rival}'s time over bptt's, in the geometric mean of these rows: {', '.join(told)}."


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


def _steps(rows: Sequence[Row]) -> str:
    """A line per step and shape, a column per contender."""
    rivals = list(dict.fromkeys(rival for row in rows for rival in (*row.rivals, *row.missing)))
    headers = ["T, B, H", "`bptt.scan`", *(f"{rival}, times as long" for rival in rivals), "first call, more"]
    lines = [
        f"| {threads_in_words(rows[0].threads)}, step | {' | '.join(headers)} |",
        "|---|" + "---|" * len(headers),
    ]
    for row in rows:
        case = row.case
        gradient = f", `{case.gradient}`" if case.gradient != "full" else ""
        ratios = [_ratio(row, rival) if rival in row.errors else _absent(row, rival) for rival in rivals]
        first = f"{digits(row.first[row.subject] * 1e3)} ms" if row.subject in row.first else ""
        shape = f"{case.T}, {case.B}, {case.H}"
        lines.append(f"| {case.cell}{gradient} | {' | '.join((shape, _time(row), *ratios, first))} |")
    return "\n".join(lines)


def _others(rows: Sequence[Row]) -> str:
    lines = [
        f"| {threads_in_words(rows[0].threads)} | T, B, I, H | bptt | others, times as long |",
        "|---|---|---|---|",
    ]
    for row in rows:
        marks = "".join(f", `{mark}`" if mark == row.case.gradient else f", {mark}" for mark in row.case.marks)
        rivals = ", ".join(f"{rival} {_ratio(row, rival)}" for rival in row.rivals)
        shape = ", ".join(map(str, row.case.shape))
        lines.append(
            f"| {TABLES[row.table].title}, {row.case.cell.upper()}{marks} | {shape} | {_time(row)} | {rivals} |"
        )
    return "\n".join(lines)


def _absent(row: Row, rival: str) -> str:
    """Why a contender that refused has no ratio, in short: how long was too long, or that it does."""
    reason = row.missing.get(rival)
    if reason is None:
        return ""
    _, over, limit = reason.partition(" took longer than ")
    return f"> {limit} at first" if over else "refuses"


def _time(row: Row) -> str:
    return f"{digits(row.times[row.subject].median * 1e3)} ms" if row.subject in row.times else "wrong"


def _ratio(row: Row, rival: str) -> str:
    ratio = row.ratio(rival)
    return "wrong" if ratio is None else f"{digits(ratio)}×"
