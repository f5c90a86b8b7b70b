"""Gradient policies compared on one batch: bias, variance, time, memory.

Legend: T steps, B lanes, N parameters of the layer as one vector, g its gradient under a policy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..clock import Guard, Timing, disturbed, interleaved
from ..policies import Adaptive, Full, Policy, Randomized, parse
from ._adaptive import adapted, contributions
from ._allocations import peak_bytes
from ._horizon import fit_decay
from ._lags import _count
from ._policy_gradient import PolicyGradient, gradient_vector, under
from ._recording import Loss, Recording, recorded

__all__ = ["POLICIES", "Comparison", "Row", "compare", "contraction"]

POLICIES = (
    "full",
    "chunked:5",
    "chunked:20",
    "truncated:5",
    "truncated:20",
    "truncated:20/5",
    "randomized:0.5",
    "randomized:0.9",
    "randomized:mean=20,tail=4",
)
"""One or two settings of each kind."""

FAR = 10**6
"""Steps from the last cut at which a keep probability has reached its limit."""

PATTERNS = 2**11
"""Cut patterns, over all lanes, up to which all are walked: about the time of as many small walks."""

LEAST = 5
"""Samples of each policy's time, at least: fewer have no quartiles to speak of."""

SECONDS = 0.5
"""For which timing goes on at least, where the samples asked for take less."""

LAGS, LOSSES = 128, 16
"""What the contraction is measured on, at most: lags, and steps with a loss."""


class NotComparable(ValueError):  # noqa: N818  # it says what the batch is
    """The full gradient of the batch is 0 or not finite."""


@dataclass(frozen=True)
class Row:
    """One policy against the full gradient, all parameters of the layer as one vector.

    policy: its text form, of an adaptive one with the window in use. bias: |E[g] - g_full| / |g_full|; bias_error: its
    standard error, 0 where exact. cosine: between E[g] and g_full. variance: E|g - E[g]|^2 / |g_full|^2, 0 for a policy
    that draws nothing; variance_error: its standard error, 0 where exact. exact: by enumeration of all cuts (or nothing
    is drawn) rather than by sampling. draws: how many were sampled or enumerated; 1 where nothing is drawn. time: of
    one forward and backward, `seconds` its median. bytes: kept and written in one backward beyond the inputs (peak),
    None where not measured. reliable: False where the policy was sampled though its variance is infinite on long
    sequences (p at most `Comparison.critical_p`): a few rare draws, which a sample lacks, then make up mean and
    variance, and neither they nor their errors mean much.
    """

    policy: str
    bias: float
    bias_error: float
    cosine: float
    variance: float
    variance_error: float
    exact: bool
    draws: int
    time: Timing
    bytes: int | None
    reliable: bool = True

    @property
    def seconds(self) -> float:
        """The median of the time."""
        return self.time.median


@dataclass(frozen=True)
class Comparison:
    """Several policies on the same batch.

    layer: its repr. T, B: steps and lanes. rows: one per policy, in the order given. full_norm: |g_full|.
    own: the policy that the layer has and was trained with, always among the rows; None where that is not known.
    threads, cores: torch's threads, and how many cores a product on so many got beside the timings; fewer where other
    programs took their part. NaN where nobody looked.
    contraction: factor per step by which the norm of an adjoint changes in this batch, fitted as `Lags.rate` is, all
    layers together; NaN where it cannot be. critical_p: contraction^2: the keep probability above which the variance of
    randomized truncation stays finite as T grows; at least 1 where no keep probability does.
    """

    layer: str
    T: int
    B: int
    rows: tuple[Row, ...]
    full_norm: float
    contraction: float
    critical_p: float
    own: str | None = None
    threads: int = 1
    cores: float = math.nan

    @property
    def trained_with(self) -> Row | None:
        """The row of the subject's own policy."""
        return next((row for row in self.rows if row.policy == self.own), None)

    @property
    def disturbed(self) -> bool:
        """Whether other programs took so much of the machine that the times say little."""
        return disturbed(self.cores, self.threads)


