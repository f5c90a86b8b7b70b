"""Sequences of unequal lengths, each with the policy of the same sequence alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..scan.pytrees import Step
from ._sequences import Sequences

__all__ = ["by_length"]


def by_length(
    sequences: Sequences,
    scan: Callable[[Step, Any, tuple[Tensor, ...], Tensor | None, Any], tuple[Any, Any]],
    step: Step,
    carry: Any,
    xs: tuple[Tensor, ...],
    resets: Tensor | None,
    restart: Any,
) -> tuple[Tensor, list[Any]]:
    """(output in own time, final states) of a scan for each length."""
    assert sequences.lengths is not None
    lengths = sequences.lengths.to(sequences.x.device)
    ys, finals, lanes = [], [], []
    for n in sequences.lengths.unique().tolist():
        lane = torch.nonzero(lengths == n)[:, 0]
        part = tree_map(lambda t, lane=lane: t[lane] if isinstance(t, Tensor) else t, carry)
        own_resets = None if resets is None else resets[:n, lane]
        own_restart = tree_map(lambda t, n=n, at=lane: t[:n, at] if isinstance(t, Tensor) else t, restart)
        _, (y, kept) = scan(step, part, tuple(x[:n, lane] for x in xs), own_resets, own_restart)
        ys.append(torch.cat([y, y.new_zeros(sequences.T - n, *y.shape[1:])]))
        finals.append(tree_map(lambda t: t[-1], kept))
        lanes.append(lane)
    order = torch.cat(lanes).argsort()
    whole = tree_map(lambda *t: torch.cat(t)[order], finals[0], *finals[1:])
    return torch.cat(ys, 1)[:, order], list(whole)
