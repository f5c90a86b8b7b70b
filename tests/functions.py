"""Layers as functions of tensors, for tests of derivatives."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import CELLS, NETS, Case, Fixed, as_hx, as_tuple
from torch import Tensor
from torch.func import functional_call

import bptt

Agree = Callable[..., None]

each_cell = pytest.mark.parametrize("cell", CELLS)
each_net = pytest.mark.parametrize("net", NETS)


def policies(T: int, B: int, rows: int) -> dict[str, bptt.policies.Policy]:
    generator = torch.Generator().manual_seed(12)
    xi = [2 * torch.rand(T, B, generator=generator, dtype=torch.float64) for _ in range(rows)]
    return {
        "full": bptt.Full(),
        "chunked": bptt.Chunked(2),
        "truncated": bptt.Truncated(2),
        "truncated_every": bptt.Truncated(3, every=2),
        "fixed": Fixed(*xi),
    }


def as_function(layer: Any, **kw: Any) -> Callable[..., tuple[Tensor, ...]]:
    """The layer as a function of (x, initial state, parameters) to (y, final state)."""
    names = [name for name, _ in layer.named_parameters()]
    states = 2 if layer.mode == "LSTM" else 1

    def function(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        parameters = dict(zip(names, rest[states:], strict=True))
        y, final = functional_call(layer, parameters, (x, as_hx(rest[:states])), kw)
        return (y, *as_tuple(final))

    return function


def leaves(layer: Any, data: Case) -> list[Tensor]:
    tensors = [data.x, *data.initial, *layer.parameters()]
    return [z.detach().clone().requires_grad_() for z in tensors]
