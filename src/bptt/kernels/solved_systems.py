"""Small linear systems in programs, solved by elimination with the largest pivots (csrc/machine.hpp)."""

from __future__ import annotations

from dataclasses import replace

from .program import Program, Refused
from .views import View, collapse

__all__ = ["solve"]

MOST = 16
"""Unknowns of a system, at most: larger ones are worth a library's blocks."""


def solve(program: Program, to: View, a: View, b: View, told: str) -> None:
    """Append the instructions for to = a^-1 b, of a matrix `[..., n, n]` and columns `[..., n, m]` or `[..., n]`."""
    n = a.dims[-1]
    if len(b.dims) == len(a.dims) - 1:
        b, to = (replace(v, dims=(*v.dims, 1), strides=(*v.strides, 0)) for v in (b, to))
    if n > MOST:
        raise Refused(f"{told}: it has {n} unknowns, more than {MOST}")
    outer, m = to.dims[:-2], to.dims[-1]
    spread = [a.broadcast((*outer, n, n), to.by_row), b.broadcast((*outer, n, m), to.by_row)]
    if None in spread:
        raise Refused(f"{told}: it broadcasts across rows")
    made = to if m == 1 or to.strides[-1] == 1 else program.new(to.dims, to.by_row)
    a, b = (v for v in spread if v is not None)
    sizes, strides = collapse(outer, [v.strides[:-2] for v in (made, a, b)])
    if len(sizes) > 1:
        a, b, made = program.dense(a), program.dense(b), program.new(to.dims, to.by_row)
        sizes, strides = collapse(outer, [v.strides[:-2] for v in (made, a, b)])
    within = [[s[0], *v.strides[-2:], 0] for s, v in zip(strides, (made, a, b), strict=True)]
    program.add("solve", [made, a, b], [sizes[0], n, m, 0], within, work=sizes[0] * n * n * (n + 2 * m))
    if made is not to:
        program.copy(to, made)
