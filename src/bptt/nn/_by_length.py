"""Sequences of unequal lengths, each with the policy of the same sequence alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map, tree_map_only

from ..engine import whole_numbers
from ..scan.pytrees import Step
from ._sequences import Sequences

__all__ = ["by_length", "scan_by_length"]


def by_length(sequences: Sequences, run: Callable[[int, Tensor], tuple[Tensor, list[Any]]]) -> tuple[Tensor, list[Any]]:
    """(output `[T, B, ...]`, final states) of all sequences, from calls on those of each length n.

    run: (output `[n, lanes, ...]`, final states) of the first n steps of some lanes.
    """
    assert sequences.lengths is not None
    lengths = sequences.lengths.to(sequences.x.device)
    ys, finals, lanes = [], [], []
    for n in whole_numbers(sequences.lengths.unique()):
        lanes.append(torch.nonzero(lengths == n)[:, 0])
        y, final = run(n, lanes[-1])
        ys.append(torch.cat([y, y.new_zeros(sequences.T - n, *y.shape[1:])]))
        finals.append(final)
    order = torch.cat(lanes).argsort()
    whole = [tree_map(lambda *t: torch.cat(t)[order], *of_cell) for of_cell in zip(*finals, strict=True)]
    return torch.cat(ys, 1)[:, order], whole


def scan_by_length(
    sequences: Sequences,
    scan: Callable[[Step, Any, tuple[Tensor, ...], Tensor | None, Any], tuple[Any, Any]],
    step: Step,
    carry: Any,
    xs: tuple[Tensor, ...],
    resets: Tensor | None,
    restart: Any,
) -> tuple[Tensor, list[Any]]:
    """The same of a scan, in own time. scan: what its arguments give, the outputs of a step with its states."""

    def run(n: int, lane: Tensor) -> tuple[Tensor, list[Any]]:
        def of_lanes(t: Tensor) -> Tensor:
            return t[:n, lane]

        first = tree_map_only(Tensor, lambda t: t[lane], carry)
        _, (y, kept) = scan(step, first, tuple(map(of_lanes, xs)), *tree_map_only(Tensor, of_lanes, (resets, restart)))
        return y, list(tree_map(lambda t: t[-1], kept))

    return by_length(sequences, run)
