"""How far gradients travel: the (t, lag) map of what each loss sends back, and what follows from it.

Legend: T steps, K lags measured (0..K-1), N losses measured, L layers (and directions, as torch.nn orders them).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import index
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..engine import Walk
from ..kernels import Columns, Frames, Swept, Wanted
from ..policies import Full, Reach
from ._chain import Chain, Subject, chain_of
from ._recording import Loss, Recording, recorded

__all__ = ["LAGS", "LagMap", "Lags", "Shares", "by_lag", "lag_map", "shares"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

REVERSED = " reversed"
"""How the name of a layer's second direction ends."""

LAGS = 256
"""Lags measured where none are asked for: the walk takes as many times the work of the full gradient's."""


@dataclass(frozen=True, eq=False)
class LagMap:
    """|contribution of the loss at step t to the adjoint at step t - lag|.

    layers: L names ("layer 0", "layer 0 reversed", ...; "carry" for a scan). t: `[N]` steps of the losses, from 0.
    lag: `[K]` 0..K-1 steps. norm: `[L, N, K]`, Euclidean norm over the numbers of a state, mean over lanes, in units of
    loss per unit of state; NaN where t - lag lies before the sequence. state: what is differentiated by: "h",
    "(h, c)" or "carry". T: steps of the sequence. B: lanes.
    """

    layers: tuple[str, ...]
    t: Ints
    lag: Ints
    norm: Floats
    state: str
    T: int
    B: int


@dataclass(frozen=True, eq=False)
class Lags:
    """A map summed up by lag.

    lag: `[K]`. norm: `[L, K]` mean over the losses that reach so far back. losses: `[K]` how many those are.
    rate: `[L]` the factor per step by which the norm decays over its tail (least squares on its logarithm): below 1 it
    vanishes, above 1 it explodes; NaN where fewer than two lags have a norm above zero. rate_error: `[L]` its standard
    error. horizon_90, horizon_99: `[L]` the lag within which 90 and 99 % of the sum over lags of the norm arise.
    complete: `[L]` whether the tail beyond the last lag measured, continued at `rate`, would add less than 1 %.
    """

    layers: tuple[str, ...]
    lag: Ints
    norm: Floats
    losses: Ints
    rate: Floats
    rate_error: Floats
    horizon_90: Ints
    horizon_99: Ints
    complete: npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Shares:
    """dL/dW_hh by lag: the part of the weights' gradient that travelled so many steps.

    edges: `[M+1]` bin m holds the lags edges[m] <= lag < edges[m+1]. norm: `[L, M]` |G_m|, Frobenius norm of a bin's
    part. share: `[L, M]` <G_m, G> / |G|^2, which adds up to 1 over bins and may be negative. bias: `[L, M]`
    |G_0 + ... + G_m - G| / |G|, the relative error of cutting behind bin m. total: `[L]` |G|, G the sum over all bins.
    """

    layers: tuple[str, ...]
    edges: Ints
    norm: Floats
    share: Floats
    bias: Floats
    total: Floats


