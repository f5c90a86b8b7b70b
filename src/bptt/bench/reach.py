"""The speeds to reach, and whether they were."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .results import Row, geometric_mean
from .tables import TABLES
from .words import digits, threads_in_words

__all__ = ["Verdict", "judge"]

SMALL = (100, 1, 32, 32)
MEANS = {("rnn", "gru"): 4.0, ("lstm",): 1.4}
SMALL_RATIOS = {"rnn": 25.0, "gru": 25.0, "lstm": 2.0}
SHARES = {8192: 0.85, 2048: 0.60}
SHORT_TABLES = ("inference", "short")
ALIKE = 0.97
"""The ratio that counts as not slower where the two differ by less than the spread."""
OVER_LOOP = {(100, 1, 32): 10.0, (1000, 8, 64): 10.0, (100, 32, 128): 1.8}
"""How many times as fast as the plain loop a step is, at T, B, H."""
TWO_LOOPS = ("truncated:32", 1000, 1, 64, 100.0)
"""Gradient, T, B, H, and how many times as fast as the two loops, on one thread."""


@dataclass(frozen=True)
class Verdict:
    """One goal: of how many measured values it speaks, and which of them fall short, worst first."""

    goal: str
    values: int
    missed: tuple[str, ...]

    @property
    def met(self) -> bool:
        """Whether none falls short."""
        return not self.missed

    def __str__(self) -> str:
        if self.met:
            return f"met: {self.goal}" + (f" ({self.values} of {self.values})" if self.values > 1 else "")
        return f"missed: {self.goal}, by {len(self.missed)} of {self.values}: {'; '.join(self.missed)}"


def judge(rows: Sequence[Row]) -> list[Verdict]:
    """A verdict on every goal of which something was measured."""
    layers = [row for row in rows if row.table == "layers"]
    verdicts = [
        _verdict(
            f"never slower than {' and '.join(_rivals(layers))}",
            1.0,
            [(_where(row), min(ratios)) for row in layers if (ratios := _ratios(row))],
            _times,
        )
    ]
    for cell, least in SMALL_RATIOS.items():
        at = [row for row in layers if row.case.cell == cell and row.case.shape == SMALL]
        goal = f">= {least:g}x torch.nn's {cell.upper()} at {SMALL}"
        verdicts.append(_verdict(goal, least, _against(at, "torch.nn"), _times))
    for size, least in SHARES.items():
        large = [row for row in layers if size <= row.case.B * row.case.H]
        shares = [(_where(row), row.share) for row in large if row.share is not None]
        verdicts.append(_verdict(f"share >= {least:.0%} where B*H >= {size}", least, shares, _percent))
    for cells, least in MEANS.items():
        means = []
        for threads in sorted({row.threads for row in layers}):
            some = [row for row in layers if row.case.cell in cells and row.threads == threads]
            if ratios := [ratio for _, ratio in _against(some, "torch.nn")]:
                means.append((threads_in_words(threads), geometric_mean(ratios)))
        names = " and ".join(cell.upper() for cell in cells)
        verdicts.append(_verdict(f"geometric mean >= {least:g}x torch.nn over {names} rows", least, means, _times))
    for name in SHORT_TABLES:
        few = [row for row in rows if row.table == name]
        verdicts.append(_never_slower(f"never slower than torch.nn, {TABLES[name].title}", few, "torch.nn"))
    gradient, T, B, H, least = TWO_LOOPS
    loops = [
        row
        for row in rows
        if row.case.gradient == gradient and (row.case.T, row.case.B, row.case.H, row.threads) == (T, B, H, 1)
    ]
    goal = f">= {least:g}x the two-loop code, {gradient}, T = {T}, B = {B}, H = {H}, 1 thread"
    verdicts.append(_verdict(goal, least, _against(loops, "two loops"), _times))
    verdicts += _of_steps([row for row in rows if row.table == "steps"])
    return [verdict for verdict in verdicts if verdict.values]


def _of_steps(rows: Sequence[Row]) -> list[Verdict]:
    """What `bptt.scan` is to reach with steps that people write."""
    verdicts = [
        _never_slower("steps never slower than the plain loop", rows, "loop"),
        _never_slower("steps never slower than JAX's scan", rows, "JAX"),
    ]
    for (T, B, H), least in OVER_LOOP.items():
        at = [row for row in rows if (row.case.T, row.case.B, row.case.H, row.case.gradient) == (T, B, H, "full")]
        verdicts.append(
            _verdict(f"steps >= {least:g}x the plain loop at {T, B, H}", least, _against(at, "loop"), _times)
        )
    for policies, most in ((False, 1.25), (True, 1.5)):
        some = [row for row in rows if (row.case.gradient != "full") == policies]
        goal = f"steps within {most:g}x the layer's time, {'under policies' if policies else 'full'}"
        verdicts.append(_verdict(goal, 1 / most, _against(some, "module"), _times))
    return verdicts


def _verdict(goal: str, least: float, values: Sequence[tuple[str, float]], form: Callable[[float], str]) -> Verdict:
    short = sorted((value, where) for where, value in values if value < least)
    return Verdict(goal, len(values), tuple(f"{where}: {form(value)}" for value, where in short))


def _never_slower(goal: str, rows: Sequence[Row], rival: str) -> Verdict:
    """At least 1, or `ALIKE` where the two differ by less than the spread."""
    ratios = [(row, ratio) for row in rows if (ratio := row.ratio(rival)) is not None]
    slower = sorted((ratio, _where(row)) for row, ratio in ratios if ratio < (ALIKE if row.alike(rival) else 1.0))
    return Verdict(goal, len(ratios), tuple(f"{where}: {_times(ratio)}" for ratio, where in slower))


def _against(rows: Iterable[Row], rival: str) -> list[tuple[str, float]]:
    return [(_where(row), ratio) for row in rows if (ratio := row.ratio(rival)) is not None]


def _ratios(row: Row) -> list[float]:
    return [ratio for rival in row.rivals if (ratio := row.ratio(rival)) is not None]


def _rivals(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(rival for row in rows for rival in row.rivals))


def _where(row: Row) -> str:
    return f"{row.case}, {threads_in_words(row.threads)}"


def _times(value: float) -> str:
    return f"{digits(value)}x"


def _percent(value: float) -> str:
    return f"{value:.0%}"
