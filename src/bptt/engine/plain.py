"""A plain call: one layer in one direction, in which nothing is drawn, reset or padded, by the kernel's whole passes.

It gives what `boundary.run` gives of the same program, bit by bit, with less between the caller and the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels import WholePasses
from .boundary import Boundary
from .stack import Stack
from .tangents import forward_mode
from .tracing import is_profiled, modes, recorder
from .transforms import is_batched

__all__ = ["PlainCall", "is_observed"]


def is_observed(*, profiled: bool = True) -> bool:
    """Whether anything wants to know of a call, or changes what it computes: then `boundary.run` is the way.

    profiled: whether a profiler counts, which asks for no more than names.
    """
    return (
        torch.compiler.is_compiling()
        or recorder() is not None
        or modes() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_any_autocast_enabled()
        or (profiled and is_profiled())
        or forward_mode()
    )


@dataclass(frozen=True, eq=False, slots=True)
class PlainCall:
    """All of a plain call but its tensors, for calls of the same sizes.

    stack: the same computation as a program. passes: of its kernel. initial: the state where none is given, zeros.
    by_autograd: whether the passes are left to autograd, which records what `passes.infer` does.
    """

    stack: Stack
    passes: WholePasses
    initial: tuple[Tensor, ...]
    by_autograd: bool = False

    def __call__(self, tensors: tuple[Tensor, ...], differentiated: bool) -> tuple[Tensor, ...] | None:
        """The outputs from the program's inputs, differentiable; None where these tensors need `boundary.run`."""
        places = self.passes.places(tensors)
        if places is None:
            return None
        if differentiated and not self.by_autograd:
            return _apply((self, places), *tensors)
        return self.passes.infer(tensors, places)


class _Plain(Boundary):
    """The autograd function of a plain call. ctx.call: it."""

    @staticmethod
    def forward(ctx: Any, prepared: Any, *tensors: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]  # of any function
        ctx.call, places = prepared
        outputs, tape = ctx.call.passes.taped(tensors, places)
        ctx.save_for_backward(*tensors, *tape)
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        needs, call = ctx.needs_input_grad[1:], ctx.call
        count = len(needs)
        if not (torch.is_grad_enabled() or is_observed() or is_batched(cotangents)):
            saved = ctx.saved_tensors  # raises where an earlier backward call has freed them
            grads = call.passes.pulled(saved[:count], saved[count:], cotangents, needs)
            if grads is not None:
                return (None, *grads)
        ctx.program, ctx.ends = call.stack, (count, count, count)
        ctx.witnesses = (
            (_WRITTEN,) if call.passes.own_tape else ()
        )  # the stack cannot read such a tape: it makes its own
        return Boundary.backward(ctx, *cotangents)


_apply: Any = super(torch.autograd.Function, _Plain).apply
"""`_Plain.apply` without what that does for torch.func's transforms, in none of which a plain call is."""

with torch.inference_mode(False):  # whatever the mode in which this is imported
    _WRITTEN = torch.zeros(1, device="cpu").zero_()
    """A witness of an output that was written to: see `Boundary`."""
