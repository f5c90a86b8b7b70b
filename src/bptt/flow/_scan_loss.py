"""A scan with its loss, as data: the cotangents of what it returns, and the chain of its carries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..scan import scan
from ..scan.pytrees import Step, fresh, split
from ._steps import RowsMix, StepChain

__all__ = ["ScanLoss", "ScanWithLoss"]

ScanLoss = Callable[[Any, Any], Tensor]
"""From what a scan returns, the final carry and the ys, to a scalar."""


@dataclass(frozen=True, eq=False)
class ScanWithLoss:
    """A scan and its loss. step, carry, xs, length, resets: as for `bptt.scan`. loss: see `ScanLoss`. lengths: the
    number of steps of every lane `[B]` on the CPU, where some have ended before the last step.
    """

    step: Step
    carry: Any
    xs: Any
    loss: ScanLoss
    length: int | None = None
    resets: Tensor | None = None
    lengths: Tensor | None = None

    def cotangents(self) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """dL/d(final carry) and dL/dys `[T, ...]`, by leaf; None where the loss does not use one."""
        with torch.no_grad():
            final, ys = scan(self.step, self.carry, self.xs, length=self.length, resets=self.resets)
        (ends, end_form), (outputs, y_form) = split(final), split(ys)
        with torch.enable_grad():
            ends, outputs = ([fresh(t, t.is_floating_point()) for t in tensors] for tensors in (ends, outputs))
            value = self.loss(end_form.join(ends), y_form.join(outputs)).reshape(())
        every = [*ends, *outputs]
        found: list[Tensor | None] = [None] * len(every)
        wanted = [i for i, t in enumerate(every) if t.requires_grad]
        if value.requires_grad and wanted:
            grads = torch.autograd.grad(value, [every[i] for i in wanted], allow_unused=True)
            for i, grad in zip(wanted, grads, strict=True):
                found[i] = grad
        return found[: len(ends)], found[len(ends) :]

    def chain(self, rows: Literal["auto", "coupled"] = "auto") -> StepChain:
        """The chain of carries with the local errors of the loss; that of the final carry at the last step.

        rows: "auto" takes every row of the carry for a lane, where each tensor has as many and the step keeps them
        apart; "coupled" takes the whole carry for one state.
        """
        final, dys = self.cotangents()

        def of_ys(ys: Any) -> Tensor:
            parts = [(d * y).sum() for d, y in zip(dys, split(ys)[0], strict=True) if d is not None]
            return torch.stack([part.double() for part in parts]).sum()

        loss = of_ys if any(d is not None for d in dys) else None
        given: dict[str, Any] = {"length": self.length, "resets": self.resets, "final": final}
        firsts = {len(c) if c.dim() else 0 for c in split(self.carry)[0] if c.is_floating_point()}
        if rows == "auto" and len(firsts) == 1 and firsts != {0}:
            try:
                return StepChain(
                    self.step, self.carry, self.xs, loss, rows="independent", lengths=self.lengths, **given
                )
            except RowsMix:  # as under a batch norm
                pass
        return StepChain(self.step, self.carry, self.xs, loss, **given)
