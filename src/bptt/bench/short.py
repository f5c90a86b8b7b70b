"""Calls of a few steps: acting in an environment, sampling and streaming; and training on sequences as short.

Of such a call the arithmetic may be the smaller part: what counts is what a kernel does once a call, and the way to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .cases import GATES, Case
from .contest import Call, Contest
from .layers import Problem, layer_contest

__all__ = ["SHORT", "inference_contest", "short_contest"]

SHORT = tuple(
    Case(cell, T, B, H, H) for T in (1, 2, 4, 8, 16) for B in (1, 8, 32) for H in (32, 128, 512, 1024) for cell in GATES
)
"""What a few steps are, I = H."""


def inference_contest(case: Case, kernel: str = "auto") -> Contest:
    """bptt's layer against torch.nn's under no_grad, from a given state to the next one.

    >>> contest = inference_contest(Case("lstm", 1, 2, 3, 4))
    >>> {name: error < 1e-5 for name, (error, _) in contest.errors().items()}
    {'bptt': True, 'torch.nn': True}
    """
    problem = Problem.of(case)
    states = 2 if case.cell == "lstm" else 1
    hx = tuple(torch.randn(1, case.B, case.H) for _ in range(states))
    kind: Any = type(problem.layer)
    exact = kind(case.I, case.H, dtype=torch.float64)
    exact.load_state_dict(problem.layer.state_dict())
    truth = _call(exact, problem.x.double(), tuple(state.double() for state in hx))()
    calls = {
        "bptt": _call(problem.ours(kernel), problem.x, hx),
        "torch.nn": _call(problem.layer, problem.x, hx),
    }
    return Contest(("y", "h_n", "c_n")[: 1 + states], calls, [np.asarray(value) for value in truth])


def short_contest(case: Case, kernel: str = "auto") -> Contest:
    """bptt's layer against torch.nn's, forward and backward.

    >>> contest = short_contest(Case("gru", 1, 2, 3, 4))
    >>> {name: error < 1e-5 for name, (error, _) in contest.errors().items()}
    {'bptt': True, 'torch.nn': True}
    """
    return layer_contest(case, ("torch.nn",), kernel)


def _call(layer: torch.nn.Module, x: Tensor, hx: tuple[Tensor, ...]) -> Call:
    def call() -> Sequence[Tensor]:
        with torch.no_grad():
            y, final = layer(x, hx if len(hx) == 2 else hx[0])
        return y, *((final,) if len(hx) == 1 else final)

    return call
