"""The gradient of a recorded call's parameters under any policy, as one vector.

Legend: T steps, B lanes, N parameters of the layer.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..engine import Stack, Tensors
from ..policies import Full, Policy
from ._recording import Recording

__all__ = ["PolicyGradient", "gradient_vector", "under"]


class PolicyGradient:
    """The gradient of a recording's parameters under any policy, as one vector `[N]`. Stage 1 runs once."""

    def __init__(self, recording: Recording) -> None:
        self.recording, self.T, self.B = recording, recording.T, recording.B
        self.stack, self.tensors = recording.stack(Full()), recording.call.tensors
        with torch.no_grad():
            self.outputs, self.tape = self.stack.forward(self.tensors, keep=True)
        self.cotangents: Tensors = (recording.dy, *recording.dfinal)

    @property
    def draws(self) -> int:
        """Independent draws of xi in a call: see `Randomized`."""
        return self.stack.layers * 2 if self.stack.directions == 2 else 1

    @property
    def edges(self) -> int:
        """Edges of a lane that are cut independently."""
        return (self.T - 1) * self.draws

    @property
    def parts(self) -> int:
        """Lanes: each draws for itself."""
        return self.B

    def part(self, i: int) -> PolicyGradient:
        """That of one lane's losses alone."""
        return PolicyGradient(self.recording.lanes(slice(i, i + 1)))

    @torch.no_grad()
    def __call__(self, policy: Policy, xi: tuple[Tensor, ...] | None = None) -> Tensor:
        """xi: `[T, B, 1]` of each draw; None is what the policy draws."""
        stack = under(self.stack, policy, self.T, self.B, self.tensors, xi)
        return gradient_vector(stack, self.tensors, self.outputs, self.tape, self.cotangents)


def under(
    stack: Stack, policy: Policy, T: int, B: int, tensors: Tensors, xi: tuple[Tensor, ...] | None = None
) -> Stack:
    """The same call under another policy."""
    layers, D = stack.layers, stack.directions
    if xi is None:
        drawn = [policy.draw(T, B) for _ in range(layers * 2 if D == 2 else 1)]
        xi = tuple(d[..., None] for d in drawn if d is not None)
    assert tensors[0] is not None
    xi = tuple(d.to(tensors[0]) for d in xi) * (layers if D == 1 else 1)
    return replace(stack, reach=policy.reach(T), xi=xi)


def gradient_vector(
    stack: Stack, tensors: Tensors, outputs: tuple[Tensor, ...], tape: tuple[Tensor, ...], cotangents: Tensors
) -> Tensor:
    """The gradient of all parameters `[N]`."""
    inputs = 1 + stack.cell.states
    needs = (False,) * inputs + (True,) * (stack.inputs - inputs) + (False,) * (len(tensors) - stack.inputs)
    grads, _ = stack.gradients(tensors, outputs, tape, cotangents, needs, want_adjoints=False)
    return torch.cat([g.flatten() for g in grads[inputs:] if g is not None])
