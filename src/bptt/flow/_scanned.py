"""A scan and its loss, written down, so that its training step can be taken under any policy.

Legend: T steps, B lanes, N numbers in the parameters as one vector.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..memory import Checkpoints
from ..nn import Recurrent
from ..policies import Full, Policy, Reach, parse
from ..scan import scan
from ..scan.arguments import Arguments, described
from ..scan.leaves import leaves_of
from ..scan.pullback import Rows
from ..scan.pytrees import Step
from ._moments import Gradient, seeded
from ._scan_loss import ScanLoss, ScanWithLoss
from ._steps import StepChain
from .horizon import LAGS, LOSSES, fit_decay

__all__ = ["Scanned", "checked_scalar", "scanned"]


@dataclass(frozen=True, eq=False)
class Scanned:
    """A scan with its loss and the tensors whose gradient is meant, as `scanned` and `record_scan` return it.

    label: which step or layer it is. own: the policy that it is trained with. T, B: steps, and lanes: the first
    dimension that the carry's tensors share, or 1. loss: its value; None where random errors stand in for one.
    parameters: the leaves that the loss depends on and that require a gradient. scan: its arguments. name: of the step,
    or of the layer in its model. layer: the layer, where it is one.
    """

    label: str
    own: Policy
    T: int
    B: int
    loss: float | None
    parameters: tuple[Tensor, ...] = field(repr=False)
    scan: ScanWithLoss = field(repr=False)
    name: str = ""
    layer: Recurrent | None = field(default=None, repr=False)
    _run: Callable[[Policy], Tensor] = field(repr=False, kw_only=True)
    _cuda: tuple[torch.device, ...] = field(repr=False, kw_only=True)

    @cached_property
    def chain(self) -> StepChain:
        """The chain of its carries, with the local errors of its loss: what the measurements of a chain look at.

        Every row of the carry is a lane where the step keeps them apart; else the whole carry is one state.
        """
        with torch.random.fork_rng(self._cuda):
            return self.scan.chain()

    def losses(self, most: int) -> list[int]:
        """Steps at which a loss reaches the carry, the last one among them and evenly from there, so that over all
        lanes there are at most about `most`; all steps where there is none.
        """
        sent = (self.chain.errors != 0).any(-1)
        steps = sent.any(1).nonzero()[:, 0].tolist() or list(range(self.T))
        every = max(1, -(-int(sent.sum()) // most))
        return steps[::-1][::every][::-1]

    def in_use(self, policy: Policy) -> Policy:
        """As it is: `bptt.scan` measures nothing."""
        return policy

    def gradient(self) -> Gradient:
        """The gradient of the parameters under any policy, in their own precision."""
        return ScanGradient(self)

    def training_pass(self, policy: Policy, seed: int) -> Callable[[], Tensor]:
        """One forward and backward, the loss and its own backward included."""
        policy = seeded(policy, seed)
        return lambda: self.vector(policy)

    def vector(self, policy: Policy) -> Tensor:
        """The gradient `[N]` under a policy; torch's generators are left alone, so that every call draws the same."""
        with torch.enable_grad(), torch.random.fork_rng(self._cuda):
            value = self._run(policy)
            grads = torch.autograd.grad(value, self.parameters, allow_unused=True)
        device = self.parameters[0].device
        filled = (torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, grads, strict=True))
        return torch.cat([g.flatten().to(device) for g in filled])

    def contraction(self) -> float:
        """The factor per step by which the norm of an adjoint of the carry changes.

        On at most the last 16 losses, the final carry's among them, and 128 lags; NaN where no line can be fitted.
        """
        with torch.random.fork_rng(self._cuda):
            chain = self.scan.chain("coupled")
            final, errors = chain.final, chain.errors_of_ys
        sent = [] if final is None or not final.any() else [(chain.T, final)]
        if errors is not None:
            reached = errors.flatten(1).any(1).nonzero().flatten().tolist()
            sent += [(t, errors[t].flatten()[None]) for t in reached]
        sent = sorted(sent, key=lambda pair: pair[0])[-LOSSES:]
        if not sent:
            return float("nan")
        norms, counts = np.zeros(LAGS), np.zeros(LAGS)
        rows, began = sent[0][1].new_zeros(0, chain.B, chain.S), np.zeros(0, dtype=np.int64)
        for t in range(sent[-1][0], max(sent[0][0] - LAGS, -1), -1):
            entering = [error for at, error in sent if at == t]
            rows = torch.cat([rows, *(error[None] for error in entering)])
            began = np.concatenate([began, np.full(len(entering), t)])
            near = began - t < LAGS
            rows, began = rows[torch.from_numpy(near).to(rows.device)], began[near]
            np.add.at(norms, began - t, rows.flatten(1).double().norm(dim=1).cpu().numpy())
            np.add.at(counts, began - t, 1)
            if t in chain.transitions:
                rows = chain.pull(t, rows)
        far = int(np.count_nonzero(counts))
        return fit_decay(norms[:far] / counts[:far], counts[:far])[0]


