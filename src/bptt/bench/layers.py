"""One recurrent layer, forward and backward: bptt, torch.nn and JAX on the same weights, input and cotangent.

A cell that none of them has is compared with a loop over its formulas.

The truth is torch's autograd in float64, where torch.nn runs one operation at a time; that the operations are the
right ones is what `bptt check` and the tests hold against the NumPy equations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import nn
from ..equations.chain import Array
from .cases import Case
from .contest import Call, Contest
from .jax_layers import jax_call
from .loop import rival, rival_of

__all__ = ["NAMES", "PEERS", "Problem", "layer_call", "layer_contest"]

NAMES = ("y", "x", "weight_ih", "weight_hh", "bias_ih", "bias_hh")
"""What every peer returns: the output, then the gradients of <y, dy>."""


@dataclass(frozen=True)
class Problem:
    """What every peer is given: the rival's layer, which holds the weights, x `[T, B, I]` and dy `[T, B, H]`."""

    case: Case
    layer: torch.nn.Module
    x: Tensor
    dy: Tensor

    @classmethod
    def of(cls, case: Case) -> Problem:
        """The weights of torch.nn's initialisation, x and dy normal, all from torch's generator."""
        layer = rival(case.cell)(case.I, case.H)
        return cls(case, layer, torch.randn(case.T, case.B, case.I), torch.randn(case.T, case.B, case.H))

    @property
    def rival(self) -> str:
        """Whose layer that is."""
        return rival_of(self.case.cell)

    def ours(self, kernel: str = "auto") -> torch.nn.RNNBase:
        """bptt's layer with the same weights and the case's policy."""
        case = self.case
        kind: Any = nn.LAYERS[case.cell]
        layer: torch.nn.RNNBase = kind(case.I, case.H, gradient=case.gradient, kernel=kernel)
        layer.load_state_dict(self.layer.state_dict())
        return layer

    def truth(self) -> list[Array]:
        """The full gradient in float64."""
        return [np.asarray(value) for value in layer_call(self.exact(), self.x.double(), self.dy.double())()]

    def exact(self) -> torch.nn.Module:
        """The rival's layer in float64."""
        layer = rival(self.case.cell)(self.case.I, self.case.H, dtype=torch.float64)
        layer.load_state_dict(self.layer.state_dict())
        return layer


def layer_call(layer: torch.nn.Module, x: Tensor, dy: Tensor) -> Call:
    """One forward and one backward pass of a module of torch.nn's conventions."""
    x = x.clone().requires_grad_()
    inputs = [x, *layer.parameters()]

    def call() -> Sequence[Tensor]:
        y, _ = layer(x)
        return y.detach(), *torch.autograd.grad(y, inputs, dy)

    return call


PEERS: dict[str, Callable[[Problem], Call]] = {
    "torch.nn": lambda problem: layer_call(problem.layer, problem.x, problem.dy),
    "JAX": lambda problem: jax_call(problem.case.cell, problem.layer.state_dict(), problem.x, problem.dy),
}
"""Whom bptt is compared with, where they have the cell."""


def layer_contest(case: Case, peers: Sequence[str] = tuple(PEERS), kernel: str = "auto") -> Contest:
    """bptt's layer against some of `PEERS`; for a cell that torch.nn lacks, against a `loop.Loop` instead.

    Raises InputError where JAX is asked for and not installed, RuntimeError in the call where a named kernel cannot
    run the layer.

    >>> contest = layer_contest(Case("gru", 5, 2, 3, 4), ["torch.nn"])
    >>> max(error for error, _ in contest.errors().values()) < 1e-5
    True
    """
    problem = Problem.of(case)
    calls = {"bptt": layer_call(problem.ours(kernel), problem.x, problem.dy)}
    if problem.rival == "loop":
        calls["loop"] = layer_call(problem.layer, problem.x, problem.dy)
    else:
        calls |= {name: PEERS[name](problem) for name in peers}
    return Contest(NAMES, calls, problem.truth())
