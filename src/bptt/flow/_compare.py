"""A comparison of gradient policies on one batch: bias, variance, time and memory.

Legend: T steps, B lanes, N parameters of the layer as one vector, g its gradient under a policy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..clock import Guard, Timing, disturbed, interleaved
from ..policies import COMPARED, Full, Policy, Randomized, parse
from ._allocations import peak_bytes
from ._comparable import Comparable, OfLayer
from ._lags import _count
from ._moments import moments
from ._recording import Loss, Recording, recorded
from ._scanned import Scanned
from ._subjects import scan_of
from .shown import Shown

__all__ = ["POLICIES", "Comparison", "Row", "compare"]

POLICIES = COMPARED
"""What is compared where nothing else is asked for."""

FAR = 10**6
"""Steps from the last cut at which a keep probability has reached its limit."""

REPEATS, LEAST = 9, 5
"""Samples of each policy's time: by default, and at least, since fewer have no quartiles to speak of."""

SECONDS = 0.5
"""For which timing goes on at least, where the samples asked for take less."""


class NotComparable(ValueError):  # noqa: N818  # it says what the batch is
    """The full gradient of the batch is 0 or not finite."""


@dataclass(frozen=True)
class Row:
    """A row of a comparison: one policy against the full gradient, all parameters of the layer as one vector.

    policy: its text form; an adaptive policy stands there with the window in use. bias: |E[g] - g_full| / |g_full|.
    bias_error: the standard error of the bias, 0 where it is exact. cosine: the cosine between E[g] and g_full.
    variance: E|g - E[g]|^2 / |g_full|^2, 0 for a policy that draws nothing. variance_error: its standard error, 0 where
    it is exact. exact: whether the numbers come from an enumeration of all cuts (or nothing is drawn), and not from
    sampling. draws: how many draws were sampled or enumerated; 1 where nothing is drawn. time: the time of one forward
    and backward pass, of which `seconds` is the median. bytes: the peak of what is kept and written in one backward
    pass beyond the inputs; None where it was not measured. reliable: False where the policy was sampled although its
    variance is infinite on long sequences (p is at most `Comparison.critical_p`). A few rare draws, which a sample
    lacks, then make up mean and variance, and neither they nor their errors mean much.
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


@dataclass(frozen=True, repr=False)
class Comparison(Shown):
    """A comparison of several policies on the same batch.

    layer: the repr of the layer; of a scan, the name of its step. T, B: steps and lanes. rows: one for each policy, in
    the order given. full_norm: |g_full|. own: the policy that the layer or scan has and is trained with, which is
    always among the rows; None where it is not known. threads, cores: the number of torch's threads, and how many cores
    a product on so many threads got while times were taken; these are fewer where other programs took their part, and
    NaN where nobody looked. contraction: the factor per step by which the norm of an adjoint changes in this batch,
    fitted as `Lags.rate` is, over all layers together; NaN where no line can be fitted. critical_p: contraction^2, the
    keep probability above which the variance of randomized truncation stays finite as T grows. Where it is at least 1,
    no keep probability does that.
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
        """The row of the policy that the subject is trained with."""
        return next((row for row in self.rows if row.policy == self.own), None)

    @property
    def disturbed(self) -> bool:
        """Whether other programs took so much of the machine that the times say little."""
        return disturbed(self.cores, self.threads)