@dataclass(frozen=True, eq=False)
class ScanGradient:
    """The gradient of a scan's parameters under any policy, one vector `[N]`. Its lanes are one part."""

    scanned: Scanned

    @property
    def parts(self) -> int:
        """All lanes together: a step may mix them."""
        return 1

    @property
    def T(self) -> int:
        """Steps."""
        return self.scanned.T

    @property
    def draws(self) -> int:
        """Lanes, which draw independently."""
        return self.scanned.B

    @property
    def cuts(self) -> int:
        """Edges that are cut independently."""
        return (self.T - 1) * self.draws

    def part(self, i: int) -> ScanGradient:
        """All of it."""
        return self

    def __call__(self, policy: Policy, xi: tuple[Tensor, ...] | None = None) -> Tensor:
        if xi is not None:
            policy = _Drawn(policy, torch.cat(xi, 1).flatten(1))
        return self.scanned.vector(policy)


@dataclass(frozen=True, eq=False)
class _Drawn(Policy):
    """A policy whose factors `[T, B]` have been drawn."""

    policy: Policy
    xi: Tensor

    def reach(self, T: int) -> Reach:
        return self.policy.reach(T)

    def draw(self, T: int, B: int) -> Tensor:
        return self.xi

    def __str__(self) -> str:
        return str(self.policy)


def scanned(
    step: Step,
    carry: Any,
    xs: Any = None,
    loss: ScanLoss | None = None,
    *,
    gradient: Policy | str = "full",
    length: int | None = None,
    resets: Tensor | None = None,
    rows: Rows = "auto",
    memory: str | Checkpoints = "auto",
) -> Scanned:
    """Write down a scan with its loss, for the measurements: `compare`, `survey`, `diagnose`, `lag_map`, `jacobians`,
    `products` and `lyapunov` take it as they take a layer.

    step, carry, xs, length, resets, rows, memory: as for `bptt.scan`. loss: from (final carry, ys) to a scalar; what it
    does not use has no loss, so that a block that is looped for its last state alone is `loss=lambda carry, ys: ...`.
    gradient: the policy that the scan is trained with.

    The gradient is that of all leaf tensors that require one and that the loss depends on, whether the step captures
    them, or they are part of carry, xs or loss. It is computed in their own precision: a bias near its rounding, about
    1e-7 in float32, means none. Random numbers of the step are the same under every policy. Buffers that the step
    writes are written by every call.

    Raises TypeError for a step or a loss that cannot be called, and for a loss that is no scalar tensor; ValueError
    where it depends on no leaf that requires a gradient; and as `bptt.scan` does.

    >>> import torch, bptt
    >>> w = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    >>> looped = bptt.flow.scanned(
    ...     lambda h, _: (w * h + 1, None), torch.zeros((), dtype=torch.float64), loss=lambda h, _: h, length=12
    ... )
    >>> compared = bptt.flow.compare(looped, policies=["full", "truncated:4"])
    >>> [f"{row.policy} {row.bias:.3f}" for row in compared.rows], round(compared.contraction, 6)
    (['full 0.000', 'truncated:4 0.060'], 0.5)
    """
    if not callable(step):
        raise TypeError(f"step must be a function of (carry, x): got {described(step)}")
    if not callable(loss):
        raise TypeError(f"loss must be a function of (final carry, ys): got {described(loss)}")
    own, given = parse(gradient), Arguments.of(step, carry, xs, length, resets)

    def run(policy: Policy) -> Tensor:
        found = scan(step, carry, xs, gradient=policy, length=length, resets=resets, rows=rows, memory=memory)
        return checked_scalar(loss(*found))

    cuda = tuple(device for device in given.devices if device.type == "cuda")
    with torch.enable_grad(), torch.random.fork_rng(cuda):
        value = run(Full())
    parameters = leaves_of(value)
    if not parameters:
        raise ValueError("loss must depend on a leaf tensor that requires a gradient, through the step or beside it")

    name = getattr(step, "__qualname__", type(step).__name__)
    call = ScanWithLoss(step, carry, xs, loss, length, resets)
    label = f"scan of {name}"
    return Scanned(
        label, own, given.T, given.lanes, float(value.detach()), parameters, call, name, _run=run, _cuda=cuda
    )


def checked_scalar(value: object) -> Tensor:
    """The value of a loss, if it is a scalar tensor, else TypeError."""
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"loss must give a scalar tensor: got {got}")
    return value.reshape(())
