"""The refusal of forward-mode derivatives, which neither walks nor replayed steps carry on, so that none is lost."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch.autograd import forward_ad

__all__ = ["forward_mode", "refuse_tangents"]


def forward_mode() -> bool:
    """Whether tensors may have tangents: inside a dual level, which torch.func.jvp, jacfwd and linearize enter too."""
    return getattr(forward_ad, "_current_level", 0) >= 0


def refuse_tangents(where: str, tensors: Iterable[Tensor | None]) -> None:
    """Raise NotImplementedError where a tensor has a tangent of torch.autograd.forward_ad or torch.func."""
    if forward_mode() and any(t is not None and _has_tangent(t) for t in tensors):
        raise NotImplementedError(
            f"{where}: bptt has no forward-mode derivatives yet (torch.autograd.forward_ad, torch.func.jvp, jacfwd, "
            "linearize), and was given a tensor with a tangent. Use reverse mode (torch.autograd.grad, torch.func.vjp, "
            "torch.func.jacrev), or for forward mode torch.nn's layers, which bptt.revert(model) puts back, and a "
            "plain loop over steps"
        )


def _has_tangent(tensor: Tensor) -> bool:
    """Of what torch.func's jvp has wrapped, everything is taken to have one: transforms below it hide which has."""
    jvps = {i.level() for i in functorch.get_interpreter_stack() or () if i.key() == functorch.TransformType.Jvp}
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.maybe_get_level(tensor) in jvps:
            return True
        tensor = functorch.get_unwrapped(tensor)
    with torch._C._DisableFuncTorch():
        return forward_ad.unpack_dual(tensor).tangent is not None
