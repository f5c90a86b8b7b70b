"""The mean and variance of a policy's gradient: exact ones, over all ways to cut, or estimates from a sample.

Legend: T steps, N parameters as one vector, g their gradient under a policy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..policies import Policy, Randomized

__all__ = ["Gradient", "Moments", "moments", "seeded"]

PATTERNS = 2**11
"""Cut patterns, over all lanes, up to which all are walked: about the time of as many small walks."""


class Gradient(Protocol):
    """The gradient under any policy, one vector `[N]`: a sum over parts whose cuts are drawn independently.

    draws: independent draws of xi for a part. cuts: edges that are cut independently in one.
    """

    @property
    def T(self) -> int: ...

    @property
    def parts(self) -> int: ...

    @property
    def draws(self) -> int: ...

    @property
    def cuts(self) -> int: ...

    def part(self, i: int) -> Gradient:
        """That of one part alone."""
        ...

    def __call__(self, policy: Policy, xi: tuple[Tensor, ...] | None = None) -> Tensor:
        """xi: `[T, 1, 1]` of each draw, in place of what the policy draws."""
        ...


@dataclass(frozen=True)
class Moments:
    """The mean `[N]`, variance (sum over N) and squared bias of a policy's gradient over the full one's norm."""

    mean: Tensor
    bias_square: float
    variance: float
    variance_error: float
    exact: bool
    draws: int


def moments(gradient: Gradient, policy: Policy, full: Tensor, norm: float, draws: int, seed: int) -> Moments:
    """The moments of g under a policy: exact ones, or from a sample of cuts. full: the full gradient at norm 1."""
    if not isinstance(policy, Randomized) or policy.p == 1 or gradient.cuts == 0:
        g = gradient(policy) / norm
        return Moments(g, float((g - full).square().sum()), 0.0, 0.0, exact=True, draws=1)
    if gradient.parts * 2**gradient.cuts <= PATTERNS:
        mean, variance = torch.zeros_like(full), 0.0
        for i in range(gradient.parts):
            one, first, second = gradient.part(i), torch.zeros_like(full), 0.0
            for xi, probability in _cuts(policy, gradient.T, gradient.draws):
                g = one(policy, xi) / norm
                first += probability * g
                second += probability * float(g.square().sum())
            mean += first
            variance += second - float(first.square().sum())
        square = float((mean - full).square().sum())
        return Moments(mean, square, max(variance, 0.0), 0.0, exact=True, draws=gradient.parts * 2**gradient.cuts)
    drawn = seeded(policy, seed)
    total, squares = torch.zeros_like(full), np.zeros(draws)
    for i in range(draws):
        difference = gradient(drawn) / norm - full
        total += difference
        squares[i] = float(difference.square().sum())
    off = total / draws
    square = float(off.square().sum())
    variance = (float(squares.mean()) - square) * draws / (draws - 1)
    error = float(squares.std(ddof=1)) / draws**0.5
    return Moments(off + full, square - variance / draws, variance, error, exact=False, draws=draws)


def seeded(policy: Policy, seed: int) -> Policy:
    """A policy that draws from a generator of its own with that seed, if it draws."""
    if not isinstance(policy, Randomized):
        return policy
    return replace(policy, generator=torch.Generator("cpu").manual_seed(seed))


def _cuts(policy: Randomized, T: int, draws: int) -> Iterator[tuple[tuple[Tensor, ...], float]]:
    """Every outcome of so many independent draws for one part: (xi `[T, 1, 1]` of each draw, its probability)."""
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
