"""How far gradients travel: the (t, lag) map of what each loss sends back.

Legend: T steps, K lags measured (0..K-1), N losses measured, L layers (and directions, as torch.nn orders them).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import index
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..engine import Observer
from ..kernels import Columns, Frames, SweepResult
from ..policies import Reach
from ..policies.arguments import count
from ._chain import Chain, lengths_of
from ._recording import Loss, Recording, recorded
from ._subjects import Subject, chain_of, scan_of
from .shown import Shown

__all__ = ["LAGS", "LagMap", "check_one_way", "followed", "lag_map", "sweep_by_loss"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

REVERSED = " reversed"
"""How the name of a layer's second direction ends."""

LAGS = 256
"""Lags measured where none are asked for: the walk takes as many times the work of the full gradient's."""


@dataclass(frozen=True, eq=False, repr=False)
class LagMap(Shown):
    """The map of |contribution of the loss at step t to the adjoint at step t - lag|.

    layers: L names ("layer 0", "layer 0 reversed", ...; "carry" for a scan). t: `[N]` steps of the losses, from 0.
    lag: `[K]` 0..K-1 steps. norm: `[L, N, K]`, Euclidean norm over the numbers of a state, mean over the lanes that
    have the steps t and t - lag, in units of loss per unit of state; NaN where none has them. state: what is
    differentiated by: "h", "(h, c)" or "carry". T: steps of the sequence. B: lanes. present: `[L, N, K]` how many lanes
    the mean is over; sending: `[L, N, K]` how many of them have a loss at t that reaches t - lag. By default all do.

    Where none sends there is no data, which is no error: the sequences have ended or not begun, the step has no loss
    (an error of 0), or a reset lies between. A norm that is not finite where a lane sends is one.

    before: `[L, N, K]` the mean norm of the lanes that send, one lag nearer to the loss (at lag 0 it is not used): what
    they have lost since is the decay, whatever the size of the losses of other lanes. By default `each`, at that lag.

    lane_norm: `[L, B, K]` what the losses of each lane send, summed up as `Lags.norm` is; NaN where there is no data,
    None where it was not measured.
    """

    layers: tuple[str, ...]
    t: Ints
    lag: Ints
    norm: Floats
    state: str
    T: int
    B: int
    present: Ints | None = None
    sending: Ints | None = None
    before: Floats | None = None
    lane_norm: Floats | None = None

    @property
    def counts(self) -> tuple[Ints, Ints]:
        """`present` and `sending`, or what they are by default."""
        if self.present is None or self.sending is None:
            lengths = np.full(self.B, self.T)
            present = np.array([_present(lengths, self.t, self.lag, name) for name in self.layers])
            return present, present
        return self.present, self.sending

    @property
    def there(self) -> Bools:
        """`[L, N, K]` where there is data: where any lane sends."""
        return self.counts[1] > 0

    @property
    def each(self) -> Floats:
        """`[L, N, K]` the mean norm over the lanes that send, NaN where there is no data."""
        present, sending = self.counts
        return np.where(sending > 0, self.norm, np.nan) * (present / np.maximum(sending, 1))

    @property
    def followed(self) -> Floats:
        """`[L, N, K]` `each` at lag 0, and from lag to lag the same lanes: those that reach the farther one."""
        return followed(self.each, self.earlier)

    @property
    def earlier(self) -> Floats:
        """`before`, or what it is by default."""
        if self.before is not None:
            return self.before
        each = self.each
        return np.concatenate([each[..., :1], each[..., :-1]], -1)


