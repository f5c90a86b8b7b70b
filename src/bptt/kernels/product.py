"""Large products of matrices, by the faster of torch's libraries."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

__all__ = ["product"]

ONEDNN_LINEAR = (
    torch.ops.mkldnn._linear_pointwise.default
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    else None
)
"""oneDNN's linear layer on plain tensors, where this build of torch has it."""

LARGE = 1_200_000
"""Multiplications in a product from which on oneDNN is asked: below, its call takes longer than MKL's."""


def product(x: Tensor, w: Tensor) -> Tensor:
    """x w': `[N, K]`, `[M, K]` -> `[N, M]`, each in any layout.

    torch.mm asks MKL, which does not use the widest instructions of every processor. oneDNN, which torch has too, does:
    on an AMD with AVX-512 it took 0.4 to 0.5 of the time from K = M = 512 on, with 16 to 512 rows.
    """
    plain = x.dtype == w.dtype == torch.float32 and type(x) is Tensor and type(w) in (Tensor, Parameter) and x.is_cpu
    if ONEDNN_LINEAR is None or not plain or x.numel() * len(w) < LARGE or x.is_neg() or w.is_neg():
        return torch.mm(x, w.t())
    if torch._C._are_functorch_transforms_active() or (
        torch.is_grad_enabled() and (x.requires_grad or w.requires_grad)
    ):
        return torch.mm(x, w.t())
    return ONEDNN_LINEAR(x, w, None, "none", [], "")
