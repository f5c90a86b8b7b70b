"""One direction of a bidirectional `bptt.nn.Recurrent`, measured as the scan that it is."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.testing import assert_close

import bptt
from bptt import flow

T, B, I, H = 14, 3, 3, 4
F64 = torch.float64


def square(y: Tensor) -> Tensor:
    return y.square().mean()


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("lengths", [None, [T, 2, T - 1]])
def test_one_direction_of_a_bidirectional_layer_is_a_scan_with_its_own_gradient(
    direction: Literal["forward", "reverse"], lengths: list[int] | None
) -> None:
    layer = bptt.nn.Recurrent(lambda n: nn.LSTMCell(I, H, dtype=F64), 1, bidirectional=True, gradient="truncated:3")
    x = torch.randn(T, B, I, dtype=F64)
    given: Any = x if lengths is None else pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)

    def loss(y: Any) -> Tensor:
        y = y if isinstance(y, Tensor) else y.data
        return (y * torch.linspace(0.5, 1.5, y.shape[-1], dtype=F64)).square().sum()

    scan = flow.record_scan(layer, given, loss, direction=direction)
    loss(layer(given)[0]).backward()
    assert {*map(id, scan.parameters)} == {*map(id, layer.cells[direction == "reverse"].parameters())}
    assert_close(scan.vector(scan.own), torch.cat([p.grad.flatten() for p in scan.parameters if p.grad is not None]))
    assert flow.lag_map(scan).norm.shape[-1] == T


def test_a_direction_is_refused_where_it_is_no_scan() -> None:
    x = torch.randn(T, B, I, dtype=F64)
    with pytest.raises(ValueError, match="direction is for a bidirectional layer: got 'forward'"):
        flow.record_scan(bptt.nn.Recurrent(nn.GRUCell(I, H, dtype=F64)), x, square, direction="forward")
    deep = bptt.nn.Recurrent(lambda n: nn.GRUCell(2 * H if n else I, H, dtype=F64), 2, bidirectional=True)
    with pytest.raises(ValueError, match="got a bidirectional one with several layers"):
        flow.record_scan(deep, x, square, direction="reverse")
