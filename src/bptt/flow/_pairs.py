"""Which pairs of a loss and an earlier step a policy joins, and with what weight."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from ..policies import Policy, Randomized

__all__ = ["pairs"]


def pairs(policy: Policy, T: int, *, seed: int = 0) -> npt.NDArray[np.float64]:
    """Compute the weight with which the loss at step t reaches the use of the weights at step k, `[T, T]` by (t, k).

    The weight is 0 where the loss does not reach: after t, before the window, beyond a cut. A policy that draws is
    drawn once, for one lane, from a generator of its own with this seed; the mean over many draws is the triangle of
    ones that belongs to the full gradient.

    Raises ValueError for T < 1. Source: chapter 6 of the equations, (6.7), (6.11).

    >>> import bptt
    >>> pairs(bptt.Truncated(2), 4)
    array([[1., 0., 0., 0.],
           [1., 1., 0., 0.],
           [0., 1., 1., 0.],
           [0., 0., 1., 1.]])
    """
    if T < 1:
        raise ValueError(f"T must be at least 1 step: got {T}")
    if isinstance(policy, Randomized):
        policy = replace(policy, generator=torch.Generator("cpu").manual_seed(seed))
    drawn = policy.draw(T, 1)
    xi = np.ones(T) if drawn is None else drawn[:, 0].numpy()
    weights = np.zeros((T, T))
    for earliest, first, last in policy.reach(T).blocks(T):
        for t in range(first, last + 1):
            weight = 1.0
            for k in range(t, earliest - 1, -1):
                weights[t, k] = weight
                weight *= xi[k]
    return weights
