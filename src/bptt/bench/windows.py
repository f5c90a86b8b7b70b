"""`Truncated` and `Chunked` against what people write without them.

Truncated(k): the two-loop NumPy code of many tutorials, and autograd with one backward pass per loss through a window
of k steps. Both on the softmax network, s_t = tanh(U x_t + W s_{t-1}), y_t = softmax(V s_t), x_t an index.
Chunked(k): torch.nn's layer with `detach()` every k steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from .. import nn
from ..equations import CELLS, policies, recurrence, rnn
from ..equations.chain import Array
from ..policies import Chunked, Truncated, parse
from .cases import Case
from .contest import Contest
from .layers import NAMES, Problem, layer_call

__all__ = ["TwoLoops", "window_contest"]


def window_contest(case: Case, kernel: str = "auto") -> Contest:
    """A case whose gradient is "truncated:k" (the rnn cell, B = 1) or "chunked:k" (any cell of the
    equations), against its rivals.

    Raises ValueError for a case of another kind.

    >>> contest = window_contest(Case("rnn", 9, 1, 3, 4, "truncated:4"))
    >>> {name: error < 1e-5 for name, (error, _) in contest.errors().items()}
    {'bptt': True, 'two loops': True, 'autograd': True}
    """
    policy = parse(case.gradient)
    if isinstance(policy, Truncated) and policy.every == 1 and case.cell == "rnn" and case.B == 1:
        return _truncated(case, policy.window, kernel)
    if isinstance(policy, Chunked):
        if case.cell not in CELLS:
            raise ValueError(f"case must be of a cell that the equations have, {', '.join(CELLS)}: got {case}")
        return _chunked(case, policy.k, kernel)
    raise ValueError(f"case must be a chunked one, or an rnn with B = 1 and truncated:k: got {case}")


@dataclass
class TwoLoops:
    """The code as it is written: Britz 2015, "Recurrent Neural Networks Tutorial, Part 3".

    U `[H, K]`, V `[K, H]`, W `[H, H]`. bptt_truncate: steps that a loss walks back beyond its own. `s[-1]` is the
    initial state, which the array's last row holds. The equations have the same loops, every line numbered.
    """

    U: Array
    V: Array
    W: Array
    bptt_truncate: int

    def forward_propagation(self, x: Array) -> tuple[Array, Array]:
        """y `[T, K]` and s `[T + 1, H]`."""
        T = len(x)
        s = np.zeros((T + 1, len(self.W)), dtype=self.W.dtype)
        o = np.zeros((T, len(self.V)), dtype=self.V.dtype)
        for t in np.arange(T):
            s[t] = np.tanh(self.U[:, x[t]] + self.W.dot(s[t - 1]))
            odds = np.exp(self.V.dot(s[t]))
            o[t] = odds / np.sum(odds)
        return o, s

    def bptt(self, x: Array, y: Array) -> list[Array]:
        """Gradients of the summed cross-entropy in U, V, W."""
        T = len(y)
        o, s = self.forward_propagation(x)
        dLdU = np.zeros_like(self.U)
        dLdV = np.zeros_like(self.V)
        dLdW = np.zeros_like(self.W)
        delta_o = o
        delta_o[np.arange(len(y)), y] -= 1.0
        for t in np.arange(T)[::-1]:
            dLdV += np.outer(delta_o[t], s[t].T)
            delta_t = self.V.T.dot(delta_o[t]) * (1 - (s[t] ** 2))
            for bptt_step in np.arange(max(0, t - self.bptt_truncate), t + 1)[::-1]:
                dLdW += np.outer(delta_t, s[bptt_step - 1])
                dLdU[:, x[bptt_step]] += delta_t
                delta_t = self.W.T.dot(delta_t) * (1 - s[bptt_step - 1] ** 2)
        return [dLdU, dLdV, dLdW]


def _truncated(case: Case, window: int, kernel: str) -> Contest:
    """The softmax network with a vocabulary of I."""
    scale = case.H**-0.5
    U, V, W = (scale * torch.randn(*s) for s in ((case.H, case.I), (case.I, case.H), (case.H, case.H)))
    x, targets = (torch.randint(case.I, (case.T,)) for _ in range(2))
    ours = nn.RNN(case.I, case.H, bias=False, gradient=case.gradient, kernel=kernel)
    theirs = torch.nn.RNN(case.I, case.H, bias=False)
    for layer in (ours, theirs):
        layer.load_state_dict({"weight_ih_l0": U, "weight_hh_l0": W})
    output = V.clone().requires_grad_()

    def bptt() -> Sequence[Tensor]:
        s, _ = ours(one_hot(x, case.I).float())
        loss = cross_entropy(s @ output.T, targets, reduction="sum")
        return torch.autograd.grad(loss, [ours.weight_ih_l0, output, ours.weight_hh_l0])

    def autograd() -> Sequence[Tensor]:
        inputs, weights = one_hot(x, case.I).float(), [theirs.weight_ih_l0, output, theirs.weight_hh_l0]
        with torch.no_grad():
            states, _ = theirs(inputs)
        for weight in weights:
            weight.grad = None
        for t in range(case.T):
            start = max(0, t - window + 1)
            s, _ = theirs(inputs[start : t + 1], states[start - 1 : start] if start else None)
            cross_entropy(s[-1] @ output.T, targets[t], reduction="sum").backward()
        return [weight.grad for weight in weights if weight.grad is not None]

    loops = TwoLoops(U.numpy(), V.numpy(), W.numpy(), window - 1)
    network = rnn.SoftmaxNetwork(U=U.double().numpy(), V=V.double().numpy(), W=W.double().numpy())
    true = policies.two_loops(network, x.numpy(), targets.numpy(), np.zeros(case.H), window - 1)
    calls = {"bptt": bptt, "two loops": lambda: loops.bptt(x.numpy(), targets.numpy()), "autograd": autograd}
    return Contest(("U", "V", "W"), calls, [true[name] for name in ("U", "V", "W")])


def _chunked(case: Case, k: int, kernel: str) -> Contest:
    problem = Problem.of(case)
    chunks = problem.x.clone().requires_grad_()
    inputs = [chunks, *problem.layer.parameters()]

    def autograd() -> Sequence[Tensor]:
        state, ys = None, []
        for chunk in chunks.split(k):
            y, state = problem.layer(chunk, state)
            state = state.detach() if isinstance(state, Tensor) else tuple(s.detach() for s in state)
            ys.append(y)
        y = torch.cat(ys)
        return y.detach(), *torch.autograd.grad(y, inputs, problem.dy)

    calls = {"bptt": layer_call(problem.ours(kernel), problem.x, problem.dy), "autograd": autograd}
    return Contest(NAMES, calls, _equations(problem, k))


def _equations(problem: Problem, k: int) -> list[Array]:
    """Chapter 6 of the equations on the problem, losses in chunks of k."""
    case = problem.case
    x, dy, *weights = (
        np.asarray(v.detach(), dtype=np.float64) for v in (problem.x, problem.dy, *problem.layer.parameters())
    )
    cell = CELLS[case.cell](*weights)
    none = np.zeros((case.B, cell.state_size))
    out = policies.sweep(cell, x, none, recurrence.local_error(cell, dy, none), policies.chunks(case.T, k))
    return [out["states"][:, :, : case.H], *(out[name] for name in ("x", "W_ih", "W_hh", "b_ih", "b_hh"))]
