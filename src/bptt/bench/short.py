"""Calls of a few steps: acting in an environment, sampling and streaming; and training on sequences as short.

Of such a call the arithmetic may be the smaller part: what counts is what a kernel does once a call, and the way to it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..cells import of_name
from ..nn import LAYERS
from .cases import Case
from .contest import Call, Contest
from .layers import Problem, layer_contest
from .onnx_layers import onnx_call, onnx_installed

__all__ = ["SHORT", "inference_contest", "short_contest"]

SHORT = tuple(
    Case(cell, T, B, H, H)
    for T in (1, 2, 4, 8, 16)
    for B in (1, 8, 32)
    for H in (32, 128, 512, 1024)
    for cell in LAYERS
)
"""What a few steps are, I = H."""


def inference_contest(case: Case, kernel: str = "auto") -> Contest:
    """bptt's layer against its rival's (`loop.rival_of`) under no_grad, from a given state to the next one.

    And against ONNX Runtime, where that and onnx are installed, and it has the cell.

    >>> contest = inference_contest(Case("lstm", 1, 2, 3, 4))
    >>> max(error for error, _ in contest.errors().values()) < 1e-5
    True
    """
    problem = Problem.of(case)
    hx = tuple(torch.randn(1, case.B, case.H) for _ in of_name(case.cell).state_names)
    truth = _call(problem.exact(), problem.x.double(), tuple(state.double() for state in hx))()
    calls = {
        "bptt": _call(problem.ours(kernel), problem.x, hx),
        problem.rival: _call(problem.layer, problem.x, hx),
    }
    if problem.rival == "torch.nn" and onnx_installed():
        calls["ONNX Runtime"] = onnx_call(case.cell, problem.layer.state_dict(), problem.x, hx)
    return Contest(("y", "h_n", "c_n")[: 1 + len(hx)], calls, [np.asarray(value) for value in truth])


def short_contest(case: Case, kernel: str = "auto") -> Contest:
    """bptt's layer against its rival's, forward and backward.

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
