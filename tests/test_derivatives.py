"""Derivatives of a layer, of every order, against numerical ones."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from functions import Agree, as_function, each_cell, each_net, leaves, policies
from reference import NETS, build, case, ours
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils.rnn import pack_padded_sequence


def flattened(function: Callable[..., tuple[Tensor, ...]], like: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """The function from one vector to one vector: a check along one random direction then covers every argument."""

    def flat(vector: Tensor) -> Tensor:
        parts = [part.view(z.shape) for part, z in zip(vector.split([z.numel() for z in like]), like, strict=True)]
        return torch.cat([z.reshape(-1) for z in function(*parts)])

    return flat


def check(function: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor], *, second: bool = False) -> None:
    """The first derivative, or the derivative of the gradient, against finite differences."""
    flat = flattened(function, inputs)
    vector = torch.cat([z.detach().reshape(-1) for z in inputs]).requires_grad_()
    if second:
        generator = torch.Generator().manual_seed(13)
        cotangent = torch.randn(flat(vector).shape, generator=generator, dtype=torch.float64).requires_grad_()
        assert gradgradcheck(flat, [vector], [cotangent], fast_mode=True)
    else:
        assert gradcheck(flat, [vector], fast_mode=True)


def packed_function(layer: Any, lengths: tuple[int, ...]) -> Callable[..., tuple[Tensor, ...]]:
    def function(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(17)  # dropout
        y, *final = as_function(layer)(pack_padded_sequence(x, lengths, enforce_sorted=False), *rest)
        return (y.data, *final)

    return function


RESETS = torch.tensor([[1, 0], [0, 0], [1, 1], [0, 0]]).bool()


@each_cell
@each_net
@pytest.mark.parametrize("memory", ["gates", "states"])
def test_gradcheck(cell: str, net: str, memory: str) -> None:
    layer = ours(build(cell, I=2, H=3, **NETS[net]), memory=memory)
    check(as_function(layer), leaves(layer, case(layer, T=4, B=2)))


@each_cell
def test_gradcheck_of_every_entry(cell: str) -> None:
    layer = ours(build(cell, I=1, H=3))
    assert gradcheck(as_function(layer), leaves(layer, case(layer, T=3, B=1)))


@each_cell
@pytest.mark.parametrize("net", ["two", "bi_two"])
@pytest.mark.parametrize("variant", ["resets", "packed_with_dropout"])
def test_gradcheck_of_variants(cell: str, net: str, variant: str) -> None:
    layer = ours(build(cell, I=2, H=3, dropout=0.4 if variant != "resets" else 0.0, **NETS[net]))
    function = as_function(layer, resets=RESETS) if variant == "resets" else packed_function(layer, (2, 4))
    check(function, leaves(layer, case(layer, T=4, B=2)))


@each_cell
@pytest.mark.parametrize("net", ["one", "two", "bi_two"])
def test_gradgradcheck(cell: str, net: str) -> None:
    """For the exact gradient; a policy that cuts is a graph whose values do not tell where it is cut."""
    layer = ours(build(cell, I=2, H=3, **NETS[net]))
    check(as_function(layer), leaves(layer, case(layer, T=4, B=2)), second=True)


@each_cell
@pytest.mark.parametrize("variant", ["resets", "packed_with_dropout", "states"])
def test_gradgradcheck_of_variants(cell: str, variant: str) -> None:
    theirs = build(
        cell, I=2, H=3, num_layers=2, bidirectional=True, dropout=0.4 if variant == "packed_with_dropout" else 0
    )
    layer = ours(theirs, memory="states" if variant == "states" else "gates")
    function = {
        "resets": as_function(layer, resets=RESETS),
        "packed_with_dropout": packed_function(layer, (2, 4)),
        "states": as_function(layer),
    }[variant]
    check(function, leaves(layer, case(layer, T=4, B=2)), second=True)


@each_cell
@pytest.mark.parametrize("net", ["two", "bi_two"])
def test_third_derivative(cell: str, net: str, agree: Agree) -> None:
    theirs = build(cell, I=2, H=3, **NETS[net])
    data = case(theirs, T=3, B=2)

    def run(layer: Any) -> list[Any]:
        x = data.x.clone().requires_grad_()
        out = layer(x)[0].square().sum()
        results = []
        for _ in range(3):
            (g,) = torch.autograd.grad(out, x, create_graph=True)
            out = g.square().sum()
            results.append(g)
        return [*results, torch.autograd.grad(out, list(layer.parameters()), materialize_grads=True)]

    agree(run(ours(theirs)), run(theirs), tolerance=1e-9)


@each_cell
@pytest.mark.parametrize("policy", ["full", "chunked", "truncated", "truncated_every", "fixed"])
@pytest.mark.parametrize("net", ["two", "bi_two"])
def test_gradient_that_can_be_differentiated_is_the_same(cell: str, policy: str, net: str, agree: Agree) -> None:
    """`create_graph=True` takes another path to the same first derivative."""
    rows = NETS[net]["num_layers"] * 2 if "bidirectional" in NETS[net] else 1
    layer = ours(build(cell, **NETS[net]), gradient=policies(7, 3, rows)[policy])
    data = case(layer)
    inputs = leaves(layer, data)
    results = [
        torch.autograd.grad(as_function(layer)(*inputs), inputs, [data.dy, *data.dfinal], create_graph=create)
        for create in (False, True)
    ]
    assert not any(g.requires_grad for g in results[0])
    assert all(g.requires_grad for g in results[1])
    agree(results[1], results[0])