def compare(
    subject: torch.nn.Module | Recording,
    batch: Any = None,
    loss: Loss | None = None,
    *,
    policies: Sequence[str | Policy] = POLICIES,
    draws: int = 200,
    repeats: int = LEAST,
    seed: int = 0,
) -> Comparison:
    """Every policy's gradient against the full one, on the same batch and the same errors: its bias, variance and cost.

    subject, batch, loss: as in `record`, or a Recording alone. policies: or their text forms. draws: of each random
    policy, at least 2, where there are too many ways to cut to walk them all (above 2048 over all lanes). repeats:
    samples of each policy's time, at least 5; more are taken where they are short. seed: of a generator that only this
    call uses; a generator of the policy's own is not touched.

    The gradient of the parameters is computed in float64, with no dropout between layers. From n draws with mean m and
    sample variance s^2 (sums over the N parameters), bias^2 = |m - g_full|^2 - s^2 / n, which is unbiased, or 0 where
    that is negative; its standard error is taken to be |s| / sqrt(n), by which m differs from E[g]: an unbiased policy
    shows a bias within about twice that, unless its variance is infinite (`Row.reliable`). Lanes draw independently, so
    that their exact variances add up.

    The layer's own policy is always among those compared, as the last where it was not named.

    Time and bytes are of one forward and backward in the recording's own precision, the draw included, for the
    gradients of the parameters alone. All policies are timed in turn, round by round, beside a product that tells
    whether other programs take their part of the machine (`Comparison.disturbed`); where one time is less than another,
    see `bptt.clock.Timing.apart`. Bytes are the peak of what torch holds: not the inputs, not a kernel's own
    scratch.

    Raises ValueError for no policies, draws below 2, repeats below 5, a full gradient that is 0 or not finite; else
    what `record` raises.

    >>> import torch, bptt
    >>> layer = bptt.nn.RNN(2, 3)  # its own policy is full
    >>> found = bptt.flow.compare(layer, torch.randn(8, 1, 2), policies=("chunked:4", "randomized:0.9"))
    >>> [row.policy for row in found.rows if row.bias < 1e-12]  # all 2**7 ways to cut
    ['randomized:0.9', 'full']

    Source: equations/README.md, 6.2 for what is biased, (6.13) for what is not, (6.16) to (6.18) for the variance.
    """
    recording = recorded(subject, batch, loss)
    if isinstance(policies, str | Policy):
        policies = [policies]
    parsed = [_in_use(parse(policy), recording) for policy in policies]
    if not parsed:
        raise ValueError("policies must name at least one: got none")
    own = _in_use(recording.layer.gradient, recording)
    if own not in parsed:
        parsed.append(own)
    if _count("draws", draws, 2) < 2:
        raise ValueError(f"draws must be at least 2, for a variance: got {draws}")
    if _count("repeats", repeats, LEAST) < LEAST:
        raise ValueError(f"repeats must be at least {LEAST}, for a median with its quartiles: got {repeats}")
    gradient = PolicyGradient(recording.to(torch.float64))
    full = gradient(Full())
    norm = float(full.norm())
    if not 0 < norm < float("inf"):
        raise NotComparable(f"the full gradient must be finite and not 0, to compare with: its norm is {norm}")
    guard = Guard()
    times = _times(recording, parsed, repeats, seed, guard)
    rate = contraction(recording)
    rows = []
    for policy, time in zip(parsed, times, strict=True):
        found = _measured(gradient, policy, full / norm, norm, draws, seed)
        rows.append(
            Row(
                policy=str(policy),
                bias=max(found.bias_square, 0.0) ** 0.5,
                bias_error=0.0 if found.exact else (found.variance / found.draws) ** 0.5,
                cosine=float(torch.nn.functional.cosine_similarity(found.mean, full, dim=0)),
                variance=found.variance,
                variance_error=found.variance_error,
                exact=found.exact,
                draws=found.draws,
                time=time,
                bytes=peak_bytes(_pass(recording, policy, seed)),
                reliable=found.exact or not isinstance(policy, Randomized) or not policy.keep(FAR) <= rate**2,
            )
        )
    return Comparison(
        layer=repr(recording.layer),
        T=recording.T,
        B=recording.B,
        rows=tuple(rows),
        full_norm=norm,
        contraction=rate,
        critical_p=rate**2,
        own=str(own),
        threads=guard.threads,
        cores=guard.got,
    )


def _in_use(policy: Policy, recording: Recording) -> Policy:
    """An adaptive policy without a window gets the one that this batch asks for."""
    if not isinstance(policy, Adaptive) or policy.window is not None:
        return policy
    return replace(policy, window=max(adapted(recording, policy=policy).window, policy.every))


