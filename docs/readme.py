"""Write the generated parts of README.md, README_zh.md and of pages: `python docs/readme.py`.

`--check` fails if they are old. A generated part stands between `<!-- NAME -->` and `<!-- /NAME -->`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from statistics import median
from textwrap import fill

import chinese
import torch

from bptt import Chunked, Full, Randomized, Truncated
from bptt.bench import Machine, Results, Row, bounds_markdown, digits, markdown, short_markdown, steps_markdown
from bptt.nn import LAYERS
from bptt.policies import Adaptive, Policy

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
README_ZH = ROOT / "README_zh.md"
RESULTS = ROOT / "benchmarks" / "results" / "cpu.json"
"""What `bptt bench --json` saved: the part named bench shows it, once it is there."""
INDEX = ROOT / "docs" / "index.md"
OWN_CELLS = ROOT / "docs" / "own-cells.md"
SPEED = ROOT / "docs" / "speed.md"
SHORT = ROOT / "benchmarks" / "results" / "short.json"
"""What `bptt bench inference short --json` saved."""
STEPS_MEASURED = ROOT / "benchmarks" / "results" / "steps.json"
"""What `bptt bench steps --json` saved."""
STACKS_MEASURED = ROOT / "benchmarks" / "results" / "stacks.json"
"""What `bptt bench stacks --json` saved."""
REGULARISATION = ROOT / "docs" / "ideas" / "regularisation.md"
REGULARISED = ROOT / "benchmarks" / "results" / "regularisation.json"
"""What `benchmarks/regularisation.py --json` saved."""
PLANTED = ROOT / "docs" / "verdicts.md"
VERDICTS = ROOT / "benchmarks" / "results" / "verdicts.json"
"""What `benchmarks/verdicts.py` saved."""
STEPS = 8
DRAW = torch.tensor([0.1, 0.6, 0.9, 0.3, 0.2, 0.8, 0.5], dtype=torch.float64)[:, None]
"""One draw for the picture of randomized truncation: edges 3 and 6 are cut when p = 0.7."""


def reached(policy: Policy, T: int) -> list[set[int]]:
    """For each loss step, the steps whose use of the weights receives its gradient."""
    xi = policy.weights(DRAW) if isinstance(policy, Randomized) else None
    steps: list[set[int]] = []
    for earliest, first, last in policy.reach(T).blocks(T):
        for loss in range(first, last + 1):
            cuts = [] if xi is None else [t for t in range(1, loss + 1) if xi[t, 0] == 0]
            steps.append(set(range(max([earliest, *cuts]), loss + 1)))
    return steps


def reach_picture() -> str:
    """One panel per policy: a row per loss step, a column per step, a dot where the gradient arrives."""
    policies = [Full(), Chunked(4), Truncated(4), Truncated(4, every=2), Randomized(0.7)]
    width = max(STEPS * 2, *(len(str(policy)) + 1 for policy in policies))
    lines = ["        " + " ".join(f"{policy!s:<{width}}" for policy in policies).rstrip()]
    panels = [reached(policy, STEPS) for policy in policies]
    for loss in range(STEPS):
        rows = (" ".join("●" if t in panel[loss] else "·" for t in range(STEPS)) for panel in panels)
        lines.append(f"loss {loss}  " + " ".join(f"{row:<{width}}" for row in rows).rstrip())
    return "```text\n" + "\n".join(lines) + "\n```"


def policy_table() -> str:
    """Every policy: what it computes, what it costs, its text form, and its names elsewhere."""
    rows = [
        ("Full()", Full(), "the exact gradient", "1", "BPTT, full computation"),
        (
            "Chunked(35)",
            Chunked(35),
            "every edge into a multiple of k is cut; the chunks are computed side by side",
            "1, in k steps instead of T",
            "`detach()` every k steps, `repackage_hidden`, Lightning 1's `truncated_bptt_steps`",
        ),
        (
            "Truncated(20)",
            Truncated(20),
            "every loss reaches back exactly `window` steps",
            "`window`",
            "regular truncation; two-loop code with `bptt_truncate = window - 1`",
        ),
        (
            "Truncated(20, every=5)",
            Truncated(20, every=5),
            "every 5 losses together reach back 20 steps from the last of them",
            "`window / every`",
            "BPTT(h; h'), TBPTT(k1, k2) with k1 = `every`, k2 = `window`",
        ),
        (
            "Randomized(0.9)",
            Randomized(0.9),
            "an edge is kept with probability p and weighted 1/p: unbiased",
            "1",
            "randomized truncation",
        ),
        (
            "Randomized.polynomial(mean=20)",
            Randomized.polynomial(mean=20),
            "the same, the length of uncut pieces with a polynomial tail",
            "1",
            "anticipated reweighting (ARTBP)",
        ),
        (
            "Adaptive(0.5, 64)",
            Adaptive(0.5, 64),
            "the smallest window, up to 64, whose measured relative bias is at most 0.5; `bptt.flow.adapt` measures it",
            "`window`, and the measurement",
            "adaptive TBPTT (Aicher, Foti and Fox 2019)",
        ),
    ]
    lines = [
        "| policy | text form | what it computes | work, relative to `full` | known elsewhere as |",
        "|---|---|---|---|---|",
    ]
    lines += [f"| `{code}` | `{policy}` | {what} | {work} | {names} |" for code, policy, what, work, names in rows]
    return "\n".join(lines)


@dataclass(frozen=True)
class Gains:
    """What was measured on one thread, as the READMEs tell it.

    by_cell: by how many times torch.nn's layers take as long as ours, least and most. sizes: how many, first, last.
    cells: how many steps. loops: of each shape T, B, H the median, least and most of a plain loop's time over ours.
    """

    by_cell: dict[str, tuple[str, str]]
    sizes: tuple[int, str, str]
    cells: int
    loops: dict[str, tuple[str, str, str]]
    machine: Machine

    @classmethod
    def of(cls, layers: Results, steps: Results) -> Gains:
        rows = [row for row in layers.rows if row.table == "layers" and row.threads == 1]
        sizes = sorted({row.case.shape for row in rows}, key=prod)
        one, last = (", ".join(map(str, size)) for size in (sizes[0], sizes[-1]))
        own = [row for row in steps.rows if (row.table, row.threads, row.case.gradient) == ("steps", 1, "full")]
        by_shape: dict[str, list[Row]] = {}
        for row in own:
            by_shape.setdefault(f"{row.case.T}, {row.case.B}, {row.case.H}", []).append(row)
        return cls(
            {cell: _extremes([row for row in rows if row.case.cell == cell], "torch.nn") for cell in LAYERS},
            (len(sizes), one, last),
            len({row.case.cell for row in own}),
            {
                shape: (digits(median(_ratios(found, "loop"))), *_extremes(found, "loop"))
                for shape, found in by_shape.items()
            },
            layers.machine,
        )


def gains(measured: Gains) -> str:
    """What the package gives, in four bullets, with the numbers that were measured on one thread."""
    by_cell = {cell: " to ".join(ends) for cell, ends in measured.by_cell.items()}
    count, one, last = measured.sizes
    loops = [f"{mid} ({least} to {most}) at {shape}" for shape, (mid, least, most) in measured.loops.items()]
    bullets = (
        "**The same API, on a CPU mostly faster.** Forward and backward, torch.nn's layers take "
        f"{by_cell['rnn']} (RNN), {by_cell['gru']} (GRU) and {by_cell['lstm']} (LSTM) times as long as ours, at "
        f"{count} sizes T, B, I, H from {one} to {last}.",
        "**The gradient you asked for, exactly.** Full, chunked, truncated per loss, randomized and unbiased; in "
        "stacks, both directions, packed, with resets. Every kernel agrees with NumPy equations and autograd to 1e-10 "
        "in float64.",
        f"**A cell of your own, compiled.** Of {measured.cells} cells that people write, a plain loop over steps "
        f"takes, in the median (and the extremes), so many times as long: {'; '.join(loops)} (T, B, H).",
        "**Where gradients go.** How far each loss reaches, what each policy misses, which step made the first NaN: a "
        "verdict in plain words, a report, pictures.",
    )
    told = "\n".join(fill(f"- {bullet}", 120, subsequent_indent="  ") for bullet in bullets)
    machine = measured.machine
    where = f"one thread of an {machine.processor} ({machine.instructions}), float32, torch {machine.torch}"
    return f"{told}\n\n{fill(f'Measured on {where}: [all of it](docs/speed.md).', 120)}"


def _ratios(rows: Sequence[Row], rival: str) -> list[float]:
    return [ratio for row in rows if (ratio := row.ratio(rival)) is not None]


def _extremes(rows: Sequence[Row], rival: str) -> tuple[str, str]:
    found = _ratios(rows, rival)
    return digits(min(found)), digits(max(found))


def regularisation_table(text: str) -> str:
    """By policy: held-out perplexity at its best, and where the training perplexity is the same, against `full`."""
    results = json.loads(text)
    rows = results["rows"]

    def told(pair: Sequence[float], form: str) -> str:
        return f"{pair[0]:{form}} ± {pair[1]:{form.replace('+', '')}}"

    lines = [
        f"| policy | best held-out | against `full`, % | held-out at {rows[0]['level']:.2f} in training | "
        "against `full`, % | passes to the best | training at the end |",
        "|---" + "|---:" * 6 + "|",
    ]
    for row in rows:
        numbers = (told(row["best"], ".2f"), told(row["best against full"], "+.1f"), told(row["at the level"], ".2f"))
        rest = (told(row["there against full"], "+.1f"), f"{row['passes to the best']:.0f}")
        end = told(row["training at the end"], ".2f")
        lines.append(f"| `{row['policy']}` | " + " | ".join((*numbers, *rest, end)) + " |")
    machine = results["machine"]
    where = f"{results['seeds']} seeds, {results['epochs']} passes; torch {machine['torch']}, {machine['date']}."
    return "\n".join([*lines, "", f"Perplexity per character, mean ± standard deviation; {where}"])


def verdict_table(text: str) -> str:
    """By family of planted nets: what was said of their horizons, and how many claims came out how."""
    results = json.loads(text)
    lines = [
        '| net | configurations | horizon told | "at least" | none told | window long enough: horizon told | '
        "claims that agree | that claim less | not judged | false |",
        "|---" + "|---:" * 9 + "|",
    ]
    for row in results["table"]:
        known = f"{row['long, told']} of {row['long']}" if row["long"] else "-"
        cells = [row["family"], row["nets"], row["told"], row["at least"], row["none"], known]
        lines.append(
            "| " + " | ".join(map(str, [*cells, *(row[k] for k in ("agree", "less", "not judged", "false"))])) + " |"
        )
    machine, last = results["machine"], results["first"] + results["count"] - 1
    versions = (
        f"bptt {machine['bptt']} (commit {machine['commit']}), torch {machine['torch']}, NumPy {machine['numpy']}"
    )
    return "\n".join([*lines, "", f"Seeds {results['first']} to {last}; {versions}, {machine['date']}."])


def main() -> int:
    """Rewrite the parts, or with --check say whether they are up to date."""
    read = (Results.from_json(file.read_text(encoding="utf-8")) for file in (RESULTS, STEPS_MEASURED))
    measured = Gains.of(*read)
    parts = {README: {"policies": policy_table(), "gains": gains(measured)}, INDEX: {"reach": reach_picture()}}
    parts[README_ZH] = {"policies": chinese.policy_table(), "gains": chinese.gains(measured)}
    parts |= {SPEED: {}, OWN_CELLS: {}}
    parts[PLANTED] = {"verdicts": verdict_table(VERDICTS.read_text(encoding="utf-8"))}
    if REGULARISED.exists():
        parts[REGULARISATION] = {"regularisation": regularisation_table(REGULARISED.read_text(encoding="utf-8"))}
    for file, name, results, form in (
        (SPEED, "bench", RESULTS, markdown),
        (SPEED, "bounds", RESULTS, bounds_markdown),
        (OWN_CELLS, "steps", STEPS_MEASURED, steps_markdown),
        (SPEED, "short", SHORT, short_markdown),
        (SPEED, "steps", STEPS_MEASURED, markdown),
        (SPEED, "stacks", STACKS_MEASURED, markdown),
    ):
        if results.exists():
            parts[file][name] = form(Results.from_json(results.read_text(encoding="utf-8")))
    for file, texts in parts.items():
        old = new = file.read_text(encoding="utf-8")
        for name, text in texts.items():
            pattern = rf"(<!-- {name} -->).*?(<!-- /{name} -->)"
            new, found = re.subn(pattern, lambda m, text=text: f"{m[1]}\n{text}\n{m[2]}", new, flags=re.DOTALL)
            if found != 1:
                print(f"{file.name} must have one part named {name}: found {found}", file=sys.stderr)
                return 1
        if "--check" not in sys.argv[1:]:
            file.write_text(new, encoding="utf-8")
        elif old != new:
            print(f"{file.name} is out of date: run python docs/readme.py", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
