"""What policies are compared on: a training step that can be taken under any of them.

Legend: T steps, B lanes, N parameters as one vector.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ..engine import Saved
from ..nn.call import whole_tape
from ..policies import Adaptive, Policy
from ._adaptive import adapted, contributions
from ._moments import Gradient, seeded
from ._policy_gradient import PolicyGradient, gradient_vector
from ._recording import Recording
from .horizon import LAGS, LOSSES, fit_decay

__all__ = ["Comparable", "OfLayer", "contraction"]


class Comparable(Protocol):
    """A training step that can be taken under any policy. label: its name. own: the policy that it is trained with."""

    @property
    def label(self) -> str: ...

    @property
    def T(self) -> int: ...

    @property
    def B(self) -> int: ...

    @property
    def own(self) -> Policy: ...

    def in_use(self, policy: Policy) -> Policy:
        """The policy with everything that it takes from this batch."""
        ...

    def gradient(self) -> Gradient:
        """The gradient under any policy."""
        ...

    def training_pass(self, policy: Policy, seed: int) -> Callable[[], Tensor]:
        """One forward and backward pass, as in training. Everything random comes from a generator with that seed."""
        ...

    def contraction(self) -> float:
        """The factor per step by which the norm of an adjoint changes; NaN where no line can be fitted."""
        ...


@dataclass(frozen=True, eq=False)
class OfLayer:
    """The recorded call of a layer. Gradients are those of its parameters, in float64, without dropout."""

    recording: Recording

    @property
    def label(self) -> str:
        return repr(self.recording.layer)

    @property
    def T(self) -> int:
        return self.recording.T

    @property
    def B(self) -> int:
        return self.recording.B

    @property
    def own(self) -> Policy:
        return self.recording.layer.gradient

    def in_use(self, policy: Policy) -> Policy:
        """An adaptive policy without a window gets the one that this batch asks for."""
        if not isinstance(policy, Adaptive) or policy.window is not None:
            return policy
        return replace(policy, window=max(adapted(self.recording, policy=policy).window, policy.every))

    def gradient(self) -> Gradient:
        return PolicyGradient(self.recording.to(torch.float64))

    def training_pass(self, policy: Policy, seed: int) -> Callable[[], Tensor]:
        policy, recording = seeded(policy, seed), self.recording
        tensors, cotangents = recording.call.tensors, recording.asked().cotangents

        @torch.no_grad()
        def run() -> Tensor:
            program = whole_tape(recording.layer, recording.net(policy, adjoints=False))
            return gradient_vector(program, Saved(tensors, *program.forward(tensors, keep=True)), cotangents)

        return run

    def contraction(self) -> float:
        return contraction(self.recording)


def contraction(recording: Recording) -> float:
    """The factor per step by which the norm of an adjoint changes, all layers and directions together.

    Fitted as `Lags.rate` is, on at most the last 16 steps with a loss and 128 lags; NaN where no line can be fitted.
    """
    phi, _, losses = contributions(recording, LAGS, LOSSES)
    return fit_decay(phi, losses)[0]
