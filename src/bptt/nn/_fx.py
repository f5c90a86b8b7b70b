"""A layer's call inside a model that torch.fx traces."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Proxy, Tracer

from ..engine import refusal

__all__ = ["fx_node"]


def fx_node(layer: torch.nn.Module, input: Any, hx: Any, keywords: dict[str, Any]) -> Any:
    """The node of this call where torch.fx traces it, that is, where an argument is a Proxy; else None.

    torch.fx traces into every module outside of torch.nn, and cannot trace a loop through time.
    """
    states = (
        value for state in (hx, *keywords.values()) for value in (state if isinstance(state, tuple) else (state,))
    )
    proxies = [value for value in (input, *states) if isinstance(value, Proxy)]
    if not proxies:
        return None
    tracer = proxies[0].tracer
    if not isinstance(tracer, Tracer) or getattr(tracer, "root", None) is layer:
        raise refusal(f"torch.fx cannot trace into a bptt layer, only a model that has one: got {layer}")
    arguments = (input,) if hx is None else (input, hx)
    keywords = {k: v for k, v in keywords.items() if v is not None}
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), arguments, keywords)
