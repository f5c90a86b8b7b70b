"""The arguments of a layer's call, checked, with errors that name them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..engine import recorder
from ._sequences import checked_lengths

__all__ = ["call_lengths", "check_dtypes", "no_weight", "not_dense"]


def no_weight(layer: str, name: str) -> TypeError:
    """The error of a parameter that is None."""
    instead = " (a layer without biases is built with bias=False)" if name.startswith("bias") else ""
    return TypeError(f"{layer}: {name} must be a tensor: got None{instead}")


def not_dense(layer: str, input: Tensor) -> RuntimeError:
    """The error of an input of another layout."""
    if not input.is_nested:
        return RuntimeError(f"{layer}: input must be a dense tensor: got layout {input.layout} (to_dense() of it)")
    return RuntimeError(
        f"{layer}: input must be a dense tensor or a PackedSequence, in a layer's own call also a nested tensor of "
        f"layout=torch.jagged: got a nested tensor of {input.layout}, which becomes a PackedSequence by "
        "torch.nn.utils.rnn.pack_sequence(input.unbind(), enforce_sorted=False)"
    )


def check_dtypes(layer: str, x: Tensor, states: tuple[Tensor, ...], weight: torch.dtype) -> None:
    """Raise RuntimeError where dtypes differ, which torch.nn leaves to its operations where there is any autocast."""
    if x.dtype != weight:
        raise RuntimeError(f"{layer}: input must have the parameters' dtype {weight}: got {x.dtype}")
    for state in states:
        if state.dtype != x.dtype:
            raise RuntimeError(f"{layer}: hx must have input's dtype {x.dtype}: got {state.dtype}")


def call_lengths(name: str, ends: Any, x: Tensor) -> Tensor | None:
    """The lengths `[B]` on the CPU; None where all are T, which a graph or a record does not ask."""
    if not torch.compiler.is_compiling() and recorder() is None:
        lengths = checked_lengths(ends, x)
        return lengths if lengths is not None and bool((lengths != x.shape[0]).any()) else None
    if not isinstance(ends, Tensor):
        raise TypeError(f"{name}: lengths must be a tensor in a graph, for other lengths: got {type(ends).__name__}")
    return ends.detach().to("cpu", torch.int64)
