"""A map with fewer numbers than a picture has room for."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ._lags import LagMap

__all__ = ["coarser"]

Floats = npt.NDArray[np.float64]


def coarser(measure: LagMap, layer: int, most: int) -> tuple[Floats, Floats, Floats]:
    """(t, lag, norm `[N, K]`) of one layer, at most `most` along each axis: the longer ones are averaged.

    Means over neighbours with data: NaN where there is none, infinite where one of them is not finite.
    """
    each = measure.each[layer]
    norm = np.where(measure.there[layer] & ~np.isfinite(each), np.inf, each)
    axes = [measure.t.astype(np.float64), measure.lag.astype(np.float64)]
    for dim in (0, 1):
        length = norm.shape[dim]
        starts = np.arange(0, length, -(-length // most))
        if len(starts) == length:
            continue
        there = ~np.isnan(norm)
        count = np.add.reduceat(there.astype(np.int64), starts, axis=dim)
        total = np.add.reduceat(np.where(there, norm, 0.0), starts, axis=dim)
        norm = np.where(count > 0, total / np.maximum(count, 1), np.nan)
        axes[dim] = np.add.reduceat(axes[dim], starts) / np.diff([*starts, length])
    return axes[0], axes[1], norm
