"""What follows from constant step Jacobians, by NumPy alone: nothing here asks `bptt.flow`.

Legend: T steps, B lanes, S numbers in a layer's state, N losses (a step and lane that the loss reads), K lags.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["Truth", "forward_lstm", "gates_gru", "reach"]

Floats = npt.NDArray[np.float64]

FAR = 6000
"""Lags that a curve is followed over, at most: what decays by 0.999 a step has lost all but 1/400 by then."""

LOSSES = 256
"""Losses that are followed where each goes its own way, at most, evenly out of all."""

MOST_LAGS = 256
"""Lags that a survey measures where none are asked for."""


@dataclass(eq=False)
class Truth:
    """A net's constant step Jacobians and the errors of its losses, and what follows.

    errors: `[T, B, H]` at the outputs. jacobians: of each layer `[S, S]`. downwards: what takes the adjoint of a layer
    to the one below it. rate: the factor per lag of every loss, where there is one. radius: the largest |eigenvalue|
    of the top layer's W_hh. cell: an LSTM, of which `jacobians` holds the cell's part. opened: its `[T, B, H]`
    dh_t/dc_t. rectified: by relu, whose states are all above 0. bounded: the activation has ends. gates: the values of
    each gate `[T, B, H]` by name. lengths: `[B]`. resets: `[T, B]`.
    """

    errors: Floats
    dtype: torch.dtype
    jacobians: list[Floats]
    downwards: list[Floats] = field(default_factory=list)
    rate: float | None = None
    radius: float = 0.0
    cell: bool = False
    opened: Floats | None = None
    rectified: bool = False
    bounded: bool = False
    gates: dict[str, Floats] | None = None
    lengths: Any = None
    resets: Any = None

    @cached_property
    def losses(self) -> tuple[Any, Any]:
        """The steps and the lanes that have a loss."""
        return np.nonzero(self.errors.any(-1))

    @cached_property
    def reaches(self) -> Any:
        """Lags behind each loss, its own step not counted: to the lane's beginning, or the last reset."""
        t, lane = self.losses
        if self.resets is None:
            return t
        steps = np.arange(len(self.errors))[:, None]
        begun = np.maximum.accumulate(np.where(self.resets, steps, 0), 0)
        return t - begun[t, lane]

    @cached_property
    def measured(self) -> int:
        """Lags that a survey measures: those that any loss reaches, 256 at most."""
        return min(int(self.reaches.max()) + 1, MOST_LAGS)

    def send(self, t: Any, lane: Any) -> list[Floats]:
        """Of each layer `[N, K]`: the norm of what these losses send back, in a sequence without a beginning."""
        e = self.errors[t, lane]
        if self.cell:
            assert self.opened is not None
            f = np.diag(self.jacobians[0])
            into = e * self.opened[t, lane]  # the cell, from where it goes on alone
            norms = np.sqrt(into**2 @ f[:, None] ** (2 * np.arange(self._far(f.max()) + 0.0)))
            norms[:, 0] = np.linalg.norm(e, axis=1)  # at its own step the state is (h_t, c_t): the loss reads h_t
            return [norms]
        if self.rate is not None:
            with np.errstate(over="ignore"):
                return [np.linalg.norm(e, axis=1, keepdims=True) * self.rate ** np.arange(self._far(self.rate) + 0.0)]
        J = self.jacobians[0]
        if len(self.jacobians) == 1 and not np.any(J - np.diag(np.diag(J))):
            z = np.diag(J)
            return [np.sqrt(e**2 @ z[:, None] ** (2 * np.arange(self._far(z.max()) + 0.0)))]
        return self._followed(e)

    def _far(self, rate: float) -> int:
        """Lags after which the rest of a decay by this factor does not matter."""
        return FAR if rate > 0.998 else max(MOST_LAGS, int(np.log(1e-5) / np.log(rate)) if rate else 0)

    def _followed(self, e: Floats) -> list[Floats]:
        """Step by step, down through the layers: `[N, K]` each, those of the lowest layer first."""
        L = len(self.jacobians)
        now = [np.zeros_like(e) for _ in range(L)]
        now[-1] = e
        norms: list[list[Floats]] = [[] for _ in range(L)]
        for lag in range(FAR):
            for i in reversed(range(L)):
                if i < L - 1:  # what comes down at the step itself
                    now[i] = now[i] @ self.jacobians[i] + now[i + 1] @ self.downwards[i]
                elif lag:
                    now[i] = now[i] @ self.jacobians[i]
                norms[i].append(np.linalg.norm(now[i], axis=1))
            if lag >= MOST_LAGS and all(n[-1].max() < 1e-6 * max(n[0].max(), 1e-300) for n in norms):
                break
        return [np.array(n).T for n in norms]

    @cached_property
    def curves(self) -> list[Floats]:
        """Of each layer `[K]`: what a longer window would show. As `seen` in the lags measured; from there on, what the
        losses that reach the last of them would send on.
        """
        return self._followed_through(np.arange(len(self.reaches)))

    @property
    def seen(self) -> list[Floats]:
        """Of each layer `[measured]`: what the losses of this batch send back, from lag to lag those that reach both,
        from the mean norm of their errors on.
        """
        return [curve[: self.measured] for curve in self.curves]

    def of_loss(self, t: int) -> list[Floats]:
        """The same of the loss at step t alone, over the lanes that have it."""
        return self._followed_through(np.flatnonzero(self.losses[0] == t))

    def _followed_through(self, chosen: Any) -> list[Floats]:
        (t, lane), last = self.losses, min(int(self.reaches[chosen].max()), MOST_LAGS - 1)
        sums: list[list[Floats]] = []
        for part in np.array_split(chosen, -(-len(chosen) // LOSSES)):
            for i, norms in enumerate(self.send(t[part], lane[part])):
                lags = np.minimum(np.arange(norms.shape[1]), last)
                reaches = np.minimum(self.reaches[part, None], last) >= lags
                before = np.zeros(norms.shape[1])
                here = np.where(reaches, norms, 0).sum(0)
                before[1:] = np.where(reaches[:, 1:], norms[:, :-1], 0).sum(0)
                if len(sums) == i:
                    sums.append([here, before])
                else:
                    n = min(len(here), len(sums[i][0]))
                    sums[i] = [sums[i][0][:n] + here[:n], sums[i][1][:n] + before[:n]]
        curves = []
        for here, before in sums:
            before[0] = len(chosen)
            with np.errstate(invalid="ignore"):  # behind the end of a curve
                curves.append(np.cumprod(np.nan_to_num(here / before, posinf=np.inf)))
        return curves

    @cached_property
    def overflows(self) -> bool:
        """Whether an adjoint comes near the end of the range of floats in the window."""
        most = float(torch.finfo(self.dtype).max) / 1e3
        return any(bool(np.any(curve[: self.measured] > most)) for curve in self.curves)

    def power(self, n: int) -> tuple[float, float, float]:
        """(least, most) that the norm of a product of n step Jacobians may be, and its smallest singular value."""
        J = self.jacobians[-1]
        if self.rate is not None:
            norm, smallest = self.rate**n, self.rate**n
        else:
            norm = float(np.linalg.norm(np.linalg.matrix_power(J, n), 2))
            invertible = abs(np.linalg.det(J)) > 0
            smallest = 1 / float(np.linalg.norm(np.linalg.matrix_power(np.linalg.inv(J), n), 2)) if invertible else 0.0
        if self.cell and n:
            assert self.opened is not None
            return norm, norm * float(np.sqrt(1 + self.opened.max() ** 2)), 0.0
        return norm, norm, smallest

    def of_far_losses(self, i: int) -> float:
        """The median horizon of those losses."""
        return float(np.median([reach(self.of_loss(step)[i], 0.9) for step in self.far]))

    @property
    def far(self) -> list[int]:
        """The steps of the losses that reach back the farthest, in the lags measured."""
        return np.unique(self.losses[0][self.reaches >= self.measured - 1]).tolist()

    @cached_property
    def grown(self) -> tuple[float, float]:
        """(least, most) factor per step of a perturbation in any direction, over the steps that are averaged."""
        J = self.jacobians[-1]
        if self.rate is not None:
            return self.rate, self.rate
        T, B = self.errors.shape[:2]
        closed = np.zeros((1, B), dtype=bool) if self.resets is None else self.resets[1:]
        v = np.random.default_rng(0).standard_normal((1000, len(J)))
        logs = [np.zeros(len(v))]
        for _ in range(T - 1):
            v = v @ J.T
            size = np.linalg.norm(v, axis=1)
            with np.errstate(divide="ignore"):
                logs.append(logs[-1] + np.log(size))
            v /= np.where(size > 0, size, 1)[:, None]
        skipped = (T - 1) // 10
        found = []
        for lane in range(B):
            first, last = skipped - closed[:skipped, lane].sum(), T - 1 - closed[:, lane].sum()
            with np.errstate(invalid="ignore"):
                found.append((logs[last] - logs[first]) / max(last - first, 1))
        ends = np.nan_to_num(found, nan=-np.inf)  # a perturbation that has died
        return float(np.exp(ends.min())), float(np.exp(ends.max()))

    @property
    def largest(self) -> float:
        """The largest factor per step in the long run."""
        if self.rate is not None:
            return self.rate
        return float(max(np.abs(np.linalg.eigvals(self.jacobians[-1]))))


def reach(curve: Floats, part: float) -> float:
    """The lag within which that part of a curve's sum arises; infinite where it has not decayed."""
    if not curve[-1] <= 1e-3 * curve[0]:
        return float("inf")
    return float(np.argmax(np.cumsum(curve) >= part * curve.sum() * (1 - 1e-9)))


def _pre(layer: Any, x: Floats, gate: int) -> Floats:
    """What reaches a gate `[T, B, H]`, by input and biases alone."""
    H = layer.hidden_size
    rows = slice(gate * H, (gate + 1) * H)
    w, b, c = (getattr(layer, name)[rows].detach().double().numpy() for name in
               ("weight_ih_l0", "bias_ih_l0", "bias_hh_l0"))  # fmt: skip
    return np.asarray(x @ w.T + b + c)


def _sigmoid(a: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-a)))


def gates_gru(layer: Any, x: Floats) -> dict[str, Floats]:
    """r, z and n of a GRU without recurrent weights."""
    return {"r": _sigmoid(_pre(layer, x, 0)), "z": _sigmoid(_pre(layer, x, 1)), "n": np.tanh(_pre(layer, x, 2))}


def forward_lstm(layer: Any, x: Floats) -> tuple[dict[str, Floats], Floats]:
    """(i, f, g and o of an LSTM without recurrent weights; its dh_t/dc_t `[T, B, H]`)."""
    i, f, o = (_sigmoid(_pre(layer, x, k)) for k in (0, 1, 3))
    g = np.tanh(_pre(layer, x, 2))
    c, slopes = np.zeros_like(g[0]), []
    for t in range(len(x)):
        c = f[t] * c + i[t] * g[t]
        slopes.append(o[t] * (1 - np.tanh(c) ** 2))
    return {"i": i, "f": f, "g": g, "o": o}, np.array(slopes)
