"""What bounds a layer's call: its matrix products alone, and a call that does nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..cells import of_name
from .cases import Case
from .contest import Call

__all__ = ["PARTS", "layer_parts"]

PARTS = {
    "products at once": "the input's, and those for the gradients of x and of the weights, all steps in one each",
    "products in time": "the recurrent ones, T forward and T back",
    "empty call": "a module whose autograd function has these inputs and does nothing",
}
"""What is timed beside a layer, by torch and without its layer, and what that is."""


def layer_parts(case: Case) -> dict[str, Call]:
    """The parts of `PARTS`, of one layer in one direction, on tensors of a layer's sizes that hold zeros.

    >>> {name: len(call()) for name, call in layer_parts(Case("gru", 5, 2, 3, 4)).items()}
    {'products at once': 4, 'products in time': 2, 'empty call': 6}
    """
    rows, GH = case.T * case.B, of_name(case.cell).gates_per_unit * case.H
    x, h, da = torch.zeros(rows, case.I), torch.zeros(rows, case.H), torch.zeros(rows, GH)
    W_ih, W_hh = torch.zeros(GH, case.I), torch.zeros(GH, case.H)
    a, dx, dW_ih, dW_hh = (
        da.new_empty(rows, GH),
        x.new_empty(x.shape),
        W_ih.new_empty(W_ih.shape),
        W_hh.new_empty(W_hh.shape),
    )
    of_step, dh = da.new_empty(case.B, GH), h.new_empty(case.B, case.H)
    one_h, one_da = h[: case.B], da[: case.B]

    def at_once() -> Sequence[Tensor]:
        torch.mm(x, W_ih.t(), out=a)
        torch.mm(da, W_ih, out=dx)
        torch.mm(da.t(), x, out=dW_ih)
        torch.mm(da.t(), h, out=dW_hh)
        return a, dx, dW_ih, dW_hh

    def in_time() -> Sequence[Tensor]:
        for _ in range(case.T):
            torch.mm(one_h, W_hh.t(), out=of_step)
        for _ in range(case.T):
            torch.mm(one_da, W_hh, out=dh)
        return of_step, dh

    return {"products at once": at_once, "products in time": in_time, "empty call": _empty(case, x, W_ih, W_hh)}


def _empty(case: Case, x: Tensor, W_ih: Tensor, W_hh: Tensor) -> Call:
    inputs = [x.view(case.T, case.B, case.I).requires_grad_()]
    inputs += [t.clone().requires_grad_() for t in (W_ih, W_hh, W_ih[:, 0], W_hh[:, 0])]
    y = x.new_zeros(case.T, case.B, case.H)
    dy = torch.zeros_like(y)

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: Tensor, *tensors: Tensor) -> Tensor:
            ctx.save_for_backward(*tensors)
            return y.view_as(y)

        @staticmethod
        def backward(ctx: Any, *dy: Tensor) -> tuple[Tensor | None, ...]:
            return None, *ctx.saved_tensors

    class Module(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            result: Tensor = Nothing.apply(y, *tensors)
            return result

    module = Module()

    def call() -> Sequence[Tensor]:
        out = module(*inputs)
        return out.detach(), *torch.autograd.grad(out, inputs, dy)

    return call
