"""A layer under autocast: it computes, and returns, the precision of its parameters."""

import pytest
import torch
from functions import Agree, each_cell
from reference import NETS, as_hx, as_tuple, build, case, measure, ours
from torch import nn


@each_cell
@pytest.mark.parametrize("net", ["one", "bi_two"])
@pytest.mark.parametrize("policy", ["full", "truncated:3"])
@pytest.mark.parametrize("packed", [None, (2, 7, 5)])
def test_autocast_leaves_results_right(
    cell: str, net: str, policy: str, packed: tuple[int, ...] | None, agree: Agree
) -> None:
    layer = ours(build(cell, dtype=torch.float32, **NETS[net]), gradient=policy)
    data = case(layer)
    expected = measure(layer, data, packed=packed)
    with torch.autocast("cpu", torch.bfloat16):
        actual = measure(layer, data, packed=packed)
    for z in (actual.y, *actual.final, actual.x, *actual.initial, *actual.parameters.values()):
        assert z.dtype == torch.float32
    agree(actual.values(), expected.values())


@each_cell
@pytest.mark.parametrize("hx", [None, torch.bfloat16, torch.float32])
def test_autocast_after_a_linear_layer(cell: str, hx: torch.dtype | None, agree: Agree) -> None:
    """The linear layer hands on bfloat16; the recurrence computes in the dtype of its weights."""
    layer = ours(build(cell, dtype=torch.float32, num_layers=2))
    linear = nn.Linear(3, 5)
    data = case(layer)
    z = torch.randn(7, 3, 3)
    initial = None if hx is None else as_hx(s.to(hx) for s in data.initial)
    with torch.autocast("cpu", torch.bfloat16):
        x = linear(z)
        assert x.dtype == torch.bfloat16
        y, final = layer(x, initial)
    assert y.dtype == as_tuple(final)[0].dtype == torch.float32
    y_expected, _ = layer(x.float(), None if hx is None else as_hx(s.to(hx).float() for s in data.initial))
    agree(y, y_expected)
    parameters = [*layer.parameters(), linear.weight]
    agree(
        torch.autograd.grad((y * data.dy).sum(), parameters, retain_graph=True),
        torch.autograd.grad((y_expected * data.dy).sum(), parameters),
        tolerance=1e-5,
    )


def test_backward_inside_autocast(agree: Agree) -> None:
    layer = ours(build("lstm", dtype=torch.float32, num_layers=2))
    data = case(layer)
    expected = measure(layer, data)
    y, final = layer(data.x, as_hx(data.initial))
    with torch.autocast("cpu", torch.bfloat16):
        torch.autograd.backward([y, *as_tuple(final)], [data.dy, *data.dfinal])
    agree({n: p.grad for n, p in layer.named_parameters()}, expected.parameters)
