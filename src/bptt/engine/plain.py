"""A plain call: layers in which nothing is dropped or padded, by the kernel's whole passes.

Blocks may overlap in one layer of one direction, whose backward pass is then a sweep. It gives what `boundary.run`
gives of the same program, bit by bit, with less between the caller and the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..cells import Weights
from ..kernels import Edges, Frames, Sweep, Tape, WholePasses, product
from .boundary import Boundary, own_precision
from .parameters import parameter_gradients
from .records import Tensors, given
from .stack import Stack
from .tangents import forward_mode
from .tracing import is_profiled, modes, recorder
from .transforms import is_batched

__all__ = ["PlainCall", "is_observed"]


def is_observed(*, profiled: bool = True, autocast: bool = True) -> bool:
    """Whether anything wants to know of a call, or changes what it computes: then `boundary.run` is the way.

    profiled: whether a profiler counts, which asks for no more than names. autocast: whether that counts.
    """
    return (
        torch.compiler.is_compiling()
        or recorder() is not None
        or modes() > 0
        or torch._C._are_functorch_transforms_active()
        or (autocast and torch._C._is_any_autocast_enabled())
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

    def program(self, xi: tuple[Tensor, ...], resets: tuple[Tensor, ...]) -> Stack:
        """The same computation as a program, of a call with these."""
        return replace(self.stack, net=replace(self.stack.net, xi=xi, resets=resets)) if xi or resets else self.stack

    def edges(self, xi: tuple[Tensor, ...], resets: tuple[Tensor, ...]) -> list[Edges]:
        """What is special about the time edges of each layer and direction."""
        if not xi and not resets:
            return []
        net = replace(self.stack.net, xi=xi, resets=resets)
        dtype, K = self.initial[0].dtype, net.layers * net.directions
        return [Edges(net.walk_resets(k % net.directions), net.walk_edge_factors(k, dtype)) for k in range(K)]


class _Plain(Boundary):
    """The autograd function of a plain call. ctx.call: it, and where in what is saved the inputs end, xi, and the
    resets; the tape is the rest.
    """

    @staticmethod
    def forward(ctx: Any, prepared: Any, *tensors: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]  # of any function
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
        if not torch._C._is_any_autocast_enabled():
            return _Plain._backward(ctx, cotangents)
        with own_precision(torch.device("cpu")):
            return _Plain._backward(ctx, cotangents)

    @staticmethod
    def _backward(ctx: Any, cotangents: Tensors) -> tuple[Tensor | None, ...]:
        needs, (call, count, second, third) = ctx.needs_input_grad[1:], ctx.call
        saved = ctx.saved_tensors  # raises where an earlier backward call has freed them
        xi, resets = saved[count:second], saved[second:third]
        if not (torch.is_grad_enabled() or is_observed() or is_batched(cotangents)):
            tensors, tape, edges = saved[:count], saved[third:], call.edges(xi, resets)
            if not call.passes.pulls:
                grads = None if edges else _swept(call.stack, tensors, tape, cotangents, needs)
                if grads is not None:
                    return (None, *grads)
                tape = None
            elif call.runs_again:
                places = call.places(tensors)
                tape = None if places is None else call.passes.taped(tensors, places, edges)[1]
            grads = None if tape is None else call.passes.pulled(tensors, tape, cotangents, needs, edges)
            if grads is not None:
                return (None, *grads)
        ctx.program, ctx.ends = call.program(xi, resets), (count, count, third)
        # A tape that the stack cannot read, or none: it makes its own.
        ctx.witnesses = (_WRITTEN,) if call.passes.own_tape or call.runs_again else ()
        return Boundary.backward(ctx, *cotangents)


def _swept(
    stack: Stack, tensors: tuple[Tensor, ...], tape: tuple[Tensor, ...], cotangents: Tensors, needs: tuple[bool, ...]
) -> Tensors | None:
    """The gradients of one layer and direction whose blocks meet, so that no whole pass has them: by one sweep, with
    what follows from it, as `BackwardPass` has them. None where the gates are to be rebuilt.
    """
    net, x, S = stack.net, tensors[0], stack.net.cell.states
    cell, kernel, frames = net.cell, net.kernel, Frames.of(net.blocks(*x.shape[:2]), None, *x.shape[:2])
    if net.kernel.own_gradients or len(tape) < S + (cell.taped_per_unit > 0):
        return None
    w, own, leaving = Weights.of(tensors[1 + S :], net.biased), needs[1 + S :], True in needs[1 : 1 + S]
    kept, wanted = Tape(tape[:S], None, tape[S] if len(tape) > S else None), True in own
    finals = cotangents[1:]
    request = Sweep(
        cell=cell,
        w=w,
        tape=kept,
        frames=frames,
        errors=cotangents[0],
        arriving=() if all(f is None for f in finals) else tuple([None if f is None else f[0] for f in finals]),
        leaving=leaving,
        x=x,
        weights=wanted,
        bias=net.biased and wanted,
        dx=needs[0],
    )
    result = kernel.sweep(request)
    weights = parameter_gradients(cell, w, x, kept, result, own, None, kernel)
    initial: Tensors = (None,) * S
    if leaving:
        found = frames.collect_initial(result.leaving)
        initial = tuple([s[None] if needed else None for s, needed in zip(found, needs[1 : 1 + S], strict=True)])
    dx = result.dx
    if needs[0] and dx is None:
        dx = product(given(result.da).flatten(0, 1), cell.input_weight(w).t()).view(x.shape)
    return (dx, *initial, *weights)


_apply: Any = super(torch.autograd.Function, _Plain).apply
"""`_Plain.apply` without what that does for torch.func's transforms, in none of which a plain call is."""

with torch.inference_mode(False):  # whatever the mode in which this is imported
    _WRITTEN = torch.zeros(1, device="cpu").zero_()
    """A witness of an output that was written to: see `Boundary`."""
