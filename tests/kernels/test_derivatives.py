"""Second derivatives, torch.func and finite differences through the compiled kernel."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import CELLS, build, case, ours
from torch import Tensor
from torch.autograd import gradcheck
from torch.func import functional_call, grad, jacrev

Agree = Callable[..., None]

each_cell = pytest.mark.parametrize("cell", CELLS)
POLICIES = ["full", "chunked:2", "truncated:3", "truncated:3/2"]


def loss(layer: Any, x: Tensor, parameters: dict[str, Tensor], weight: Tensor) -> Tensor:
    """One number from a call of the layer with these parameters."""
    y, _ = functional_call(layer, parameters, (x,))
    return (y * weight).sin().sum()


def layers(cell: str, policy: str) -> tuple[list[Any], Any]:
    theirs = build(cell, 2, 3, num_layers=2)
    return [ours(theirs, gradient=policy, kernel=kernel) for kernel in ("cpu", "auto", "eager")], case(theirs, 5, 2)


@each_cell
@pytest.mark.parametrize("policy", POLICIES)
def test_double_backward(cell: str, policy: str, agree: Agree) -> None:
    """The gradient of the squared gradient, whose first half comes from the compiled kernel."""
    both, data = layers(cell, policy)
    results = []
    for layer in both:
        x = data.x.clone().requires_grad_()
        leaves = [x, *layer.parameters()]
        first = torch.autograd.grad(loss(layer, x, dict(layer.named_parameters()), data.dy), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        results.append([first, second])
    agree(results[0], results[2])
    agree(results[1], results[2])


@each_cell
@pytest.mark.parametrize("policy", POLICIES)
def test_torch_func(cell: str, policy: str, agree: Agree) -> None:
    both, data = layers(cell, policy)
    results = []
    for layer in both:
        parameters = {name: p.detach() for name, p in layer.named_parameters()}
        once = grad(loss, argnums=(1, 2))(layer, data.x, parameters, data.dy)
        twice = grad(lambda x, layer=layer, p=parameters: grad(loss, argnums=1)(layer, x, p, data.dy).square().sum())
        results.append([*once, twice(data.x)])
    agree(results[0], results[2])
    agree(results[1], results[2])


def test_jacobian(agree: Agree) -> None:
    """A layer's Jacobian row by row, which torch.func would take all at once if it could."""
    both, data = layers("gru", "full")
    rows = [jacrev(lambda x, layer=layer: layer(x)[0][-1, 0], chunk_size=1)(data.x) for layer in both]
    agree(rows[0], rows[2])


@each_cell
@pytest.mark.parametrize("net", [{}, {"num_layers": 2, "bidirectional": True}])
def test_finite_differences(cell: str, net: dict[str, Any], variant: str) -> None:
    theirs = build(cell, 2, 3, **net)
    layer, data = ours(theirs, kernel="cpu"), case(theirs, 4, 2)
    names = [name for name, _ in layer.named_parameters()]

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        return functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))[0]

    inputs = [data.x.clone().requires_grad_(), *(p.detach().clone().requires_grad_() for p in layer.parameters())]
    assert gradcheck(function, inputs, fast_mode=True)
