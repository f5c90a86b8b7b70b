"""What tests of refused steps share: why a step is not compiled, and whether its results are those of a loop."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import bptt

__all__ = ["B", "H", "Step", "T", "agrees", "both", "given", "reason", "weights"]

B, H, T = 3, 4, 9
Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def reason(step: Step, h: Tensor, xs: Tensor) -> str:
    """Why a step is not compiled; empty where it is."""
    try:
        bptt.scan(step, h, xs, kernel="eager")
    except RuntimeError as error:
        return str(error)
    return ""


def given() -> tuple[Tensor, Tensor]:
    """A first carry and xs."""
    return torch.randn(B, H, dtype=torch.float64), torch.randn(T, B, H, dtype=torch.float64)


def agrees(step: Step, *weights: Tensor, rtol: float | None = None, atol: float | None = None) -> None:
    """Check the results of a scan, and the gradients of its arguments and of weights, against a loop."""
    h = torch.randn(B, H, dtype=torch.float64, requires_grad=True)
    xs = torch.randn(T, B, H, dtype=torch.float64, requires_grad=True)
    c, ys = h, []
    for x in xs:
        c, y = step(c, x)
        ys.append(y)
    carry, got = bptt.scan(step, h, xs)
    torch.testing.assert_close(got, torch.stack(ys), rtol=rtol, atol=atol)
    torch.testing.assert_close(carry, c, rtol=rtol, atol=atol)
    inputs = [t for t in (h, xs, *weights) if t.requires_grad]
    expected = torch.autograd.grad((torch.stack(ys) ** 2).sum() + c.sin().sum(), inputs, allow_unused=True)
    found = torch.autograd.grad((got**2).sum() + carry.sin().sum(), inputs, allow_unused=True)
    for g, e, p in zip(found, expected, inputs, strict=True):
        g, e = (torch.zeros_like(p) if t is None else t for t in (g, e))
        torch.testing.assert_close(g, e, rtol=rtol, atol=atol)


def weights() -> Tensor:
    return (torch.randn(H, H, dtype=torch.float64) * 0.5).requires_grad_()


def both(n: Tensor) -> tuple[Tensor, Tensor]:
    return n, n
