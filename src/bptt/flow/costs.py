"""What a comparison of policies says of cost: which policy to use, by errors, times and memory, with the conditions.

A sentence about time is made only where the clock tells two times apart and nobody disturbed it, and a saving is
called one from a tenth on: what lies below is not worth an inexact gradient, and would differ from run to run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from ._compare import Comparison, Row
from .language import say
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
    exact = say("is exact")
    if best.policy != "full":
        exact = say("is {part} off the full gradient", part=percent(total_error(best)))
    values = {"best": best.policy, "own": own.policy, "exact": exact, "times": _against(best, own)}
    if saves(best, own):
        text = 'gradient="{best}" saves {part} of the time of {own} and {exact} (policies: {times})'
        return say(text, part=percent(1 - best.seconds / own.seconds), **values)
    text = (
        'gradient="{best}" {exact}, and no saving by {own}, which is {off} off, could be measured (policies: {times})'
    )
    return say(text, off=percent(total_error(own)), **values)


def sentence(measure: Comparison) -> str:
    """The conclusion of a comparison."""
    full, others = _full(measure), _others(measure)
    if not others:
        return say("Nothing to compare with the full gradient")
    if full is None:
        return _nearest(others)
    if measure.disturbed:
        text = "{nearest}; nothing is said of time: {disturbance}"
        return say(text, nearest=_nearest(others), disturbance=disturbance(measure))
    best = recommended(measure)
    if best is not None:
        return say(
            "{policy} takes {part} of the time of full ({times}; quartiles apart) and is {off} off",
            policy=best.policy,
            part=percent(best.seconds / full.seconds),
            times=_against(best, full),
            off=percent(total_error(best)),
        )
    faster = _least(row for row in others if saves(row, full))
    if faster is not None:
        text = (
            "Use full: it is exact, and no policy within {close} of it is faster here; {policy} takes {part} of its "
            "time ({times}; quartiles apart) and is {off} off"
        )
        return say(
            text,
            close=percent(CLOSE),
            policy=faster.policy,
            part=percent(faster.seconds / full.seconds),
            times=_against(faster, full),
            off=percent(total_error(faster)),
        )
    fastest = min(others, key=lambda row: row.seconds)
    costs = say("costs no more here") if memory_of_all(measure) is not None else say("takes no longer here")
    if full.time.apart(fastest.time):
        known = say("quartiles apart")
        costs = costs if full.seconds < fastest.seconds else say("takes hardly longer here")
    else:
        known = say("quartiles overlap") if full.time.overlaps(fastest.time) else say("within their spread")
    text = "Use full: it is exact and {costs} ({times} for {policy}; {known})"
    return say(text, costs=costs, times=_against(full, fastest), policy=fastest.policy, known=known)


def disturbance(measure: Comparison) -> str:
    """How it shows that the machine was disturbed."""
    one = f"{measure.cores:.2g}" == "1"
    cores = say("{count} core" if one else "{count} cores", count=f"{measure.cores:.2g}")
    threads = say("{count} thread" if measure.threads == 1 else "{count} threads", count=measure.threads)
    return say("the machine was disturbed (a product on {threads} got {cores})", threads=threads, cores=cores)


def duration(row: Row) -> str:
    """A time with its quartiles, in milliseconds."""
    low, high = (number(1e3 * seconds) for seconds in (row.time.low, row.time.high))
    return say("{time} ({low} to {high})", time=_milliseconds(row), low=low, high=high)


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
        return say("{policy} comes closest to the full gradient: {off} off", policy=best.policy, off=off)
    text = "None comes within {close} of the full gradient: {policy} errs least, by {off}"
    return say(text, close=percent(CLOSE), policy=best.policy, off=off)


def _least(rows: Iterable[Row]) -> Row | None:
    """Of those that the fastest does not save time against, the one that errs least; None of none."""
    found = list(rows)
    if not found:
        return None
    fastest = min(found, key=lambda row: row.seconds)
    return min((row for row in found if not saves(fastest, row)), key=total_error)


def _against(row: Row, other: Row) -> str:
    return say("{time} ms against {other} ms", time=_milliseconds(row), other=_milliseconds(other))


def _mebibytes(size: int) -> str:
    return number(size / 2**20)


def _milliseconds(row: Row) -> str:
    return number(1e3 * row.seconds)
