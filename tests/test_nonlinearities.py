"""The simple RNN with each nonlinearity, two of which torch.nn does not have, against autograd through a plain loop."""

import pytest
import torch
from torch import Tensor

import bptt

FUNCTIONS = {"tanh": torch.tanh, "relu": torch.relu, "sigmoid": torch.sigmoid, "identity": lambda a: a}


@pytest.mark.parametrize("kernel", ["cpu", "eager"])
@pytest.mark.parametrize("nonlinearity", FUNCTIONS)
@pytest.mark.parametrize("hidden", [1, 4, 19])
def test_nonlinearity(nonlinearity: str, kernel: str, hidden: int) -> None:
    torch.manual_seed(1)
    layer = bptt.nn.RNN(3, hidden, nonlinearity=nonlinearity, kernel=kernel, dtype=torch.float64)
    inputs = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in [(7, 2, 3), (1, 2, hidden)]]
    cotangents = [torch.randn(*shape, dtype=torch.float64) for shape in [(7, 2, hidden), (1, 2, hidden)]]
    leaves = [*inputs, *layer.parameters()]

    def plain(x: Tensor, h_0: Tensor) -> tuple[Tensor, Tensor]:
        h, ys = h_0[0], []
        for x_t in x:
            a = x_t @ layer.weight_ih_l0.t() + layer.bias_ih_l0 + h @ layer.weight_hh_l0.t() + layer.bias_hh_l0
            h = FUNCTIONS[nonlinearity](a)
            ys.append(h)
        return torch.stack(ys), h[None]

    actual, expected = layer(*inputs), plain(*inputs)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, leaves, cotangents), torch.autograd.grad(expected, leaves, cotangents)
    )


def test_unknown_nonlinearity() -> None:
    with pytest.raises(ValueError, match="nonlinearity must be one of 'tanh', 'relu', 'sigmoid', 'identity': got 'gel"):
        bptt.nn.RNN(3, 4, nonlinearity="gelu")
