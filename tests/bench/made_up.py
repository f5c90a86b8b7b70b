"""Rows nobody measured."""

from __future__ import annotations

from bptt.bench import Case, Machine, Row
from bptt.clock import Timing

MACHINE = Machine("a processor", "AVX2", 2, "3.11.0", "0.1.0", "2.13.0", "2.4.0", "0.10.0", None, "2026-01-02")
SMALL, LARGE = (100, 1, 32, 32), (100, 64, 256, 256)


def timing(seconds: float) -> Timing:
    return Timing(seconds, seconds, seconds, 5)


def row(
    cell: str = "lstm",
    shape: tuple[int, int, int, int] = SMALL,
    *,
    table: str = "layers",
    gradient: str = "full",
    threads: int = 1,
    gemm: float = 1e9,
    wrong: str = "",
    **times: float,
) -> Row:
    """times: seconds by contender, the subject first; `torch_nn` stands for torch.nn, `two_loops` for two loops."""
    named = {{"torch_nn": "torch.nn", "two_loops": "two loops"}.get(name, name): s for name, s in times.items()}
    errors = {name: 1.0 if name == wrong else 1e-7 for name in named}
    timed = {name: timing(s) for name, s in named.items() if name != wrong}
    first = {name: 3 * timing.median for name, timing in timed.items()} if table == "steps" else {}
    return Row(table, Case(cell, *shape, gradient), threads, errors, timed, gemm, float(threads), first)
