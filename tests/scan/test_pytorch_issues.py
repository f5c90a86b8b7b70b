"""Scenarios of our own after reports that torch's scan gave wrong gradients or refused a step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import bptt

T, B, H = 9, 3, 4


@pytest.mark.parametrize("kernel", ["auto", "eager", "replay"])
@pytest.mark.parametrize("with_final", [False, True])
def test_pytorch_184528_captured_weights_with_a_first_carry_without_gradient(kernel: str, with_final: bool) -> None:
    a = torch.full((H,), 0.7, dtype=torch.float64, requires_grad=True)
    h, xs = torch.randn(B, H, dtype=torch.float64), torch.randn(T, B, H, dtype=torch.float64)
    c, ys = h, []
    for x in xs:
        c = a * c + x
        ys.append(c)
    (expected,) = torch.autograd.grad((torch.stack(ys) ** 2).sum() + with_final * c.sum(), a)
    final, got = bptt.scan(lambda c, x: (a * c + x, a * c + x), h, xs, kernel=kernel)
    (found,) = torch.autograd.grad((got**2).sum() + with_final * final.sum(), a)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kernel", ["auto", "eager", "replay"])
def test_pytorch_153679_layers_below_the_last_within_a_step_and_in_scans_of_scans(kernel: str) -> None:
    layers = [torch.nn.Linear(2 * H, H, dtype=torch.float64) for _ in range(3)]
    parameters = [p for layer in layers for p in layer.parameters()]
    hs, xs = [torch.zeros(B, H, dtype=torch.float64)] * 3, torch.randn(T, B, H, dtype=torch.float64)

    def step(carry: list[Tensor], x: Tensor) -> tuple[list[Tensor], Tensor]:
        new = []
        for layer, h in zip(layers, carry, strict=True):
            x = h + torch.tanh(layer(torch.cat((h, x), -1)))
            new.append(x)
        return new, x

    c, ys = hs, []
    for x in xs:
        c, y = step(c, x)
        ys.append(y)
    expected = torch.autograd.grad((torch.stack(ys) ** 2).sum(), parameters)
    _, got = bptt.scan(step, hs, xs, kernel=kernel)
    stacked = xs
    for layer, h in zip(layers, hs, strict=True):

        def one(h: Tensor, x: Tensor, layer: torch.nn.Linear = layer) -> tuple[Tensor, Tensor]:
            h = h + torch.tanh(layer(torch.cat((h, x), -1)))
            return h, h

        _, stacked = bptt.scan(one, h, stacked, kernel=kernel)
    for out in (got, stacked):
        torch.testing.assert_close(out, torch.stack(ys))
        torch.testing.assert_close(torch.autograd.grad((out**2).sum(), parameters), expected)


@pytest.mark.parametrize("kernel", ["auto", "eager", "replay"])
@pytest.mark.parametrize("activation", [torch.tanh, torch.sigmoid])
def test_pytorch_195977_a_saturating_step_that_returns_its_carry_as_y(kernel: str, activation: torch.nn.Module) -> None:
    w = torch.randn(H, H, dtype=torch.float64, requires_grad=True)
    h, xs = torch.randn(B, H, dtype=torch.float64), torch.randn(T, B, H, dtype=torch.float64)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = activation(h @ w + x)
        return h, h

    c, ys = h, []
    for x in xs:
        c, y = step(c, x)
        ys.append(y)
    (expected,) = torch.autograd.grad((torch.stack(ys) ** 2).sum(), w)
    _, got = bptt.scan(step, h, xs, kernel=kernel)
    torch.testing.assert_close(torch.autograd.grad((got**2).sum(), w)[0], expected)