def lag_map(
    subject: Subject,
    batch: Any = None,
    loss: Loss | None = None,
    *,
    lags: int | None = None,
    every: int = 1,
    lanes: int | None = None,
    at: Sequence[int] | None = None,
) -> LagMap:
    """Measure what the loss at each step contributes to the adjoint so many steps before: |(J_t ... J_{t-k+1})' e_t|.

    The walk is that of `Truncated(lags)`: every loss walks back by itself. It takes up to `lags` times the work of the
    full gradient, less in proportion where `every` and `lanes` pick from the losses.

    subject, batch, loss: as in `record`; or a Recording, or the chain of a scan (`steps`), alone. lags: how many, from
    0; default min(T, 256). every: only the losses at steps every - 1, 2 every - 1, ... lanes: only the first so many.
    at: the steps whose losses are measured, ascending, in place of `every`.

    In a stack the loss's way leads down through the layers: the map of a lower layer has what arrives there. In a
    bidirectional layer the lag counts along each direction. "The loss at t" is whatever cotangent arrives at y_t; that
    of the final state belongs to the last step. A step and lane where the cotangent is 0 has no loss.

    Raises ValueError for lags, every or lanes below 1, for steps in `at` that are not there or do not ascend, and for
    several bidirectional layers, where a loss reaches both ways; else what `record` raises.

    >>> import torch, bptt
    >>> layer = bptt.nn.RNN(2, 3, nonlinearity="identity")
    >>> _ = torch.nn.init.eye_(layer.weight_hh_l0.data).mul_(0.5)
    >>> bptt.flow.lag_map(layer, torch.zeros(4, 1, 2)).norm[0, 3].round(4).tolist()  # errors of norm 1
    [1.0, 0.5, 0.25, 0.125]

    Source: Pascanu, Mikolov, Bengio 2013 (arXiv 1211.5063), equations 3 to 5; equations/README.md, (1.13) and (8.2).
    """
    scan = scan_of(subject, batch, loss)
    if scan is not None:
        return _map_of_chain(scan.chain, lags, every, lanes, at)
    if not isinstance(subject, torch.nn.Module | Recording):
        return _map_of_chain(chain_of(subject, batch, loss), lags, every, lanes, at)
    recording = recorded(subject, batch, loss)
    check_one_way(recording)
    T, names = recording.T, recording.names
    K, last = _lags(lags, T), _losses(every, at, T)
    B = recording.B if lanes is None else min(lanes, recording.B)
    total, before = np.zeros((len(names), len(last), K)), np.zeros((len(names), len(last), K))
    sending = np.zeros((len(names), len(last), K), dtype=np.int64)
    own, owned, sent = (np.zeros((len(names), B, K)) for _ in range(3))  # of each lane, and one lag nearer
    row = np.full(T, -1)
    row[last] = np.arange(len(last))
    tiny = 16 * torch.finfo(recording.dy.dtype).tiny
    with torch.no_grad():

        def see(k: int, frames: Frames, result: SweepResult, lag: Tensor, open: Tensor) -> None:
            norm = reduce(torch.hypot, map(_norm, result.adjoints)).cpu().numpy()
            norm[norm < tiny] = 0  # what has lost its precision on the way to zero
            t = (frames.end - frames.last if names[k].endswith(REVERSED) else frames.last).expand_as(lag)
            seen = ((lag >= 0) & open).numpy()
            at_lag = (row[t.numpy()[seen]], lag.numpy()[seen])
            np.add.at(total[k], at_lag, norm[seen])
            np.add.at(before[k], at_lag, np.roll(norm, -1, 0)[seen])  # of the same column, one lag nearer
            np.add.at(sending[k], at_lag, 1)
            in_lane = (frames.lane.expand_as(lag).numpy()[seen], lag.numpy()[seen])
            np.add.at(own[k], in_lane, norm[seen])
            np.add.at(owned[k], in_lane, np.roll(norm, -1, 0)[seen])
            np.add.at(sent[k], in_lane, 1)

        sweep_by_loss(recording, K, last, lanes, see)
    lengths = recording.lengths.numpy()[:B]
    present = np.array([_present(lengths, last, np.arange(K), name) for name in names])
    norm = total / np.where(present > 0, present, np.nan)
    state = "(h, c)" if recording.cell.states == 2 else "h"
    before /= np.where(sending > 0, sending, np.nan)
    lane_norm = followed(_mean(own, sent), _mean(owned, sent))
    return LagMap(names, last, np.arange(K), norm, state, T, B, present, sending, before, lane_norm)


