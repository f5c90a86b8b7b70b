"""Lyapunov exponents, measured by the QR method."""

from __future__ import annotations

from dataclasses import dataclass
from operator import index
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ._chain import Chain
from ._recording import Loss
from ._subjects import Subject, chain_of
from .shown import Shown

__all__ = ["Lyapunov", "NothingToMeasure", "lyapunov"]

_SEED = 0  # of the first frame
_BLOCKS = 20  # of time, for the standard error
_SHORTEST = 5  # steps of a block


class NothingToMeasure(ValueError):  # noqa: N818  # it says what the batch is
    """The error where resets or the ends of lanes close every step."""


@dataclass(frozen=True, eq=False, repr=False)
class Lyapunov(Shown):
    """The Lyapunov exponents: the mean growth rates of perturbations of the state, in nats per step.

    layer: whose states these are. exponents: `[n]` descending, mean over lanes; -inf for a direction that a Jacobian
    takes to 0. error: `[n]` the standard error of that mean, NaN where it cannot be told. running: `[steps, n]` the
    estimate after so many steps, mean over lanes. steps: over how many steps the mean was taken, after `warmup`. lanes:
    B. dead: in how many of them the largest is -inf, and so its mean, whatever it is in the others.
    """

    layer: str
    exponents: npt.NDArray[np.float64]
    error: npt.NDArray[np.float64]
    running: npt.NDArray[np.float64]
    steps: int
    warmup: int
    lanes: int
    dead: int = 0


def lyapunov(
    subject: Subject,
    batch: Any = None,
    loss: Loss | None = None,
    *,
    layer: int = 0,
    count: int | None = None,
    warmup: int | None = None,
) -> Lyapunov:
    """Measure the Lyapunov exponents: the mean rates at which perturbations of the state grow on a batch, in float64.

    A frame of n orthonormal tangents is pushed through every step and orthogonalised again, J_t Q_{t-1} = Q_t R_t:

        exponent_i = mean over t of log |(R_t)_ii|

    Where the largest is below 0, perturbations and gradients vanish at that rate. Where it is above 0, they explode,
    and the states, if they stay bounded, are chaotic. The sum of all S exponents is the mean of log |det J_t|.

    subject, batch, loss: as in `record`; or a Recording or a chain (`steps`) alone. layer: which layer and direction,
    numbered as torch.nn orders their parameters. count: n, the largest so many; default all S. warmup: steps for the
    frame to turn, which do not count; default a tenth.

    The error is the largest of three estimates. The first takes the means over up to 20 equal blocks of time (of 5
    steps or more) in every lane for independent samples; it is too small where a block is shorter than the correlations
    in time. The second does the same with the means of whole lanes, where there are two or more. The third is the
    difference between the later half of the steps and the earlier one, which is large where the frame is still turning.
    All three speak of the steps that were measured: a net whose directions shrink at nearly the same rates takes longer
    to show the slowest.

    A first tangent counts as taken to 0 where a Jacobian takes it to less than its rounding error.

    In a stack the exponents are those of one layer under its input. The Jacobian of the stack is block triangular, so
    its exponents are those of all layers together. A step that a reset closes does not count, nor does one past the end
    of a lane; the frame stays there as it is.

    Raises ValueError for a layer, count or warmup that does not exist, and where no step counts; otherwise what
    `record` raises.

    >>> import torch, bptt
    >>> layer = bptt.nn.RNN(2, 2, nonlinearity="identity")
    >>> layer.weight_hh_l0.data = torch.tensor([[2.0, 1.0], [0.0, 0.5]])
    >>> found = bptt.flow.lyapunov(layer, torch.zeros(100, 1, 2), warmup=50)
    >>> (found.exponents / np.log(2)).round(9).tolist()
    [1.0, -1.0]

    Source: Benettin, Galgani, Giorgilli, Strelcyn 1980 (Meccanica 15); for recurrent networks, Engelken, Wolf, Abbott
    2023 (arXiv 2006.02427) and Vogt et al. 2022 (arXiv 2006.14123).
    """
    chain = chain_of(subject, batch, loss, layer)
    total = len(chain.transitions)
    n = chain.S if count is None else index(count)
    if not 1 <= n <= chain.S:
        raise ValueError(f"count must be 1..{chain.S}, the numbers in a state: got {count}")
    skipped = total // 10 if warmup is None else index(warmup)
    if not 0 <= skipped < total:
        raise ValueError(f"warmup must be 0..{total - 1}, fewer than the steps: got {warmup}")
    grown, counted = _growth(chain, n)
    grown, counted = grown[skipped:], counted[skipped:]
    if not counted.any():
        raise NothingToMeasure("no step counts: resets or the ends of lanes close all of them")
    with np.errstate(invalid="ignore", divide="ignore"):
        passed = counted.cumsum(0)[..., None]
        lanes = np.where(counted[..., None], grown, 0).cumsum(0) / passed  # [steps, B, n]
        running = np.where(passed > 0, lanes, 0).sum(1) / (passed > 0).sum(1)
        error = np.fmax(np.fmax(_error(lanes[-1]), _error(_blocks(grown, counted))), _drift(grown, counted))
    order = np.argsort(-running[-1], kind="stable")
    dead = int((lanes[-1] == -np.inf).all(-1).sum())
    steps = total - skipped
    return Lyapunov(chain.name, running[-1, order], error[order], running[:, order], steps, skipped, chain.B, dead)


