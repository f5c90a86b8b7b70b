"""The tangents of forward mode: where there are some, and their refusal where they would be lost."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch.autograd import forward_ad

__all__ = ["forward_mode", "has_tangent", "refuse_tangents"]


def forward_mode() -> bool:
    """Whether tensors may have tangents: inside a dual level, which torch.func.jvp, jacfwd and linearize enter too."""
    return getattr(forward_ad, "_current_level", 0) >= 0


def refuse_tangents(where: str, tensors: Iterable[Tensor | None]) -> None:
    """Raise NotImplementedError where a tensor has a tangent of torch.autograd.forward_ad or torch.func."""
    if forward_mode() and any(map(has_tangent, tensors)):
        raise NotImplementedError(
            f"{where}: bptt has no forward-mode derivatives here (torch.autograd.forward_ad, torch.func.jvp, jacfwd, "
            "linearize), and was given a tensor with a tangent. Use reverse mode (torch.autograd.grad, torch.func.vjp, "
            "torch.func.jacrev), or for forward mode a call of a bptt.nn layer, and a plain loop over steps"
        )


def has_tangent(tensor: Tensor | None) -> bool:
    """Of what torch.func's jvp has wrapped, everything is taken to have one: transforms below it hide which has."""
    if tensor is None:
        return False
    jvps = {i.level() for i in functorch.get_interpreter_stack() or () if i.key() == functorch.TransformType.Jvp}
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.maybe_get_level(tensor) in jvps:
            return True
        tensor = functorch.get_unwrapped(tensor)
    with torch._C._DisableFuncTorch():
        return forward_ad.unpack_dual(tensor).tangent is not None