def lag_map(
    subject: Subject,
    batch: Any = None,
    loss: Loss | None = None,
    *,
    lags: int | None = None,
    every: int = 1,
    lanes: int | None = None,
) -> LagMap:
    """What the loss at each step contributes to the adjoint so many steps before: |(J_t ... J_{t-k+1})' e_t|.

    The walk is that of `Truncated(lags)`: every loss walks back by itself. It takes up to `lags` times the work of the
    full gradient, less in proportion where `every` and `lanes` pick from the losses.

    subject, batch, loss: as in `record`; or a Recording, or the chain of a scan (`steps`), alone. lags: how many, from
    0; default min(T, 256). every: only the losses at steps every - 1, 2 every - 1, ... lanes: only the first so many.

    In a stack the loss's way leads down through the layers: the map of a lower layer has what arrives there. In a
    bidirectional layer the lag counts along each direction. "The loss at t" is whatever cotangent arrives at y_t; that
    of the final state belongs to the last step.

    Raises ValueError for lags, every or lanes below 1, and for several bidirectional layers, where a loss reaches both
    ways; else what `record` raises.

    >>> import torch, bptt
    >>> layer = bptt.nn.RNN(2, 3, nonlinearity="identity")
    >>> _ = torch.nn.init.eye_(layer.weight_hh_l0.data).mul_(0.5)
    >>> bptt.flow.lag_map(layer, torch.zeros(4, 1, 2)).norm[0, 3].round(4).tolist()  # errors of norm 1
    [1.0, 0.5, 0.25, 0.125]

    Source: Pascanu, Mikolov, Bengio 2013 (arXiv 1211.5063), equations 3 to 5; equations/README.md, (1.13) and (8.2).
    """
    if not isinstance(subject, torch.nn.Module | Recording):
        return _map_of_chain(chain_of(subject, batch, loss), lags, every, lanes)
    recording = recorded(subject, batch, loss)
    _check_one_way(recording)
    T, names = recording.T, recording.names
    K, last = _lags(lags, T), _losses(every, T)
    total, count = np.zeros((2, len(names), len(last), K))
    tiny = 16 * torch.finfo(recording.dy.dtype).tiny
    with torch.no_grad():
        for k, frames, swept, lag in _by_loss(recording, K, every, lanes):
            assert swept.adjoint is not None
            squares = swept.adjoint.double().square().sum(-1)
            if swept.adjoint_c is not None:
                squares += swept.adjoint_c.double().square().sum(-1)
            norm = squares.sqrt().cpu().numpy()
            norm[norm < tiny] = 0  # what has lost its precision on the way to zero
            t = (frames.end - frames.last if names[k].endswith(REVERSED) else frames.last).expand_as(lag)
            seen = (lag >= 0).numpy()
            at = (t.numpy()[seen] // every, lag.numpy()[seen])
            np.add.at(total[k], at, norm[seen])
            np.add.at(count[k], at, 1)
    with np.errstate(invalid="ignore"):
        norm = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    state = "(h, c)" if recording.cell.states == 2 else "h"
    B = recording.B if lanes is None else min(lanes, recording.B)
    return LagMap(names, last, np.arange(K), norm, state, T, B)


def by_lag(map: LagMap) -> Lags:
    """A map summed up by lag: mean norm, decay rate, effective horizon.

    The rate is exp(slope) of a line through log norm against lag, by least squares weighted by the losses behind each
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
    # Outside of the sequence a NaN means that there is nothing; inside, that something is wrong.
    inside = np.array([_steps_before(map, layer)[:, None] >= map.lag for layer in map.layers])
    sends = (np.where(inside, map.norm, 0) != 0).any((0, 2))  # NaN is not 0
    inside, norms = inside[:, sends], map.norm[:, sends]
    counts = inside.sum(1)
    with np.errstate(invalid="ignore"):
        norm = np.where(inside, norms, 0).sum(1) / np.maximum(counts, 1)
    losses = counts[0]
    fits = [fit_decay(row, count) for row, count in zip(norm, counts, strict=True)]
    rate, error = (np.array([fit[i] for fit in fits]) for i in (0, 1))
    whole = len(map.lag) == map.T
    complete = [
        bool(np.isfinite(row).all()) and (whole or _tail(row, r) < 0.01 * row.sum())
        for row, r in zip(norm, rate, strict=True)
    ]
    horizons = [[_horizon(row, part) for row in norm] for part in (0.9, 0.99)]
    return Lags(
        map.layers, map.lag, norm, losses, rate, error, np.array(horizons[0]), np.array(horizons[1]), np.array(complete)
    )


def shares(
    subject: torch.nn.Module | Recording,
    batch: Any = None,
    loss: Loss | None = None,
    *,
    edges: Sequence[int] | None = None,
) -> Shares:
    """The gradient of the recurrent weights by the number of steps it has travelled: short range against long range.

    dL/dW_hh = sum_k G_k,  G_k = sum_t da_{t-k}^(t) h_{t-k-1}',  da^(t) what the loss at t sends to the pre-activations

    subject, batch, loss: as in `record`, or a Recording alone. edges: of the bins, lags counted from 0, ascending;
    default 0, 1, 2, 4, 8, ... to at most 256. A last bin holds all lags beyond the last edge, by difference from the
    full gradient, so that nothing is missing.

    Raises ValueError for edges that do not ascend from 0, and as `lag_map` does.

    >>> import torch, bptt
    >>> s = bptt.flow.shares(bptt.nn.GRU(2, 3), torch.randn(20, 4, 2), lambda y: y.square().mean())
    >>> s.edges.tolist(), round(float(s.share[0].sum()), 6)
    ([0, 1, 2, 4, 8, 16, 20], 1.0)
    """
    recording = recorded(subject, batch, loss)
    _check_one_way(recording)
    T = recording.T
    if edges is None:
        bounds = [0, *(2**i for i in range(9) if 2**i < T)]
    else:
        bounds = [index(edge) for edge in edges]
        if bounds[:1] != [0] or any(b <= a for a, b in pairwise(bounds)):
            raise ValueError(f"edges must ascend from 0: got {list(edges)}")
        bounds = [b for b in bounds if b < T]
    K, L = bounds[-1] or 1, len(recording.names)
    shapes = [w.hh.shape for w in recording.weights]
    parts = [torch.zeros(len(bounds), *shape, dtype=torch.float64, device="cpu") for shape in shapes]
    bins = torch.bucketize(torch.arange(K, device="cpu"), torch.tensor(bounds[1:], device="cpu"), right=True)
    with torch.no_grad():
        walk = recording.walk()
        for k, frames, swept, lag in _by_loss(recording, K, 1, None, walk):
            tape, cell = walk.tapes[k], recording.cell
            gates = swept.da if tape.gates is None else frames.spread(tape.gates)
            da, h = cell.recurrent(swept.da, gates), frames.spread(tape.prev[0])
            bin = torch.where(lag >= 0, bins[lag.clamp(min=0)], -1)
            for m in bin.unique().tolist():
                if m >= 0:
                    rows = bin == m
                    parts[k][m] += (da[rows].double().T @ h[rows].double()).cpu()
        total = _full(recording)
    for k, G in enumerate(total):
        parts[k][-1] += G - parts[k].sum(0)  # the last bin: what lies beyond the lags walked
    size = np.array([float(G.norm()) for G in total])
    norm, share, bias = (np.zeros((L, len(bounds))) for _ in range(3))
    for k, G in enumerate(total):
        flat, whole = parts[k].flatten(1), G.flatten()
        norm[k] = flat.norm(dim=1).numpy()
        with np.errstate(invalid="ignore", divide="ignore"):
            share[k] = (flat @ whole).numpy() / size[k] ** 2
            bias[k] = (flat.cumsum(0) - whole).norm(dim=1).numpy() / size[k]
    return Shares(recording.names, np.array([*bounds, T]), norm, share, bias, size)


def fit_decay(norm: Floats, weights: npt.NDArray[Any]) -> tuple[float, float]:
    """(factor per lag, its standard error) of a geometric decay: a weighted line through log norm over the farther half
    of the lags above 0 where anything arrives; NaN for fewer than two.
    """
    ends = int(np.argmin(np.isfinite(norm))) if not np.isfinite(norm).all() else len(norm)
    lag = np.flatnonzero((norm[:ends] > 0) & (weights[:ends] > 0))  # what is left behind an infinity tells nothing
    lag = lag[lag > 0] if len(lag) > 2 else lag
    lag = lag[-max(2, -(-len(lag) // 2)) :]
    if len(lag) < 2:
        return float("nan"), float("nan")
    w, y = weights[lag].astype(float), np.log(norm[lag])
    x = lag - np.average(lag, weights=w)
    slope = float(np.sum(w * x * y) / np.sum(w * x * x))
    residual = y - np.average(y, weights=w) - slope * x
    spread = np.sum(w * residual**2) / np.sum(w) * len(lag) / (len(lag) - 2) if len(lag) > 2 else 0.0
    rate = float(np.exp(slope))
    return rate, rate * float(np.sqrt(spread * np.sum(w) / len(lag) / np.sum(w * x * x)))


def _by_loss(
    recording: Recording, K: int, every: int, lanes: int | None, walk: Walk | None = None
) -> Iterator[tuple[int, Frames, Swept, Tensor]]:
    """The sweeps of the walk in which every loss is a block: (k, frames, what came back, lag `[R, N]`, -1 for none)."""
    walk = recording.walk() if walk is None else walk
    stack = walk.stack
    columns = Columns.of(Reach(K, 1, fenced=False), stack.lengths, recording.T, recording.B, stack.directions)
    chosen = columns.frames[0].last % every == every - 1
    if lanes is not None:
        chosen &= columns.frames[0].lane < _count("lanes", lanes, 1)
    picked = Columns(tuple(f.pick(chosen) for f in columns.frames), columns.takes[:, chosen], columns.span[chosen])
    wanted = Wanted(adjoint=True, initial=False, adjoint_c=True)
    for k, frames, swept in walk.sweeps(picked, wanted):
        lag = frames.last - frames.steps()
        yield k, frames, swept, torch.where((lag >= 0) & (lag < K), lag, -1)


def _check_one_way(recording: Recording) -> None:
    """Raise ValueError where a loss reaches both ways, so that it has no lag."""
    if recording.layer.bidirectional and recording.layer.num_layers > 1:
        raise ValueError("a loss reaches both ways in several bidirectional layers: measure one bidirectional layer")


def _map_of_chain(chain: Chain, lags: int | None, every: int, lanes: int | None) -> LagMap:
    """The same walk over the steps of any chain, the losses side by side in the rows."""
    K, last = _lags(lags, chain.T), _losses(every, chain.T)
    B = chain.B if lanes is None else min(_count("lanes", lanes, 1), chain.B)
    if chain.errors is None:
        raise ValueError(f"the losses of {chain.name} come from the layers above it: measure the whole recording")
    norm = np.full((1, len(last), K), np.nan)
    walking: list[int] = []  # losses by number, the latest first
    rows = chain.errors.new_empty(0, chain.B, chain.S)
    for t in reversed(range(chain.T)):
        if (t + 1) % every == 0:
            walking.append(t // every)
            rows = torch.cat([rows, chain.errors[t : t + 1]])
        if walking and last[walking[0]] - t >= K:
            walking, rows = walking[1:], rows[1:]
        norm[0, walking, last[walking] - t] = rows[:, :B].norm(dim=-1).mean(1).cpu().numpy()
        if t in chain.edges and walking:
            rows = chain.pull(t, rows)
    return LagMap((chain.name,), last, np.arange(K), norm, "carry", chain.T, B)


def _lags(lags: int | None, T: int) -> int:
    """How many lags are measured."""
    return min(_count("lags", lags, LAGS), T)


def _losses(every: int, T: int) -> Ints:
    """The steps whose losses are measured."""
    if _count("every", every, 1) > T:
        raise ValueError(f"every must be at most the {T} steps of the sequence: got {every}")
    return np.arange(every - 1, T, every)


def _full(recording: Recording) -> list[Tensor]:
    """dL/dW_hh of every layer and direction, float64."""
    stack, tensors = recording.stack(Full()), recording.call.tensors
    outputs, tape = stack.forward(tensors, keep=True)
    cotangents = (recording.dy, *recording.dfinal)
    grads, _ = stack.gradients(tensors, outputs, tape, cotangents, (True,) * len(tensors), want_adjoints=False)
    return [w.hh.double().cpu() for w in stack.weights(grads)]


def _steps_before(map: LagMap, layer: str) -> Ints:
    """How many steps of the sequence lie before each loss, in the layer's direction."""
    return map.T - 1 - map.t if layer.endswith(REVERSED) else map.t


def _tail(norm: Floats, rate: float) -> float:
    """The sum beyond the last lag, if the norm went on to decay at this rate."""
    if norm[-1] == 0:
        return 0.0
    return float(norm[-1] * rate / (1 - rate)) if rate < 1 else float("inf")


def _horizon(norm: Floats, part: float) -> int:
    """The smallest lag within which that part of the sum arises."""
    total = norm.sum()
    if not np.isfinite(total):
        return len(norm) - 1
    return int(np.argmax(np.cumsum(norm) >= part * total * (1 - 1e-9)))  # a sum may round below its part


def _count(name: str, value: int | None, default: int) -> int:
    """A whole number of at least 1."""
    if value is None:
        return default
    try:
        count = index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number: got {value!r} ({type(value).__name__})") from None
    if count < 1:
        raise ValueError(f"{name} must be at least 1: got {value}")
    return count
