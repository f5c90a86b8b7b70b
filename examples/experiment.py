"""What the experiments share: their options, the runs one after another, where results go, how figures look."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any, TypeVar

import torch
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress

from bptt.bench import Machine
from bptt.cli.bench_options import cores
from bptt.cli.inventory import processor
from bptt.plots.style import GREY, LINES, sparse, styled, title
from bptt.train.atomic import write

HERE = Path(__file__).parent

Run = TypeVar("Run")
Row = dict[str, Any]
"""What one run measured, with what it was a run of: numbers, text, lists of them."""

Quick = Annotated[bool, typer.Option("--quick", help="a few seconds: to see that it runs, not what it shows")]
Seed = Annotated[int, typer.Option(min=0, help="the first seed")]
Out = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="where results/ and figures/ go; default: examples, of --quick runs/examples"),
]
Text = Annotated[
    Path | None, typer.Option("--text", metavar="FILE", help="UTF-8 text; default: the corpus python-docs")
]


def reading(text: Path | None) -> dict[str, Any]:
    """The options of `bptt.train.Config` that read a file as letters and spaces, or without one python-docs.

    >>> reading(None)
    {'corpus': 'python-docs'}
    """
    return {"corpus": "python-docs"} if text is None else {"text": str(text), "preprocess": "letters"}


def named(text: Path | None) -> str:
    """What was read, for the results: without the place where it lay.

    >>> named(Path("some/where/timemachine.txt"))
    'timemachine, letters'
    """
    return "python-docs" if text is None else f"{text.stem}, letters"


def carry_out(plan: Sequence[Run], measure: Callable[[Run], Row]) -> tuple[list[Row], bool]:
    """Measure every run of a plan: the rows, and whether all were measured. Ctrl-C keeps those that are done.

    One thread: nets of this size gain nothing from a second.
    """
    torch.set_num_threads(1)
    console, rows = Console(stderr=True), []
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(plan))
        try:
            for run in plan:
                bar.update(task, description=str(run))
                started = perf_counter()
                rows.append(measure(run) | {"seconds": round(perf_counter() - started, 2)})
                bar.advance(task)
        except KeyboardInterrupt:
            console.print(f"interrupted: {len(rows)} of {len(plan)} runs are kept")
    return rows, len(rows) == len(plan)


def publish(
    name: str,
    settings: dict[str, Any],
    rows: list[Row],
    draw: Callable[[list[Row]], Figure],
    *,
    complete: bool,
    quick: bool,
    out: Path | None,
) -> None:
    """Write `results/NAME.json` and `figures/NAME.png`. Exits with status 130 where it is not complete.

    settings: what all runs have in common.
    """
    if not rows:
        raise typer.Exit(130)
    folder = out or (Path("runs/examples") if quick else HERE)
    (folder / "results").mkdir(parents=True, exist_ok=True)
    machine = asdict(Machine.here(processor(), cores()))
    about = {"experiment": name, "quick": quick, "complete": complete, "settings": settings, "machine": machine}
    head = json.dumps(about, indent=1).removesuffix("\n}")
    lines = ",\n".join(map(json.dumps, rows))
    write(folder / "results" / f"{name}.json", f'{head},\n "rows": [\n{lines}\n ]\n}}\n'.encode())
    picture = save(name, draw, rows, folder)
    Console().print(f"{folder / 'results' / name}.json, {picture}", soft_wrap=True, highlight=False)
    if not complete:
        raise typer.Exit(130)


def load(name: str, folder: Path = HERE) -> dict[str, Any]:
    """What `publish` wrote."""
    results: dict[str, Any] = json.loads((folder / "results" / f"{name}.json").read_text(encoding="utf-8"))
    return results


# Rows summed up


def pick(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """The rows in which all of `wanted` holds.

    >>> pick([{"a": 1, "b": 2}, {"a": 3, "b": 2}], a=3)
    [{'a': 3, 'b': 2}]
    """
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def values(rows: Iterable[Row], key: str) -> list[Any]:
    """The values of a column, each once, in the order of their first row.

    >>> values([{"a": 1}, {"a": 3}, {"a": 1}], "a")
    [1, 3]
    """
    return list(dict.fromkeys(row[key] for row in rows))


def spread(numbers: Sequence[float]) -> tuple[float, float, float]:
    """Mean, smallest and largest.

    >>> spread([1.0, 2.0, 6.0])
    (3.0, 1.0, 6.0)
    """
    return statistics.fmean(numbers), min(numbers), max(numbers)


def in_words(numbers: Sequence[float], form: str = ".2f") -> str:
    """The mean, and the range where there is one.

    >>> in_words([1.0, 2.0, 6.0]), in_words([0.5])
    ('3.00 (1.00 to 6.00)', '0.50')
    """
    mean, low, high = (format(number, form) for number in spread(numbers))
    return mean if low == high else f"{mean} ({low} to {high})"


def markdown_table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table.

    >>> print(markdown_table(["a", "b"], [["1", "2"]]))
    | a | b |
    |---|---|
    | 1 | 2 |
    """
    first, *rest = (f"| {' | '.join(cells)} |" for cells in [head, *lines])
    return "\n".join([first, "|---" * len(head) + "|", *rest])


# Figures

LOOKS = [*LINES, {"color": GREY, "linestyle": (0, (5, 1, 1, 1, 1, 1)), "marker": "v"}]
"""Of lines: the package's, and a fifth."""


def figure(conclusion: str, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure as wide as a README with its axes side by side. conclusion: its title."""
    new = Figure(figsize=(8.0, 4.0), layout="constrained")
    title(new, conclusion)
    return new, new.subplots(1, columns, squeeze=False)[0].tolist()


def line(ax: Axes, x: Sequence[float], samples: Iterable[Sequence[float]], look: int, label: str) -> None:
    """The mean of the samples at each x, with a band from the smallest to the largest."""
    mean, low, high = zip(*map(spread, samples), strict=True)
    ax.plot(x, mean, label=label, **sparse(len(x), 10), **LOOKS[look])
    ax.fill_between(x, low, high, color=LOOKS[look]["color"], alpha=0.15, linewidth=0)


def level(ax: Axes, y: float, words: str) -> None:
    """A thin line across, with what it stands for at its left end."""
    ax.axhline(y, color=GREY, linewidth=0.8)
    ax.text(0.01, y, words, transform=ax.get_yaxis_transform(), ha="left", va="top", fontsize=9, color=GREY)


@styled
def save(name: str, draw: Callable[[list[Row]], Figure], rows: list[Row], folder: Path = HERE) -> Path:
    """Draw `figures/NAME.png`."""
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    path = folder / "figures" / f"{name}.png"
    draw(rows).savefig(path, metadata={"Software": None})  # no version in it: the same picture is the same file
    return path
