"""`bptt.scan` with an LSTM step a user could have written, against the module, and against a loop under autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..scan import scan
from .cases import Case
from .contest import Call, Contest
from .layers import NAMES, Problem, layer_call

__all__ = ["step_contest"]

State = tuple[Tensor, Tensor]


def step_contest(case: Case, kernel: str = "auto") -> Contest:
    """`bptt.scan`, `bptt.nn` and a Python loop on an LSTM of the case's shape, the full gradient.

    Raises ValueError for a case of another kind.

    >>> contest = step_contest(Case("lstm", 5, 2, 3, 4))
    >>> {name: error < 1e-5 for name, (error, _) in contest.errors().items()}
    {'scan': True, 'module': True, 'loop': True}
    """
    if case.cell != "lstm" or case.gradient != "full":
        raise ValueError(f"case must be an lstm with the full gradient: got {case}")
    problem = Problem.of(case)
    calls = {
        "scan": _call(problem, by_loop=False),
        "module": layer_call(problem.ours(kernel), problem.x, problem.dy),
        "loop": _call(problem, by_loop=True),
    }
    return Contest(NAMES, calls, problem.truth())


def _call(problem: Problem, by_loop: bool) -> Call:
    x = problem.x.clone().requires_grad_()
    W_ih, W_hh, b_ih, b_hh = parameters = list(problem.layer.parameters())
    zero = x.new_zeros(problem.case.B, problem.case.H)

    def step(state: State, gx: Tensor) -> tuple[State, Tensor]:
        h, c = state
        i, f, g, o = (gx + h @ W_hh.T).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        return (h, c), h

    def call() -> Sequence[Tensor]:
        gx = x @ W_ih.T + (b_ih + b_hh)
        if by_loop:
            state, ys = (zero, zero), []
            for gx_t in gx.unbind():
                state, y_t = step(state, gx_t)
                ys.append(y_t)
            y = torch.stack(ys)
        else:
            _, y = scan(step, (zero, zero), gx)
        return y.detach(), *torch.autograd.grad(y, [x, *parameters], problem.dy)

    return call