See = Callable[[int, Frames, SweepResult, Tensor, Tensor], None]
"""What is done with a sweep: (k, frames, its result, lag `[R, N]`, whether no reset lies on the way `[R, N]`)."""


def sweep_by_loss(recording: Recording, K: int, at: Ints | None, lanes: int | None, see: See) -> None:
    """Walk back with a block for every loss, and see each sweep. The lag is -1 where there is none: no loss of its own,
    or beyond what is walked.

    at: the steps whose losses walk; None for all. A step and lane without a loss walks nowhere.
    """
    program, saved = recording.forward()
    net = program.net
    columns = Columns.of(Reach(K, 1, stops_at_start=False), net.lengths, recording.T, recording.B, net.directions)
    sends = [recording.sends(k) for k in range(len(recording.names))]
    chosen = torch.stack(sends).any(0)
    if at is not None:
        chosen[np.setdiff1d(np.arange(recording.T), at)] = False
    if lanes is not None:
        chosen[:, _count("lanes", lanes, 1) :] = False
    forward = columns.frames[0]
    own = chosen[forward.last, forward.lane]
    picked = columns.pick(own)
    if not len(picked.span):
        return

    class ByLoss(Observer):
        def swept(self, k: int, frames: Frames, result: SweepResult) -> None:
            lag, steps = frames.last - frames.steps(), frames.steps().clamp(max=recording.T - 1)
            resets = net.resets_of(k % net.directions)
            reached = torch.ones_like(lag, dtype=torch.bool)
            if resets is not None:
                episode = resets[..., 0].cpu().cumsum(0)
                reached = episode[steps, frames.lane] == episode[frames.last, frames.lane]
            reverse = recording.names[k].endswith(REVERSED)
            sent = sends[k][frames.end - frames.last if reverse else frames.last, frames.lane]
            see(k, frames, result, torch.where((lag >= 0) & (lag < K) & sent, lag, -1), reached)

    program.backward(saved, recording.asked(), observer=ByLoss(), columns=picked)


def check_one_way(recording: Recording) -> None:
    """Raise ValueError where a loss reaches both ways, so that it has no lag."""
    if recording.layer.bidirectional and recording.layer.num_layers > 1:
        raise ValueError("a loss reaches both ways in several bidirectional layers: measure one bidirectional layer")