def compare(
    subject: torch.nn.Module | Recording | Scanned,
    batch: Any = None,
    loss: Loss | None = None,
    *,
    policies: Sequence[str | Policy] = POLICIES,
    draws: int = 200,
    repeats: int = REPEATS,
    seed: int = 0,
) -> Comparison:
    """Compare every policy's gradient with the full one, on the same batch and the same errors: its bias, variance and
    cost.

    subject, batch, loss: as in `record`, or a Recording alone; or as in `record_scan`, for a `bptt.nn.Recurrent`; or a
    scan of any step with its loss, as `scanned` gives it, alone. policies: the policies, or their text forms. draws:
    how often each random policy is sampled, at least 2, where there are too many ways to cut to enumerate them all
    (more than 2048 over all lanes). repeats: how many samples of each policy's time are taken, at least 5; there are
    more where they are short. seed: the seed of a generator that only this call uses; a generator that belongs to a
    policy is not touched.

    The gradient of a layer's parameters is computed in float64, without dropout between layers; that of a scan and of a
    `Recurrent` in the precision of its tensors, with the same random numbers under every policy. Where the step can be
    traced, all policies run by the same trace. From n draws with mean m and sample
    variance s^2 (sums over the N parameters), bias^2 = |m - g_full|^2 - s^2 / n, which is unbiased, or 0 where that is
    negative. Its standard error is taken to be |s| / sqrt(n), by which m differs from E[g]. So an unbiased policy shows
    a bias within about twice that error, unless its variance is infinite (`Row.reliable`). The lanes of a layer draw
    independently, so that their exact variances add up.

    The subject's own policy is always compared too; it is the last one where `policies` does not name it.

    Time and bytes are those of one forward and backward pass in the recording's own precision, the draw included, for
    the gradients of the parameters alone; the pass of a scan includes its loss. All policies are timed in turn, round
    by round, beside a product that tells whether other programs take their part of the machine
    (`Comparison.disturbed`). `bptt.clock.Timing.apart` says when two times are told from one another. Bytes are the
    peak of what torch holds, without the inputs and without a kernel's own scratch memory.

    Raises ValueError for no policies, draws below 2, repeats below 5, a full gradient that is 0 or not finite; else
    what `record` raises.

    >>> import torch, bptt
    >>> layer = bptt.nn.RNN(2, 3)  # its own policy is full
    >>> found = bptt.flow.compare(layer, torch.randn(8, 1, 2), policies=("chunked:4", "randomized:0.9"))
    >>> [row.policy for row in found.rows if row.bias < 1e-12]  # all 2**7 ways to cut
    ['randomized:0.9', 'full']

    Source: equations/README.md, 6.2 for what is biased, (6.13) for what is not, (6.16) to (6.18) for the variance.
    """
    scan = scan_of(subject, batch, loss)
    of: Comparable
    if scan is not None or isinstance(subject, Scanned):
        assert scan is not None  # a scan is one of itself
        of = scan
    else:
        of = OfLayer(recorded(subject, batch, loss))
    if isinstance(policies, str | Policy):
        policies = [policies]
    parsed = [of.in_use(parse(policy)) for policy in policies]
    if not parsed:
        raise ValueError("policies must name at least one: got none")
    own = of.in_use(of.own)
    if own not in parsed:
        parsed.append(own)
    if _count("draws", draws, 2) < 2:
        raise ValueError(f"draws must be at least 2, for a variance: got {draws}")
    if _count("repeats", repeats, REPEATS) < LEAST:
        raise ValueError(f"repeats must be at least {LEAST}, for a median with its quartiles: got {repeats}")
    gradient = of.gradient()
    full = gradient(Full())
    norm = float(full.norm())
    if not 0 < norm < float("inf"):
        raise NotComparable(f"the full gradient must be finite and not 0, to compare with: its norm is {norm}")
    guard = Guard()
    times = _times(of, parsed, repeats, seed, guard)
    rate = of.contraction()
    rows = []
    for policy, time in zip(parsed, times, strict=True):
        found = moments(gradient, policy, full / norm, norm, draws, seed)
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
                bytes=peak_bytes(of.training_pass(policy, seed)),
                reliable=found.exact or not isinstance(policy, Randomized) or not policy.keep(FAR) <= rate**2,
            )
        )
    return Comparison(
        layer=of.label,
        T=of.T,
        B=of.B,
        rows=tuple(rows),
        full_norm=norm,
        contraction=rate,
        critical_p=rate**2,
        own=str(own),
        threads=guard.threads,
        cores=guard.got,
    )


def _times(of: Comparable, policies: Sequence[Policy], repeats: int, seed: int, guard: Guard) -> list[Timing]:
    """The time of one forward and backward under each policy, measured in turn."""

    def timed(run: Callable[[], Tensor]) -> Callable[[], object]:
        def call() -> None:
            result = run()
            if result.is_cuda:
                torch.cuda.synchronize(result.device)

        return call

    calls = {str(i): timed(of.training_pass(policy, seed)) for i, policy in enumerate(policies)}
    return list(interleaved(calls, SECONDS, repeats, guard=guard).values())
