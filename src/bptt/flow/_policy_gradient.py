"""The gradient of a recorded call's parameters under any policy, as one vector.

Legend: T steps, B lanes, N parameters of the layer.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..engine import Asked, Net, Saved, Stack, Tensors
from ..policies import Policy
from ._recording import Recording

__all__ = ["PolicyGradient", "gradient_vector", "under"]


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
        net = under(self.net, policy, self.T, self.B, self.saved.inputs, xi)
        return gradient_vector(replace(self.program, net=net), self.saved, self.recording.asked().cotangents)


def under(net: Net, policy: Policy, T: int, B: int, tensors: Tensors, xi: tuple[Tensor, ...] | None = None) -> Net:
    """The same call under another policy."""
    layers, D = net.layers, net.directions
    if xi is None:
        drawn = [policy.draw(T, B) for _ in range(layers * 2 if D == 2 else 1)]
        xi = tuple(d[..., None] for d in drawn if d is not None)
    assert tensors[0] is not None
    xi = tuple(d.to(tensors[0]) for d in xi) * (layers if D == 1 else 1)
    return replace(net, reach=policy.reach(T), xi=xi)


def gradient_vector(program: Stack, saved: Saved, cotangents: Tensors) -> Tensor:
    """The gradient of all parameters `[N]`."""
    net, inputs = program.net, program.outputs
    needs = (False,) * inputs + (True,) * (net.inputs - inputs) + (False,) * (len(saved.inputs) - net.inputs)
    grads = program.backward(saved, Asked(cotangents, needs)).inputs
    return torch.cat([g.flatten() for g in grads[inputs:] if g is not None])
