"""Write the generated parts of README.md and draw the figures again, from results/: `python examples/readme.py`.

With --check it only says whether README.md is up to date. A generated part stands between `<!-- NAME -->` and
`<!-- /NAME -->`, NAME that of an experiment.
"""

from __future__ import annotations

import importlib
import re
from functools import partial
from typing import Annotated

import typer
from experiment import HERE, load, save, values

NAMES = ("recall_distance", "strategies", "forget_bias", "long_range_share")
README = HERE / "README.md"


def part(name: str) -> str:
    """Conclusion, figure, numbers, and where they were measured."""
    script, results = importlib.import_module(name), load(name)
    rows, machine = results["rows"], results["machine"]
    conclusion = " ".join(script.conclusion(rows).split())
    return (
        f"**{conclusion}.**\n\n![{conclusion}](figures/{name}.png)\n\n{script.table(rows)}\n\n"
        f"{len(values(rows, 'seed'))} seeds: mean, smallest to largest. {machine['processor']}, one thread, "
        f"torch {machine['torch']}, {machine['date']}."
    )


def _filled(text: str, old: re.Match[str]) -> str:
    return f"{old[1]}\n{text}\n{old[2]}"


def main(
    check: Annotated[bool, typer.Option("--check", help="write nothing; fail where it is out of date")] = False,
) -> None:
    """The README's parts, and the figures."""
    old = new = README.read_text(encoding="utf-8")
    for name in NAMES:
        new, found = re.subn(rf"(<!-- {name} -->).*?(<!-- /{name} -->)", partial(_filled, part(name)), new, flags=re.S)
        if found != 1:
            raise typer.BadParameter(f"examples/README.md must have one part named {name}: found {found}")
    if check:
        if old != new:
            typer.echo("examples/README.md is out of date: run python examples/readme.py", err=True)
        raise typer.Exit(int(old != new))
    README.write_text(new, encoding="utf-8")
    for name in NAMES:
        save(name, importlib.import_module(name).draw, load(name)["rows"])


if __name__ == "__main__":
    typer.run(main)
