"""Whether verdicts hold: nets whose gradients are known beforehand, and every sentence that is printed of them judged.

    python benchmarks/verdicts.py [--count 200] [--first 0] [--out FILE] [--show]

Each configuration is drawn from its number: the family in turn, then sizes, lengths of lanes, where losses stand and
how large they are, resets, precision. `bptt.flow.survey` runs on it as on any net, without the comparison of policies,
whose subject is time and memory. Every sentence of the verdict is read claim by claim (`planted.sentences`), and judged
by what follows from the planted Jacobians (`planted.truth`), without `bptt.flow`:

    agrees      the number or the word is true: a horizon to within 5 % or a step, others to the digits printed
    less        "at least n", where n is not above the truth; or that too little was measured
    false       neither
    unread      no pattern reads the sentence, so that nobody has judged it
    not judged  the weights' gradient by lag, which depends on the states as well

Exit status 1 where anything is false or unread.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from planted import printed
from planted.nets import FAMILIES, planted
from planted.printed import Claim
from planted.sentences import judged
from planted.truth import reach
from rich.console import Console
from rich.progress import track
from rich.table import Table

import bptt
from bptt.bench import Machine
from bptt.cli.inventory import processor
from bptt.train import atomic

RESULTS = Path(__file__).parent / "results" / "verdicts.json"
LONG = 6
"""Times a horizon that a window must measure for it to be known without doubt, whatever the shape of the decay."""

WRONG = (printed.FALSE, printed.UNREAD)


def measured(seed: int) -> dict[str, Any]:
    """One configuration: what it is, what was said of its horizon, and how many claims came out how.

    long: whether the window is long enough to know the horizon, six times as long as it in every layer.
    """
    of = planted(seed)
    found = bptt.flow.survey(of.model, of.batch, of.loss, policies=[])
    with np.errstate(all="ignore"):  # what explodes is followed past the end of floats
        claims = judged(found, of)
        long = all(LONG * max(reach(curve, 0.9), 1) <= of.truth.measured for curve in of.truth.curves)
    return {
        "family": of.family,
        "what": of.what,
        "horizon": told(claims),
        "long": long,
        "claims": dict(Counter(claim.outcome for claim in claims)),
        "wrong": [[c.topic, c.text, c.outcome, c.why] for c in claims if c.outcome in WRONG],
    }


def told(claims: list[Claim]) -> str:
    """What is said of the horizon by lag: the least of what is said of several layers."""
    said = {claim.horizon for claim in claims if claim.topic == "by lag" and claim.horizon}
    return "at least" if "at least" in said else "told" if said else "none"


def table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By family: nets; those with a window that is long enough to know the horizon, and of these how many are told it;
    horizon told, "at least", none; claims that agree, that claim less, not judged, false.
    """
    found = []
    for family in (*FAMILIES, "all"):
        own = [row for row in rows if family in (row["family"], "all")]
        claims: Counter[str] = Counter()
        for row in own:
            claims.update(row["claims"])
        horizons = Counter(row["horizon"] for row in own)
        long = [row["horizon"] == "told" for row in own if row["long"]]
        found.append(
            {
                "family": family,
                "nets": len(own),
                "told": horizons["told"],
                "at least": horizons["at least"],
                "none": horizons["none"],
                "long": len(long),
                "long, told": sum(long),
                "agree": claims[printed.AGREES],
                "less": claims[printed.LESS],
                "not judged": claims[printed.UNJUDGED],
                "false": sum(claims[outcome] for outcome in WRONG),
            }
        )
    return found


def main(
    count: Annotated[int, typer.Option(help="configurations")] = 200,
    first: Annotated[int, typer.Option(help="number of the first one")] = 0,
    out: Annotated[Path, typer.Option(help="file of results")] = RESULTS,
    show: Annotated[bool, typer.Option(help="print what is false as it is found")] = False,
) -> None:
    """Judge them, print the table, keep the results."""
    torch.set_num_threads(1)
    rows = []
    for seed in track(range(first, first + count), "judging", transient=True, disable=not sys.stderr.isatty()):
        rows.append(measured(seed))
        if show:
            for topic, text, outcome, why in rows[-1]["wrong"]:
                print(f"{seed} {rows[-1]['what']}\n  {outcome} {topic}: {text}\n    {why}", flush=True)
    machine = vars(Machine.here(processor(), cores=1))
    found = table(rows)
    each = ",\n".join(json.dumps(row) for row in rows)
    head = json.dumps({"machine": machine, "first": first, "count": count, "table": found})
    atomic.write(out, f'{head[:-1]}, "rows": [\n{each}\n]}}\n'.encode())
    shown = Table(*found[0])
    for row in found:
        shown.add_row(*map(str, row.values()))
    Console().print(shown)
    sys.exit(any(row["wrong"] for row in rows))


if __name__ == "__main__":
    typer.run(main)
