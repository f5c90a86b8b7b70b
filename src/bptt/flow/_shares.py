"""The gradient of the recurrent weights by lag: short range against long range.

Legend: T steps, L layers (and directions, as torch.nn orders them), M bins of lags.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import index
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..engine import given
from ..kernels import Frames, SweepResult
from ._lags import check_one_way, sweep_by_loss
from ._recording import Loss, Recording, recorded
from .shown import Shown

__all__ = ["Shares", "shares"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False, repr=False)
class Shares(Shown):
    """The gradient of the recurrent weights by lag: how much of it has travelled so many steps.

    bin_edges: `[M+1]` bin m holds the lags bin_edges[m] <= lag < bin_edges[m+1]. norm: `[L, M]` |G_m|, the Frobenius
    norm of the part G_m that a bin holds. share: `[L, M]` <G_m, G> / |G|^2, which adds up to 1 over bins and may be
    negative. bias: `[L, M]` |G_0 + ... + G_m - G| / |G|, the relative error of a gradient that is cut after bin m.
    total: `[L]` |G|, where G is the sum over all bins.
    """

    layers: tuple[str, ...]
    bin_edges: Ints
    norm: Floats
    share: Floats
    bias: Floats
    total: Floats


def shares(
    subject: torch.nn.Module | Recording,
    batch: Any = None,
    loss: Loss | None = None,
    *,
    bin_edges: Sequence[int] | None = None,
) -> Shares:
    """Split the gradient of the recurrent weights by the steps that it has travelled: short range against long range.

    dL/dW_hh = sum_k G_k,  G_k = sum_t da_{t-k}^(t) h_{t-k-1}',  da^(t) what the loss at t sends to the pre-activations

    subject, batch, loss: as in `record`, or a Recording alone. bin_edges: where bins begin, in lags counted from 0,
    ascending; by default 0, 1, 2, 4, 8, ... to at most 256. One more bin holds all lags beyond the last edge, by
    difference from the full gradient, so that nothing is missing.

    Raises ValueError for bin edges that do not ascend from 0, and as `lag_map` does.

    >>> import torch, bptt
    >>> s = bptt.flow.shares(bptt.nn.GRU(2, 3), torch.randn(20, 4, 2), lambda y: y.square().mean())
    >>> s.bin_edges.tolist(), round(float(s.share[0].sum()), 6)
    ([0, 1, 2, 4, 8, 16, 20], 1.0)
    """
    recording = recorded(subject, batch, loss)
    check_one_way(recording)
    T = recording.T
    if bin_edges is None:
        bounds = [0, *(2**i for i in range(9) if 2**i < T)]
    else:
        bounds = [index(edge) for edge in bin_edges]
        if bounds[:1] != [0] or any(b <= a for a, b in pairwise(bounds)):
            raise ValueError(f"bin_edges must ascend from 0: got {list(bin_edges)}")
        bounds = [b for b in bounds if b < T]
    K, L = bounds[-1] or 1, len(recording.names)
    shapes = [w.hh.shape for w in recording.weights]
    parts = [torch.zeros(len(bounds), *shape, dtype=torch.float64, device="cpu") for shape in shapes]
    bins = torch.bucketize(torch.arange(K, device="cpu"), torch.tensor(bounds[1:], device="cpu"), right=True)
    with torch.no_grad():
        program, saved = recording.forward()
        tapes, cell = program.tapes(saved), recording.cell

        def see(k: int, frames: Frames, result: SweepResult, lag: Tensor, _: Tensor) -> None:
            tape, da = tapes[k], given(result.da)
            gates = da if tape.gates is None else frames.spread(tape.gates)
            da, h = cell.recurrent(da, gates), frames.spread(tape.prev[0])
            bin = torch.where(lag >= 0, bins[lag.clamp(min=0)], -1)
            for m in bin.unique().tolist():
                if m >= 0:
                    rows = bin == m
                    parts[k][m] += (da[rows].double().T @ h[rows].double()).cpu()

        sweep_by_loss(recording, K, None, None, see)
        total = _full(recording)
    for k, G in enumerate(total):
        parts[k][-1] += G - parts[k].sum(0)  # the last bin: what lies beyond the lags measured
    size = np.zeros(L)
    norm, share, bias = (np.zeros((L, len(bounds))) for _ in range(3))
    for k, G in enumerate(total):
        scale = float(G.abs().max())
        scale = scale if 0 < scale < float("inf") else 1.0  # the square of a finite number may not be finite
        flat, whole = parts[k].flatten(1) / scale, G.flatten() / scale
        size[k] = float(whole.norm())
        norm[k] = flat.norm(dim=1).numpy() * scale
        with np.errstate(invalid="ignore", divide="ignore"):
            share[k] = (flat @ whole).numpy() / size[k] ** 2
            bias[k] = (flat.cumsum(0) - whole).norm(dim=1).numpy() / size[k]
        size[k] *= scale
    return Shares(recording.names, np.array([*bounds, T]), norm, share, bias, size)


def _full(recording: Recording) -> list[Tensor]:
    """dL/dW_hh of every layer and direction, float64."""
    program, saved = recording.forward()
    grads = program.backward(saved, recording.asked(gradients=True)).inputs
    return [w.hh.double().cpu() for w in program.net.weights(grads)]
