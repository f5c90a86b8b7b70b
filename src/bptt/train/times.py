"""Times of the rows of a table: numbers, or dates as ISO 8601 writes them; and how a series of them goes on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from decimal import Decimal
from itertools import pairwise
from typing import Any

from .numerals import number_of

__all__ = ["Moment", "kind_of", "later", "moment"]

Moment = Decimal | datetime
"""A number is exact, as it is written: 0.1 + 0.2 is 0.3."""


def moment(value: Any) -> Moment | None:
    """A time; None where it is neither a finite number nor a date.

    >>> moment("1958.5"), moment("1970-01-02"), moment("soon"), moment("nan")
    (Decimal('1958.5'), datetime.datetime(1970, 1, 2, 0, 0), None, None)
    """
    number = number_of(value)
    if number is not None:
        return None if math.isnan(number) else Decimal(value if isinstance(value, int) else str(value).strip())
    try:
        return datetime.fromisoformat(str(value).strip())
    except ValueError:
        return None


def kind_of(value: Moment) -> str:
    """What it can be compared with, in words."""
    if isinstance(value, Decimal):
        return "numbers"
    return "dates" if value.tzinfo is None else "dates with a time zone"


def later(times: Sequence[Any] | None, steps: int) -> list[Any]:
    """The times after the last, where all have one distance, in whole months or in time; else numbers from 1.

    times: as they were read; None, or one alone: numbers from 1.

    >>> later(["0.1", "0.2", "0.3"], 2), later(["2024-11-30", "2024-12-31"], 2), later(["2024-01-01", "2024-01-09"], 1)
    ([0.4, 0.5], ['2025-01-31', '2025-02-28'], ['2024-01-17'])
    """
    counted = list(range(1, steps + 1))
    known: list[Any] = [moment(time) for time in times or ()]
    if len(known) < 2 or len({None if time is None else kind_of(time) for time in known}) > 1:
        return counted
    if known[0] is None:
        return counted
    if isinstance(known[0], Decimal):
        return _evenly(known, steps, lambda number: int(number) if number == int(number) else float(number)) or counted
    bare = all(len(str(time).strip()) == len("2000-01-01") for time in times or ())

    def written(date: datetime) -> str:
        return date.date().isoformat() if bare else date.isoformat()

    try:
        return [written(date) for date in _monthly(known, steps)] or _evenly(known, steps, written) or counted
    except (ValueError, OverflowError):  # beyond the year 9999
        return counted


def _evenly(known: list[Any], steps: int, written: Callable[[Any], Any]) -> list[Any]:
    """The times after the last, at the one distance that all have; none where they have several."""
    step = known[-1] - known[-2]
    if any(after - before != step for before, after in pairwise(known)):
        return []
    return [written(known[-1] + number * step) for number in range(1, steps + 1)]


def _monthly(known: list[Any], steps: int) -> list[datetime]:
    """The same of dates that lie whole months apart, on the same day of the month, or each on its last."""
    months = [12 * date.year + date.month - 1 for date in known]
    step = months[-1] - months[-2]
    last = all((date + timedelta(days=1)).day == 1 for date in known)
    rest = {date.replace(year=2000, month=1, day=1 if last else date.day) for date in known}
    if step < 1 or any(after - before != step for before, after in pairwise(months)) or len(rest) > 1:
        return []
    if last:  # the day before the first one of the month after
        month = [months[-1] + number * step + 1 for number in range(1, steps + 1)]
        return [known[-1].replace(year=m // 12, month=m % 12 + 1, day=1) - timedelta(days=1) for m in month]
    if known[-1].day > 28:
        return []
    month = [months[-1] + number * step for number in range(1, steps + 1)]
    return [known[-1].replace(year=m // 12, month=m % 12 + 1) for m in month]
