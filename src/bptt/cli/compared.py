"""A comparison of policies as a table, and what it is subject to: what `bptt compare` prints."""

from __future__ import annotations

from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..flow import Comparison, Row, conclusion
from ..flow.costs import disturbance, duration, mebibytes, memory_of_all

__all__ = ["conditions", "table"]


def table(found: Comparison) -> Table:
    """A row for each policy."""
    shown = Table(
        box=SIMPLE_HEAD,
        caption="bias, variance: relative to the full gradient's norm and its square; exact, or ± a standard error; "
        "in brackets: sampled though the variance is infinite on long sequences, so that neither means much; "
        "time: median and quartiles" + ("" if found.own is None else "; *: the network's own policy"),
    )
    shown.add_column("gradient", no_wrap=True)
    memory = memory_of_all(found) is None
    for name in ("bias", "cosine", "variance", "time, ms", *(("memory, MiB",) if memory else ())):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in found.rows:
        own = " *" if row.policy == found.own else ""
        shown.add_row(row.policy + own, *_cells(row), *((mebibytes(row),) if memory else ()))
    return shown


def _cells(row: Row) -> tuple[str, ...]:
    def number(value: float, error: float) -> str:
        return f"{value:.3g}" + (f" ± {error:.1g}" if error else "")

    bias, variance = number(row.bias, row.bias_error), number(row.variance, row.variance_error)
    if not row.reliable:
        bias, variance = f"({bias})", f"({variance})"
    return bias, f"{row.cosine:.4f}", variance, duration(row)


def conditions(found: Comparison) -> Iterator[str]:
    """What the table shows, and what it is subject to."""
    said = conclusion(found)
    yield said
    memory = memory_of_all(found)
    if memory is not None:
        yield f"memory of one forward and backward: {memory} MiB under each"
    if found.disturbed and disturbance(found) not in said:
        yield f"the times are not to be trusted: {disturbance(found)}"
    yield _condition(found)


def _condition(found: Comparison) -> str:
    """The condition for a finite variance, with the measured contraction: (6.18)."""
    rate, critical = found.contraction, found.critical_p
    if critical >= 1:
        return f"adjoints change by {rate:.3g} per step: no keep probability bounds the variance on long sequences"
    return (
        f"adjoints change by {rate:.3g} per step: the variance of randomized truncation stays finite on long sequences "
        f"for p > {rate:.3g}^2 = {critical:.3g}"
    )
