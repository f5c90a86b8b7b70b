"""The gradient of a recorded call's parameters under any policy, as one vector.

Legend: T steps, B lanes, N parameters of the layer.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..engine import Asked, Saved, Stack, Tensors
from ..policies import Policy
from ._recording import Recording

__all__ = ["PolicyGradient", "gradient_vector"]


class PolicyGradient:
    """The gradient of a recording's parameters under any policy, as one vector `[N]`. Stage 1 runs once."""

    def __init__(self, recording: Recording) -> None:
        self.recording, self.T, self.B = recording, recording.T, recording.B
        self.program, self.saved = recording.forward()
        self.net = self.program.net

    @property
    def draws(self) -> int:
        """Independent draws of xi in a call: see `Randomized`."""
        return self.net.layers * 2 if self.net.directions == 2 else 1

    @property
    def cuts(self) -> int:
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
        net = self.recording.net(policy, xi, adjoints=False)
        return gradient_vector(replace(self.program, net=net), self.saved, self.recording.asked().cotangents)


def gradient_vector(program: Stack, saved: Saved, cotangents: Tensors) -> Tensor:
    """The gradient of all parameters `[N]`."""
    net, inputs = program.net, program.outputs
    needs = (False,) * inputs + (True,) * (net.inputs - inputs) + (False,) * (len(saved.inputs) - net.inputs)
    grads = program.backward(saved, Asked(cotangents, needs)).inputs
    return torch.cat([g.flatten() for g in grads[inputs:] if g is not None])
