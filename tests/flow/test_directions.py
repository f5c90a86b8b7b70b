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


@pytest.mark.parametrize(
    ("direction", "lengths", "policy"),
    [("forward", None, "full"), ("forward", [T, 2, T - 1], "chunked:5"), ("reverse", [T, 2, T - 1], "truncated:4/3")],
)
def test_one_direction_of_the_top_layer_has_the_gradient_of_its_own_cell(
    direction: Literal["forward", "reverse"], lengths: list[int] | None, policy: str
) -> None:
    cells = [nn.LSTMCell(2 * H if k > 1 else I, H, dtype=F64) for k in range(6)]
    options: dict[str, Any] = {"dropout": 0.3, "gradient": policy, "kernel": "replay"}  # tracing takes longer here
    layer = bptt.nn.Recurrent(cells, bidirectional=True, **options)
    resets = torch.zeros(T, B, dtype=torch.bool).index_put(
        (torch.tensor([5, 9]), torch.tensor([0, 1])), torch.tensor(True)
    )
    state = tuple(torch.randn(6, B, H, dtype=F64) for _ in range(2))
    kwargs: dict[str, Any] = {"hx": state, "resets": resets, "lengths": lengths}

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            y, (_, c) = self.layer(x, **kwargs)
            weights = torch.linspace(0.5, 1.5, y.shape[-1], dtype=F64)
            found: Tensor = (y * weights).square().sum() + c[4].sum() + 3 * c[5].sum()
            return found

    model, x = Model(), torch.randn(T, B, I, dtype=F64)
    torch.manual_seed(1)
    scan = flow.record_scan(model, x, lambda value: value, direction=direction)
    torch.manual_seed(1)
    model(x).backward()
    top = layer.cells[4 + (direction == "reverse")]
    assert {*map(id, scan.parameters)} == {*map(id, top.parameters())}
    assert_close(scan.vector(scan.own), torch.cat([p.grad.flatten() for p in scan.parameters if p.grad is not None]))


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
    both: dict[str, Any] = {"bidirectional": True, "learn_initial_state": True}
    learned = bptt.nn.Recurrent(lambda n: nn.GRUCell(I, H, dtype=F64), 1, **both)
    with pytest.raises(ValueError, match="got a bidirectional one with a learned initial state"):
        flow.record_scan(learned, x, square, direction="reverse")
