"""A layer in a graph of torch.fx: one node that calls the module, as torch.fx makes of torch.nn's layers."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Proxy, Tracer

from ..engine import refusal

__all__ = ["fx_node"]


def fx_node(layer: torch.nn.Module, input: Any, hx: Any, resets: Any, reset_state: Any) -> Any:
    """The node of this call where torch.fx traces it, which is where an argument is a Proxy; else None.

    torch.fx traces into every module outside of torch.nn, and cannot trace a walk through time.
    """
    states = (value for state in (hx, reset_state) for value in (state if isinstance(state, tuple) else (state,)))
    proxies = [value for value in (input, resets, *states) if isinstance(value, Proxy)]
    if not proxies:
        return None
    tracer = proxies[0].tracer
    if not isinstance(tracer, Tracer) or getattr(tracer, "root", None) is layer:
        raise refusal(f"torch.fx cannot trace into a bptt layer, only a model that has one: got {layer}")
    arguments = (input,) if hx is None else (input, hx)
    keywords = {k: v for k, v in (("resets", resets), ("reset_state", reset_state)) if v is not None}
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), arguments, keywords)