@torch.no_grad()
def _growth(chain: Chain, n: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """(log |R_ii| of every step `[steps, B, n]`, whether it counts `[steps, B]`)."""
    generator = torch.Generator("cpu").manual_seed(_SEED)

    def drawn(count: int) -> torch.Tensor:
        return torch.randn(chain.B, chain.S, count, dtype=torch.float64, generator=generator, device="cpu")

    frame = torch.linalg.qr(drawn(n))[0].to(chain.device)
    rounding = chain.S * torch.finfo(torch.float64).eps
    grown, counted = [], []
    for t in chain.transitions:
        probe = torch.nn.functional.normalize(drawn(1), dim=1).to(
            chain.device
        )  # how much J takes what is not the frame
        moved = chain.push(t, torch.cat([frame, probe], 2).permute(2, 0, 1)).permute(1, 2, 0)
        Q, R = torch.linalg.qr(moved[..., :n])
        size = R.diagonal(dim1=-2, dim2=-1).abs()
        lost = size[:, 0] <= rounding * moved.flatten(1).norm(dim=1)
        size = size.masked_fill(lost[:, None], 0)  # a direction drawn at random dies where all do
        passes = chain.open(t)
        frame = torch.where(passes[:, None, None], Q, frame)
        grown.append(size.log())
        counted.append(passes)
    return torch.stack(grown).cpu().numpy(), torch.stack(counted).cpu().numpy()


def _blocks(grown: npt.NDArray[np.float64], counted: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """The mean growth in each block of time and lane `[blocks * B, n]`, NaN where no step of a block counts."""
    blocks = max(1, min(_BLOCKS, len(grown) // _SHORTEST))
    size = len(grown) // blocks
    late = slice(len(grown) - blocks * size, None)  # what does not divide is left out at the start
    cut = (blocks, size, grown.shape[1])
    mask = counted[late].reshape(*cut, 1)
    sums = np.where(mask, grown[late].reshape(*cut, -1), 0).sum(1)
    return (sums / mask.sum(1)).reshape(-1, grown.shape[2])


def _drift(grown: npt.NDArray[np.float64], counted: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """What the mean growth over the later half of the steps differs by from that over the earlier `[n]`, mean over the
    lanes that count in both; NaN where there is none.
    """
    half = len(grown) // 2
    halves = []
    for steps in (slice(half), slice(half, None)):
        mask = counted[steps][..., None]
        halves.append(np.where(mask, grown[steps], 0).sum(0) / mask.sum(0))
    apart = halves[1] - halves[0]
    both = ~np.isnan(apart).all(1)
    return np.abs(apart[both].mean(0)) if both.any() else np.full(grown.shape[2], np.nan)


def _error(samples: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The standard error of the mean of samples `[M, n]`, rows of NaN left out; NaN for fewer than two."""
    kept = samples[~np.isnan(samples).all(1)]
    if len(kept) < 2:
        return np.full(samples.shape[1], np.nan)
    return kept.std(0, ddof=1) / np.sqrt(len(kept))
