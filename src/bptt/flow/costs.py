"""What a comparison of policies says of cost: which policy to use, by errors, times and memory, with the conditions.

A sentence about time is made only where the clock tells two times apart and nobody disturbed it, and a saving is
called one from a tenth on: what lies below is not worth an inexact gradient, and would differ from run to run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from ._compare import Comparison, Row
from .wording import number, percent

__all__ = [
    "CLOSE",
    "advice",
    "better",
    "disturbance",
    "duration",
    "mebibytes",
    "memory_of_all",
    "recommended",
    "saves",
    "sentence",
    "total_error",
]

CLOSE = 0.1
"""The relative error up to which a gradient is called close to the full one."""

SAME = 0.01
"""The part by which memory may differ to be called the same."""

ROUNDING = 1e-6
"""The relative error up to which a gradient is called the full one."""

SAVES = 0.1
"""The part of a time that a policy must save to be called faster."""


def total_error(row: Row) -> float:
    """Root mean square distance from the full gradient, relative to its norm: sqrt(bias^2 + variance)."""
    return math.sqrt(row.bias**2 + max(row.variance, 0.0))


def saves(row: Row, other: Row) -> bool:
    """Whether a policy takes at least a tenth less time than another, and the clock tells the two apart."""
    return row.seconds <= (1 - SAVES) * other.seconds and row.time.apart(other.time)


def recommended(measure: Comparison) -> Row | None:
    """The close policy to use in place of `full`; None where `full` is not there, or nothing close saves time.

    The fastest one; and of those that are not clearly slower, the one that errs least.
    """
    full = _full(measure)
    if full is None or measure.disturbed:
        return None
    return _least(row for row in _others(measure) if total_error(row) <= CLOSE and saves(row, full))


def better(measure: Comparison) -> Row | None:
    """What to use in place of the subject's own policy, by error and time; None where there is nothing to change."""
    own = measure.trained_with
    best = None if measure.disturbed else recommended(measure) or _full(measure)
    if own is None or best is None or best is own:
        return None
    errs_less = total_error(own) > total_error(best) + ROUNDING and not saves(own, best)
    return best if errs_less or saves(best, own) else None


def advice(measure: Comparison) -> str | None:
    """What to use in place of the subject's own policy, and why; None where there is nothing to change."""
    best, own = better(measure), measure.trained_with
    if best is None or own is None:
        return None
    exact = "is exact" if best.policy == "full" else f"is {percent(total_error(best))} off the full gradient"
    if saves(best, own):
        saved = f"saves {percent(1 - best.seconds / own.seconds)} of the time of {own.policy}"
        return f'gradient="{best.policy}" {saved} and {exact} (policies: {_against(best, own)})'
    off = percent(total_error(own))
    return (
        f'gradient="{best.policy}" {exact}, and no saving by {own.policy}, which is {off} off, could be measured '
        f"(policies: {_against(best, own)})"
    )


def sentence(measure: Comparison) -> str:
    """The conclusion of a comparison."""
    full, others = _full(measure), _others(measure)
    if not others:
        return "Nothing to compare with the full gradient"
    if full is None:
        return _nearest(others)
    if measure.disturbed:
        return f"{_nearest(others)}; nothing is said of time: {disturbance(measure)}"
    best = recommended(measure)
    if best is not None:
        return (
            f"{best.policy} takes {percent(best.seconds / full.seconds)} of the time of full ({_against(best, full)}; "
            f"quartiles apart) and is {percent(total_error(best))} off"
        )
    faster = _least(row for row in others if saves(row, full))
    if faster is not None:
        return (
            f"Use full: it is exact, and no policy within {percent(CLOSE)} of it is faster here; {faster.policy} takes "
            f"{percent(faster.seconds / full.seconds)} of its time ({_against(faster, full)}; quartiles apart) and is "
            f"{percent(total_error(faster))} off"
        )
    fastest = min(others, key=lambda row: row.seconds)
    costs = "costs no more here" if memory_of_all(measure) is not None else "takes no longer here"
    if full.time.apart(fastest.time):
        known = "quartiles apart"
        costs = costs if full.seconds < fastest.seconds else "takes hardly longer here"
    else:
        known = "quartiles overlap" if full.time.overlaps(fastest.time) else "within their spread"
    return f"Use full: it is exact and {costs} ({_against(full, fastest)} for {fastest.policy}; {known})"


def disturbance(measure: Comparison) -> str:
    """How it shows that the machine was disturbed."""
    cores = f"{measure.cores:.2g} core" + ("" if f"{measure.cores:.2g}" == "1" else "s")
    threads = f"{measure.threads} thread" + ("" if measure.threads == 1 else "s")
    return f"the machine was disturbed (a product on {threads} got {cores})"


def duration(row: Row) -> str:
    """A time with its quartiles, in milliseconds."""
    low, high = (number(1e3 * seconds) for seconds in (row.time.low, row.time.high))
    return f"{_milliseconds(row)} ({low} to {high})"


def mebibytes(row: Row) -> str:
    """Memory as it is shown, in MiB; "-" where it was not measured."""
    return "-" if row.bytes is None else _mebibytes(row.bytes)


def memory_of_all(measure: Comparison) -> str | None:
    """What every policy takes, in MiB, to within a hundredth; None where they differ, or where it was not measured."""
    sizes = [row.bytes for row in measure.rows if row.bytes is not None]
    if not sizes or len(sizes) < len(measure.rows) or max(sizes) > (1 + SAME) * min(sizes):
        return None
    return _mebibytes(max(sizes))


def _full(measure: Comparison) -> Row | None:
    return next((row for row in measure.rows if row.policy == "full"), None)


def _others(measure: Comparison) -> list[Row]:
    """The policies that are told from the full gradient, by errors that mean something."""
    rows = [row for row in measure.rows if row.policy != "full" and math.isfinite(total_error(row))]
    return [row for row in rows if row.reliable and not (row.exact and total_error(row) <= ROUNDING)]


def _nearest(rows: Sequence[Row]) -> str:
    best = min(rows, key=total_error)
    off = percent(total_error(best))
    if total_error(best) <= CLOSE:
        return f"{best.policy} comes closest to the full gradient: {off} off"
    return f"None comes within {percent(CLOSE)} of the full gradient: {best.policy} errs least, by {off}"


def _least(rows: Iterable[Row]) -> Row | None:
    """Of those that the fastest does not save time against, the one that errs least; None of none."""
    found = list(rows)
    if not found:
        return None
    fastest = min(found, key=lambda row: row.seconds)
    return min((row for row in found if not saves(fastest, row)), key=total_error)


def _against(row: Row, other: Row) -> str:
    return f"{_milliseconds(row)} ms against {_milliseconds(other)} ms"


def _mebibytes(size: int) -> str:
    return number(size / 2**20)


def _milliseconds(row: Row) -> str:
    return number(1e3 * row.seconds)
