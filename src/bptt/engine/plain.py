"""A plain call: layers in which nothing is dropped or padded and blocks do not meet, by the kernel's whole passes.

It gives what `boundary.run` gives of the same program, bit by bit, with less between the caller and the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..kernels import Edges, WholePasses
from .boundary import Boundary
from .net import Net
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
    by_autograd: whether the passes are left to autograd, which records what `passes.infer` does. runs_again: whether
    the backward pass makes the tape, of which nothing is kept: checkpoints of one segment.
    """

    stack: Stack
    passes: WholePasses
    initial: tuple[Tensor, ...]
    by_autograd: bool = False
    runs_again: bool = False

    def places(self, tensors: tuple[Tensor, ...]) -> tuple[int, ...] | None:
        """Where the program's inputs lie; None where these tensors need `boundary.run`."""
        return self.passes.places(tensors)

    def __call__(
        self,
        tensors: tuple[Tensor, ...],
        places: tuple[int, ...],
        differentiated: bool,
        xi: tuple[Tensor, ...] = (),
        resets: tuple[Tensor, ...] = (),
    ) -> tuple[Tensor, ...]:
        """The outputs from the program's inputs, differentiable. xi, resets: as in `Net`, of this call."""
        if differentiated and not self.by_autograd:
            return _apply((self, places, xi, resets), *tensors)
        return self.passes.infer(tensors, places, self.edges((), resets))

    def net(self, xi: tuple[Tensor, ...], resets: tuple[Tensor, ...]) -> Net:
        """The net of a call with these."""
        return replace(self.stack.net, xi=xi, resets=resets) if xi or resets else self.stack.net

    def edges(self, xi: tuple[Tensor, ...], resets: tuple[Tensor, ...]) -> list[Edges]:
        """What is special about the time edges of each layer and direction."""
        if not xi and not resets:
            return []
        net = self.net(xi, resets)
        dtype, K = self.initial[0].dtype, net.layers * net.directions
        return [Edges(net.resets_of(k % net.directions), net.edge_factors(k, dtype)) for k in range(K)]


class _Plain(Boundary):
    """The autograd function of a plain call. ctx.call: it, and where in what is saved the inputs end, xi, and the
    resets; the tape is the rest.
    """

    @staticmethod
    def forward(ctx: Any, prepared: Any, *tensors: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        call, places, xi, resets = prepared
        count = len(tensors)
        edges = call.edges((), resets)
        if call.runs_again:
            outputs, tape = call.passes.infer(tensors, places, edges), ()
        else:
            outputs, tape = call.passes.taped(tensors, places, edges)
        ctx.call = call, count, count + len(xi), count + len(xi) + len(resets)
        ctx.save_for_backward(*tensors, *xi, *resets, *tape)
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        needs, (call, count, second, third) = ctx.needs_input_grad[1:], ctx.call
        saved = ctx.saved_tensors  # raises where an earlier backward call has freed them
        xi, resets = saved[count:second], saved[second:third]
        if not (torch.is_grad_enabled() or is_observed() or is_batched(cotangents)):
            tensors, tape, edges = saved[:count], saved[third:], call.edges(xi, resets)
            if call.runs_again:
                places = call.places(tensors)
                tape = None if places is None else call.passes.taped(tensors, places, edges)[1]
            grads = None if tape is None else call.passes.pulled(tensors, tape, cotangents, needs, edges)
            if grads is not None:
                return (None, *grads)
        ctx.program, ctx.ends = replace(call.stack, net=call.net(xi, resets)), (count, count, third)
        # A tape that the stack cannot read, or none: it makes its own.
        ctx.witnesses = (_WRITTEN,) if call.passes.own_tape or call.runs_again else ()
        return Boundary.backward(ctx, *cotangents)


_apply: Any = super(torch.autograd.Function, _Plain).apply
"""`_Plain.apply` without what that does for torch.func's transforms, in none of which a plain call is."""

with torch.inference_mode(False):  # whatever the mode in which this is imported
    _WRITTEN = torch.zeros(1, device="cpu").zero_()
    """A witness of an output that was written to: see `Boundary`."""
