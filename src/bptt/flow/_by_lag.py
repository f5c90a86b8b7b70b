"""The (t, lag) map summed up by lag: mean norm, decay rate, effective horizon.

Legend: K lags measured (0..K-1), N losses measured, L layers (and directions, as torch.nn orders them).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ._lags import LagMap, followed
from .horizon import fit_decay, horizon, settled, straight, tail_sum
from .shown import Shown

__all__ = ["Lags", "by_lag"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False, repr=False)
class Lags(Shown):
    """A map summed up by lag.

    lag: `[K]`. norm: `[L, K]` at lag 0 the mean over the losses, those of every lane; from lag to lag it changes as
    the sum over the losses that reach the farther one does, so that neither the size of a loss nor how early it comes
    is taken for a decay. Where all losses are alike that is the mean over those that reach so far. NaN where none does.
    losses: `[K]` at how many steps those are, in the layer with the most. sending: `[L, K]` how many losses the mean is
    over, those of every lane; default `losses`. Where it is 0 there is no data, which is no error. rate: `[L]` the
    factor per step by which the norm decays over its tail (least squares on its logarithm): below 1 it vanishes, above
    1 it explodes; NaN where fewer than two lags have a norm above zero. rate_error: `[L]` its standard error.
    horizon_90, horizon_99: `[L]` the lag within which 90 and 99 % of the sum over the lags measured arise: `settled`
    says whether more lags would move it. complete: `[L]` whether nothing of this batch is left out: all lags were
    measured, or the tail beyond the last one, continued at `rate`, would add less than 1 %.

    The spread of `rate` and `norm`: lane_norm: `[L, B, K]` the mean norm of each lane over its losses, NaN where there
    is no data; loss_norm: `[L, N, K]` that of each loss over its lanes. None where they are not known.
    """

    layers: tuple[str, ...]
    lag: Ints
    norm: Floats
    losses: Ints
    rate: Floats
    rate_error: Floats
    horizon_90: Ints
    horizon_99: Ints
    complete: Bools
    sending: Ints | None = None
    lane_norm: Floats | None = None
    loss_norm: Floats | None = None

    @property
    def counts(self) -> Ints:
        """`[L, K]` `sending`, or what it is by default."""
        return np.broadcast_to(self.losses, self.norm.shape) if self.sending is None else self.sending

    @property
    def there(self) -> Bools:
        """`[L, K]` where there is data."""
        return self.counts > 0

    @property
    def measured(self) -> Ints:
        """`[L]` lags that any loss reaches: the window that a horizon was measured in, in steps."""
        return np.count_nonzero(self.there, axis=1)

    def settled(self, part: float = 0.9) -> Bools:
        """Whether the lag within which that part arises is the net's, rather than the window's.

        A horizon grows with the window it is measured in until the tail beyond that window is small. It is settled
        where it lies in the first three quarters of the lags measured, and a window four times as long, fitted to the
        tail, would move it by at most 5 % or a step. Else it is at least so far.

        >>> import torch, bptt
        >>> layer = bptt.nn.init.identity_(bptt.nn.RNN(2, 3, nonlinearity="identity"), 0.9)
        >>> for T in 15, 60:  # 1 - 0.9^22 > 0.9: the horizon is 21
        ...     lags = bptt.flow.by_lag(bptt.flow.lag_map(layer, torch.zeros(T, 1, 2)))
        ...     print(lags.horizon_90.tolist(), lags.settled().tolist())
        [11] [False]
        [21] [True]
        """
        return np.array([settled(*self.curve(i), part) for i in range(len(self.layers))])

    @property
    def straight(self) -> Bools:
        """`[L]` whether the norm decays along a straight line from lag 1 on, so that one rate describes it.

        Over each quarter of the lags its logarithm falls as much as that of one line through all of them does, to
        within a quarter of that or a quarter of a nat.
        """
        return np.array([straight(*self.curve(i)) for i in range(len(self.layers))])

    def curve(self, layer: int) -> tuple[Floats, Ints]:
        """(norm, how many losses it is a mean of) of a layer, at the lags where there is data."""
        there = self.there[layer]
        return self.norm[layer][there], self.counts[layer][there]


def by_lag(map: LagMap) -> Lags:
    """Sum up a map by lag: mean norm, decay rate, effective horizon.

        norm_0 = mean over losses of |e|,  norm_k = norm_{k-1} * sum of what losses send to lag k
                                                               / sum of what the same losses send to lag k-1

    The rate is exp(slope) of a line through log norm against lag, by least squares weighted by the losses of each
    mean, over the farther half of the lags at which anything arrives. Steps without a loss, which send nothing back,
    do not count.

    >>> import torch, bptt
    >>> layer = bptt.nn.RNN(2, 3, nonlinearity="identity")
    >>> _ = torch.nn.init.eye_(layer.weight_hh_l0.data).mul_(0.5)
    >>> lags = bptt.flow.by_lag(bptt.flow.lag_map(layer, torch.zeros(30, 1, 2)))
    >>> round(float(lags.rate[0]), 6), int(lags.horizon_90[0]), int(lags.horizon_99[0])
    (0.5, 3, 6)

    Source: the fit, Aicher, Foti and Fox 2019 (arXiv 1905.07473), section 3.
    """
    sending = map.counts[1]
    lanes = sending.sum(1)
    with np.errstate(invalid="ignore", over="ignore"):
        total, earlier = (
            np.where(sending > 0, each * sending, 0).sum(1) / np.where(lanes > 0, lanes, np.nan)
            for each in (map.each, map.earlier)
        )
    norm = followed(total, earlier)
    fits = [fit_decay(row[n > 0], n[n > 0]) for row, n in zip(norm, lanes, strict=True)]
    rate, error = (np.array([fit[i] for fit in fits]) for i in (0, 1))
    whole = len(map.lag) == map.T
    complete, horizons = [], []
    for row, n, r in zip(norm, lanes, rate, strict=True):
        curve = row[n > 0]
        complete.append(bool(np.isfinite(curve).all()) and (whole or tail_sum(curve, r) <= 0.01 * curve.sum()))
        horizons.append([horizon(curve, part) if len(curve) else 0 for part in (0.9, 0.99)])
    ninety, rest = np.array(horizons).T
    number = np.count_nonzero(sending, axis=1).max(0)
    known = map.layers, map.lag, norm, number, rate, error, ninety, rest, np.array(complete), lanes
    return Lags(*known, lane_norm=map.lane_norm, loss_norm=map.followed)
