"""The tangent of a traced step as a step of its own, which is traced and split like any other.

Of the step (h', y) = f(h, x, w) it is (h', dh', y, dy) of ((h, dh), (x, dx), (w, dw)): the recursion

    dh_t = (df/dh) dh_{t-1} + (df/dx) dx_t + (df/dw) dw

of forward-mode differentiation, whose Jacobians are those of the step at the same t. A tangent is linear in what moves,
as a gradient v' J is in v: differentiated by v, in the direction of what moves, it is J times that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward

from .parts import SplitStep
from .trace import trace
from .traced import TracedStep

__all__ = ["TangentStep", "tangent_step"]


class TangentStep(NamedTuple):
    """A traced tangent. Its carry: the leaves of the step's, then the tangents of those with decimals. Its x: likewise,
    of the leaves that move. Its y: the step's, then the tangents of those with decimals.

    captured: of each tensor that the trace has captured, its place among the step's captured tensors and then the
    tangents of those that move; or the tensor, where it is the same at every call.
    """

    traced: TracedStep
    captured: tuple[int | Tensor, ...]


def tangent_step(
    step: SplitStep, lanes: Sequence[bool], moving: Sequence[bool], devices: Sequence[torch.device]
) -> TangentStep:
    """The tangent of a step.

    lanes: of the step's captured tensors. moving: which of the leaves of x and of the captured tensors have a tangent.
    devices: of carry, x and captured tensors.

    Raises NotTraceable where the derivative of its operations cannot be recorded.
    """
    n, m = len(step.carry), len(step.x)
    taken = {s for name in step.captured for s in step.values[name].shape}
    B = next(p for p in (61, 67, 71, 73, 79, 83) if p not in taken)

    def sample(name: str, device: torch.device, lane: bool) -> Tensor:
        kind = step.values[name]
        made = torch.ones((B, *kind.shape) if lane else kind.shape, dtype=kind.dtype, device=device)
        return made.requires_grad_(kind.dtype.is_floating_point)

    names = [*step.carry, *step.x, *step.captured]
    rows = [*[True] * (n + m), *lanes]
    made = [sample(*of) for of in zip(names, devices, rows, strict=True)]
    carry, x, captured = made[:n], made[n : n + m], made[n + m :]
    dcarry = [torch.ones_like(c).requires_grad_() for c in carry if c.is_floating_point()]
    dx = [torch.ones_like(t).requires_grad_() for t, moves in zip(x, moving[:m], strict=True) if moves]
    dcaptured = [torch.ones_like(t).requires_grad_() for t, moves in zip(captured, moving[m:], strict=True) if moves]

    def call(states: list[Tensor], inputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        # Copies: what stands for a captured tensor is met where torch's functions take it.
        fixed, moves_too = [t.clone() for t in captured], [t.clone() for t in dcaptured]
        values = dict(zip(step.captured, fixed, strict=True))
        values |= step.constants(1, values)
        values |= zip((*step.carry, *step.x), (*states[:n], *inputs[:m]), strict=True)
        for part in (step.hoisted, step.forward, step.outputs):
            values |= part(len(states[0]), values)
        primals = [t for t in states[:n] if t.is_floating_point()]
        primals += [t for t, moves in zip((*inputs[:m], *fixed), moving, strict=True) if moves]
        new, y = ([values[name] for name in of] for of in (step.next, step.y))
        moved = _moved([*new, *y], primals, [*states[n:], *inputs[m:], *moves_too])
        tangents = [[t for t in some if t is not None] for some in (moved[: len(new)], moved[len(new) :])]
        return [*new, *tangents[0]], [*y, *tangents[1]]

    traced = trace(call, [*carry, *dcarry], [*x, *dx])
    at = {id(t): i for i, t in enumerate((*captured, *dcaptured))}
    return TangentStep(traced, tuple(at.get(id(t), t) for t in traced.tensors))


def _moved(outputs: Sequence[Tensor], primals: Sequence[Tensor], tangents: Sequence[Tensor]) -> list[Tensor | None]:
    """The tangents of outputs; None of whole numbers."""
    at = [i for i, t in enumerate(outputs) if t.requires_grad and t.is_floating_point()]
    found: list[Tensor | None] = [torch.zeros_like(t) if t.is_floating_point() else None for t in outputs]
    if not at:
        return found
    own = [outputs[i] for i in at]
    v = [torch.zeros_like(t).requires_grad_() for t in own]
    grads = _grad(own, v, primals)
    pairs = [(g, t) for g, t in zip(grads, tangents, strict=True) if g is not None and g.requires_grad]
    if pairs:
        moved = _grad([g for g, _ in pairs], [t for _, t in pairs], v)
        for i, t in zip(at, moved, strict=True):
            found[i] = found[i] if t is None else t
    return found


def _grad(outputs: Sequence[Tensor], cotangents: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """torch.autograd.grad with create_graph, which itself loads sympy for the shapes of cotangents."""
    given = tuple(outputs), tuple(cotangents)
    return list(_engine_run_backward(*given, True, True, tuple(inputs), True, accumulate_grad=False))