def _map_of_chain(chain: Chain, lags: int | None, every: int, lanes: int | None, at: Sequence[int] | None) -> LagMap:
    """The same walk over the steps of any chain, the losses side by side in the rows."""
    K, last = _lags(lags, chain.T), _losses(every, at, chain.T)
    B = chain.B if lanes is None else min(_count("lanes", lanes, 1), chain.B)
    if chain.errors is None:
        raise ValueError(f"the losses of {chain.name} come from the layers above it: measure the whole recording")
    norm, before = np.full((1, len(last), K), np.nan), np.full((1, len(last), K), np.nan)
    sending = np.zeros((1, len(last), K), dtype=np.int64)
    earlier = chain.errors.new_empty(0, B)  # what the losses sent one lag nearer
    lane_norm, lane_before, lane_sends = (np.zeros((1, B, K)) for _ in range(3))
    walking: list[int] = []  # losses by number, the latest first
    rows = chain.errors.new_empty(0, chain.B, chain.S)
    open = torch.zeros(0, chain.B, dtype=torch.bool, device=rows.device)  # whether a loss is not beyond a reset
    number = {int(t): i for i, t in enumerate(last)}
    for t in reversed(range(chain.T)):
        if t in number:
            walking.append(number[t])
            rows = torch.cat([rows, chain.errors[t : t + 1]])
            earlier = torch.cat([earlier, earlier.new_zeros(1, B)])
            open = torch.cat([open, (chain.errors[t : t + 1] != 0).any(-1)])
        if walking and last[walking[0]] - t >= K:
            walking, rows, open, earlier = walking[1:], rows[1:], open[1:], earlier[1:]
        size, own = rows[:, :B].norm(dim=-1), open[:, :B]
        at_lag = (0, walking, last[walking] - t)
        sending[at_lag] = own.sum(1).cpu().numpy()
        norm[at_lag] = size.where(own, 0).sum(1).cpu().numpy()
        before[at_lag] = (earlier.where(own, 0).sum(1) / own.sum(1)).cpu().numpy()
        lane_norm[0][:, at_lag[2]] += size.where(own, 0).T.cpu().numpy()
        lane_before[0][:, at_lag[2]] += earlier.where(own, 0).T.cpu().numpy()
        lane_sends[0][:, at_lag[2]] += own.T.cpu().numpy()
        earlier = size
        if t in chain.transitions and walking:
            rows, open = chain.pull(t, rows), open & chain.open(t)
    lengths = np.minimum((lengths_of(chain) - chain.transitions[0]).numpy()[:B], chain.T)
    present = _present(lengths, last, np.arange(K), chain.name)[None]
    norm /= np.where(present > 0, present, np.nan)
    lane_norm = followed(_mean(lane_norm, lane_sends), _mean(lane_before, lane_sends))
    return LagMap((chain.name,), last, np.arange(K), norm, "carry", chain.T, B, present, sending, before, lane_norm)


def _mean(total: Floats, counted: Floats) -> Floats:
    """NaN where nothing is counted."""
    return np.asarray(total / np.where(counted > 0, counted, np.nan))


def _norm(adjoint: Tensor) -> Tensor:
    """Euclidean norms over the last dimension, float64; of finite numbers finite, though their squares are not."""
    values = adjoint.double()
    norm = values.norm(dim=-1)
    if bool(torch.isfinite(norm).all()):
        return norm
    scale = values.abs().amax(-1, keepdim=True)
    scale = scale.where((scale > 0) & torch.isfinite(scale), 1)
    return (values / scale).norm(dim=-1) * scale[..., 0]


def followed(each: Floats, before: Floats) -> Floats:
    """`[..., K]` from each curve's first value on, the product of each / before; 0 from where nothing arrives."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore", under="ignore"):
        factors = each / before
        factors[..., :1] = each[..., :1]
        return np.asarray(np.cumprod(np.where(each == 0, 0.0, factors), -1), dtype=np.float64)


def _lags(lags: int | None, T: int) -> int:
    """How many lags are measured."""
    return min(_count("lags", lags, LAGS), T)


def _losses(every: int, at: Sequence[int] | None, T: int) -> Ints:
    """The steps whose losses are measured."""
    if at is not None:
        steps = np.array([index(t) for t in at], dtype=np.int64)
        if not len(steps) or np.any(np.diff(steps) <= 0) or steps[0] < 0 or steps[-1] >= T:
            raise ValueError(f"at must hold steps out of 0..{T - 1}, ascending: got {list(at)}")
        return steps
    if _count("every", every, 1) > T:
        raise ValueError(f"every must be at most the {T} steps of the sequence: got {every}")
    return np.arange(every - 1, T, every)


def _present(lengths: Ints, t: Ints, lag: Ints, name: str) -> Ints:
    """How many lanes of these lengths have the steps t and t - lag, in the direction's time: `[N, K]`."""
    reverse = name.endswith(REVERSED)
    last = t[:, None] + (lag if reverse else np.zeros_like(lag))  # the later of the two, in forward time
    alive = np.searchsorted(np.sort(lengths), last, side="right")
    inside = np.ones_like(last, dtype=bool) if reverse else t[:, None] >= lag
    return np.where(inside, len(lengths) - alive, 0)


def _count(name: str, value: int | None, default: int) -> int:
    """A whole number of at least 1; None is the default."""
    return default if value is None else count(name, value)
