"""Stage 4: the parameters. One product per weight over all steps and lanes, (6.4)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cells import Cell, Weights
from ..kernels import SweepResult, Tape, summed_product
from .boundary import given

__all__ = ["parameter_gradients", "steps_of"]


def parameter_gradients(
    cell: Cell, w: Weights, tape: Tape, x: Tensor, walked: SweepResult, needs: tuple[bool, ...], present: Tensor | None
) -> list[Tensor | None]:
    """The gradient of each weight of one layer and direction that needs one, in the order of `Weights`.

    x: `[T, B, I]`, the layer's input, in the direction's own time. needs: for each weight given, in order.
    present: the rows of `[T * B]` that are steps of a sequence; None is all.
    """
    da, biased = walked.da, w.b_ih is not None
    ih, hh, *biases = walked.weights or (None,) * 4
    needs_bias = biased and (needs[2] or needs[3])
    parts = [da]
    if cell.inner is not None and ((needs[1] and hh is None) or (needs_bias and biases[1] is None)):
        # As a GRU's gate n sees the recurrent product through the reset gate: its rows have an error of their own.
        parts = list(walked.recurrent) or [cell.recurrent(da, given(tape.gates))]
    if needs[0] and ih is None:
        ih = summed_product(steps_of(da, present), steps_of(x, present))
    if needs[1] and hh is None:
        prev = steps_of(tape.prev[0], present)
        hh = _joined([summed_product(steps_of(part, present), prev) for part in parts])
    grads: list[Tensor | None] = [ih, hh]
    if needs_bias:
        if biases[1] is None:
            grads += [steps_of(da, present).sum(0), _joined([steps_of(part, present).sum(0) for part in parts])]
        else:
            grads += biases
    elif biased:
        grads += [None, None]
    if w.hr is not None:
        projected = cell.projected(given(tape.gates), tape.state) if needs[-1] else None
        hr = None
        if projected is not None:
            hr = summed_product(steps_of(walked.adjoints[0], present), steps_of(projected, present))
        grads.append(hr)
    return [grad if need else None for grad, need in zip(grads, needs, strict=True)]


def steps_of(x: Tensor, present: Tensor | None) -> Tensor:
    """`[T, B, F]` -> `[rows, F]`: the rows of `[T * B]` that are steps of a sequence; None is all."""
    rows = x.flatten(0, 1)
    return rows if present is None else rows.index_select(0, present)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
