"""The window that a bound on the bias asks for, from measured lag norms: what `Adaptive` policies go by.

Legend: K lags measured (0..K-1), T steps, B lanes, R positions and N columns of a sweep. A window of w steps holds the
lags 0..w-1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..engine import Observer
from ..kernels import Columns, Frames, SweepResult
from ..policies import Adaptive, Reach
from ._lags import _count
from ._recording import Loss, Recording, recorded
from .horizon import fit_decay, tail_sum
from .shown import Shown

__all__ = ["Adapted", "adapt", "adapted", "contributions", "smallest_window"]

Floats = npt.NDArray[np.float64]

LOSSES = 8
"""Steps whose losses are measured: over the lanes of a batch they make a few hundred samples."""


@dataclass(frozen=True, eq=False, repr=False)
class Adapted(Shown):
    """A window that was chosen by its estimated bias, with the estimate.

    window: the smallest number of steps that is good enough, or the largest one allowed where none is. satisfied:
    whether it is good enough. bias: the estimated relative bias at that window. rate: the factor per step by which phi
    decays over its tail; NaN where fewer than two lags are above zero. phi: `[K]` the mean norm of dL_s/ds_{s-k}, over
    the losses s that reach so far back. biases: `[K]` the estimated relative bias of the windows 1..K, infinity where
    the estimate gives no bound.
    """

    window: int
    satisfied: bool
    bias: float
    rate: float
    phi: Floats
    biases: Floats


def smallest_window(
    phi: Floats, partial: Floats, max_bias: float, *, least: int = 1, losses: npt.NDArray[Any] | None = None
) -> Adapted:
    """Find the smallest window from `least` to K whose estimated relative bias is at most max_bias.

    phi: `[K]` mean norm of the contribution at lag k, not negative. partial: `[K]` |g_w|, the norm of the mean sum of
    the contributions at lags 0..w-1, for w = 1..K; in the same unit. losses: `[K]` over how many losses each phi is the
    mean; these are the weights of the fit. By default all weigh the same.

    With beta the decay rate of phi over its tail (`Lags.rate`), what a window w leaves out is at most

    E(w) = sum_{w <= k < K} phi_k + phi_{K-1} beta / (1 - beta),

    |g| is at least the largest |g_j| - E(j) over j, and the relative bias at most the quotient of the two: infinity for
    beta >= 1, or where that bound of |g| is not positive.

    Raises ValueError where phi and partial are not two arrays of the same length, at least `least`, of finite numbers
    of at least 0.

    >>> import numpy as np
    >>> phi = 0.5 ** np.arange(40)
    >>> found = smallest_window(phi, phi.cumsum(), 0.1)  # a bias of 0.5**w
    >>> found.window, round(found.rate, 6), found.satisfied
    (4, 0.5, True)

    Source: Aicher, Foti and Fox 2019 (arXiv 1905.07473), section 4.
    """
    phi, partial = np.asarray(phi, dtype=np.float64), np.asarray(partial, dtype=np.float64)
    if phi.ndim != 1 or phi.shape != partial.shape or not 1 <= least <= len(phi):
        raise ValueError(
            f"phi and partial must be arrays [K] of one length, at least least={least}: got {phi.shape} and "
            f"{partial.shape}"
        )
    for name, values in (("phi", phi), ("partial", partial)):
        if not (np.isfinite(values).all() and (values >= 0).all()):
            raise ValueError(f"{name} must hold finite numbers of at least 0: got {values}")
    rate, _ = fit_decay(phi, np.ones(len(phi)) if losses is None else losses)
    left_out = np.append(phi[::-1].cumsum()[::-1][1:], 0.0) + tail_sum(phi, rate)
    least_norm = float(np.max(partial - left_out))
    biases = left_out / least_norm if least_norm > 0 else np.full(len(phi), np.inf)
    good = np.flatnonzero(biases[least - 1 :] <= max_bias)
    window = int(good[0]) + least if len(good) else len(phi)
    return Adapted(window, len(good) > 0, float(biases[window - 1]), rate, phi, biases)


def adapted(
    subject: torch.nn.Module | Recording,
    batch: Any = None,
    loss: Loss | None = None,
    *,
    policy: Adaptive,
    losses: int = LOSSES,
) -> Adapted:
    """Measure the window that an adaptive policy should have on this batch. Nothing is changed.

    subject, batch, loss: as for `record`; or a Recording alone. policy: an adaptive policy, which gives the bounds and
    `every`. losses: of how many steps the losses are measured; these are the last ones, since they reach farthest.
    Steps and lanes without any loss do not count.

    The contributions are those to the states of all layers and directions together, from one backward pass under
    `Truncated(max_window)`; their mean is taken over losses and lanes. The work is losses / T times that of the pass.

    Where no gradient comes back, or one that is not finite, there is no estimate. Then the window is max_window, and
    `satisfied` is False.

    Raises what `record` raises; TypeError where policy is not an adaptive one; ValueError where losses is below 1.

    >>> import torch, bptt
    >>> from bptt.policies import Adaptive
    >>> _ = torch.manual_seed(0)
    >>> found = bptt.flow.adapted(bptt.nn.GRU(2, 8), torch.randn(60, 4, 2), policy=Adaptive(0.5, 40))
    >>> found.window < 40, found.satisfied, found.phi.shape
    (True, True, (40,))

    Source: see `smallest_window`.
    """
    if not isinstance(policy, Adaptive):
        raise TypeError(f"policy must be an Adaptive policy: got {policy!r}")
    phi, partial, count = contributions(recorded(subject, batch, loss), policy.max_window, _count("losses", losses, 1))
    if not (len(phi) and np.isfinite(phi).all() and np.isfinite(partial).all()):
        return Adapted(policy.max_window, False, np.inf, np.nan, phi, np.full(len(phi), np.inf))
    found = smallest_window(phi, partial, policy.max_bias, least=min(policy.every, len(phi)), losses=count)
    return found if found.satisfied else replace(found, window=policy.max_window)


def adapt(
    subject: torch.nn.Module | Recording,
    batch: Any = None,
    loss: Loss | None = None,
    *,
    losses: int = LOSSES,
) -> Adapted:
    """Measure the window that this batch asks for, and set it in the layer's adaptive policy.

    It is meant to be called now and then during training.

    Arguments: as for `adapted`. The layer's `gradient` must be an `Adaptive` policy; it is replaced by one with the new
    window. On sequences that are shorter than max_window, the window is at most their length. Nothing else changes.

    Raises TypeError where the layer has another policy, and otherwise what `adapted` raises.

    >>> import torch, bptt
    >>> layer = bptt.nn.RNN(2, 8, gradient="adaptive:0.5,max=40")
    >>> found = bptt.flow.adapt(layer, torch.randn(60, 4, 2))
    >>> layer.gradient.window == found.window
    True

    Source: see `smallest_window`.
    """
    recording = recorded(subject, batch, loss)
    layer = recording.layer
    if not isinstance(layer.gradient, Adaptive):
        raise TypeError(f"the layer's gradient must be an Adaptive policy: got {layer.gradient}")
    found = adapted(recording, policy=layer.gradient, losses=losses)
    layer.gradient = replace(layer.gradient, window=max(found.window, layer.gradient.every))
    return found


@torch.no_grad()
def contributions(recording: Recording, window: int, losses: int) -> tuple[Floats, Floats, Floats]:
    """(phi, partial, losses) of `smallest_window`, for the last `losses` steps that have a loss.

    K is window, or less where no loss reaches so far back; 0 where there is none.
    """
    program, saved = recording.forward()
    net = program.net
    K = min(window, recording.T)
    columns = Columns.of(Reach(K, 1, stops_at_start=False), net.lengths, recording.T, recording.B, net.directions)
    columns = _with_loss(columns, recording, losses)
    if len(columns.span) == 0:
        return np.zeros(0), np.zeros(0), np.zeros(0)
    width = sum(state.shape[2] for state in recording.call.hx)
    means = recording.dy.new_zeros(len(recording.names), K, width, dtype=torch.float64)
    norms, count = means.new_zeros(K), means.new_zeros(K)

    def see(group: list[tuple[int, Frames, SweepResult]]) -> None:
        """The sweeps of all layers and directions over the same columns."""
        squares = means.new_zeros(K, len(group[0][1].start))
        reached = torch.zeros_like(squares, dtype=torch.bool)
        for k, frames, result in group:
            rows = torch.cat(result.adjoints, -1).double().flatten(0, 1)
            lag, column = (index.to(rows.device) for index in _lags(frames))
            rows, lag, column = rows[lag >= 0], lag[lag >= 0], column[lag >= 0]
            means[k].index_add_(0, lag, rows)
            squares.index_put_((lag, column), rows.square().sum(-1), accumulate=True)
            reached[lag, column] = True
        norms.add_(squares.sqrt().sum(1))
        count.add_(reached.sum(1))

    program.backward(saved, recording.asked(), observer=_Groups(len(recording.names), see), columns=columns)
    far = int((count > 0).sum())  # the farthest lag that any loss reaches
    norms, count, means = norms[:far], count[:far], means[:, :far]
    partial = (means / count[:, None]).cumsum(1).square().sum((0, 2)).sqrt()
    return (norms / count).cpu().numpy(), partial.cpu().numpy(), count.cpu().numpy()


def _with_loss(columns: Columns, recording: Recording, losses: int) -> Columns:
    """The columns of the last so many steps with a loss, one per step and lane."""
    forward = columns.frames[0]
    has = (recording.dy != 0).any(-1).cpu()[forward.first, forward.lane]
    if any(d is not None for d in recording.dfinal):
        for frames in columns.frames:
            has = has | (frames.last == frames.end)
    steps = forward.first[has].unique()
    keep = has & torch.isin(forward.first, steps[-losses:])
    return columns.pick(keep)


class _Groups(Observer):
    """Collects the sweeps of all layers and directions over the same columns."""

    def __init__(self, size: int, see: Callable[[list[tuple[int, Frames, SweepResult]]], None]) -> None:
        self.size, self.see = size, see
        self.group: list[tuple[int, Frames, SweepResult]] = []

    def swept(self, k: int, frames: Frames, result: SweepResult) -> None:
        self.group.append((k, frames, result))
        if len(self.group) == self.size:
            self.see(self.group)
            self.group = []


def _lags(frames: Frames) -> tuple[Tensor, Tensor]:
    """The lag of each position `[R * N]`, -1 where a column has none there, and its column."""
    steps = frames.steps()
    lag = (frames.first - steps).abs().masked_fill(steps > frames.top, -1)
    return lag.flatten(), torch.arange(steps.shape[1], device="cpu").repeat(steps.shape[0])