def contraction(recording: Recording) -> float:
    """The factor per step by which the norm of an adjoint changes, all layers and directions together.

    Fitted as `Lags.rate` is, on at most the last 16 steps with a loss and 128 lags; NaN where no line can be fitted.
    """
    phi, _, losses = contributions(recording, LAGS, LOSSES)
    return fit_decay(phi, losses)[0]


@dataclass(frozen=True)
class _Moments:
    """Mean `[N]`, variance (sum over N) and squared bias of a policy's gradient over the full one's norm."""

    mean: Tensor
    bias_square: float
    variance: float
    variance_error: float
    exact: bool
    draws: int


def _measured(gradient: PolicyGradient, policy: Policy, full: Tensor, norm: float, draws: int, seed: int) -> _Moments:
    """The moments of g under a policy: as it is, over all cuts, or over a sample of them. full: of norm 1."""
    if not isinstance(policy, Randomized) or policy.p == 1 or gradient.edges == 0:
        g = gradient(policy) / norm
        return _Moments(g, float((g - full).square().sum()), 0.0, 0.0, exact=True, draws=1)
    if gradient.B * 2**gradient.edges <= PATTERNS:
        mean, variance = torch.zeros_like(full), 0.0
        for lane in range(gradient.B):
            one, first, second = gradient.lane(lane), torch.zeros_like(full), 0.0
            for xi, probability in _cuts(policy, gradient.T, gradient.draws):
                g = one(policy, xi) / norm
                first += probability * g
                second += probability * float(g.square().sum())
            mean += first
            variance += second - float(first.square().sum())
        square = float((mean - full).square().sum())
        return _Moments(mean, square, max(variance, 0.0), 0.0, exact=True, draws=gradient.B * 2**gradient.edges)
    seeded = replace(policy, generator=torch.Generator("cpu").manual_seed(seed))
    total, squares = torch.zeros_like(full), np.zeros(draws)
    for i in range(draws):
        difference = gradient(seeded) / norm - full
        total += difference
        squares[i] = float(difference.square().sum())
    off = total / draws
    square = float(off.square().sum())
    variance = (float(squares.mean()) - square) * draws / (draws - 1)
    error = float(squares.std(ddof=1)) / draws**0.5
    return _Moments(off + full, square - variance / draws, variance, error, exact=False, draws=draws)


def _cuts(policy: Randomized, T: int, draws: int) -> Iterator[tuple[tuple[Tensor, ...], float]]:
    """Every outcome of so many independent draws for one lane: (xi `[T, 1, 1]` of each draw, its probability)."""
    single = []
    for kept in product((False, True), repeat=T - 1):
        probability, distance = 1.0, 1
        for keeps in kept:
            p = policy.keep(distance)
            probability *= p if keeps else 1 - p
            distance = distance + 1 if keeps else 1
        xi = policy.weights(torch.tensor(kept, dtype=torch.float64, device="cpu").logical_not().double()[:, None])
        single.append((xi[..., None], probability))
    for outcome in product(single, repeat=draws):
        yield tuple(xi for xi, _ in outcome), float(np.prod([p for _, p in outcome]))


def _pass(recording: Recording, policy: Policy, seed: int) -> Callable[[], Tensor]:
    """One forward and backward, as in training."""
    if isinstance(policy, Randomized):
        policy = replace(policy, generator=torch.Generator("cpu").manual_seed(seed))
    plain, tensors = recording.stack(Full()), recording.call.tensors
    cotangents = (recording.dy, *recording.dfinal)

    @torch.no_grad()
    def run() -> Tensor:
        stack = under(plain, policy, recording.T, recording.B, tensors)
        outputs, tape = stack.forward(tensors, keep=True)
        return gradient_vector(stack, tensors, outputs, tape, cotangents)

    return run


def _times(recording: Recording, policies: Sequence[Policy], repeats: int, seed: int, guard: Guard) -> list[Timing]:
    """The time of one forward and backward under each policy, measured in turn."""

    def timed(run: Callable[[], Tensor]) -> Callable[[], object]:
        def call() -> None:
            result = run()
            if result.is_cuda:
                torch.cuda.synchronize(result.device)

        return call

    calls = {str(i): timed(_pass(recording, policy, seed)) for i, policy in enumerate(policies)}
    return list(interleaved(calls, SECONDS, repeats, guard=guard).values())
