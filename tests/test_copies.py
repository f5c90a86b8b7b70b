"""Layers under functional calls, parametrizations, copies, and the same seed."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from functions import Agree, each_cell
from reference import as_hx, as_tuple, build, case, gradients, measure, ours
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations

import bptt


@each_cell
def test_functional_call(cell: str, agree: Agree) -> None:
    """Other weights for one call; the module's own stay untouched, and get no gradient."""
    layer, other = ours(build(cell, num_layers=2)), ours(build(cell, seed=2, num_layers=2))
    data = case(layer)
    own = {n: p.detach().clone() for n, p in layer.named_parameters()}
    expected = measure(other, data)
    parameters = {n: p.detach().clone().requires_grad_() for n, p in other.named_parameters()}
    y, final = functional_call(layer, parameters, (data.x, as_hx(data.initial)))
    agree([y, as_tuple(final)], [expected.y, expected.final])
    torch.autograd.backward([y, *as_tuple(final)], [data.dy, *data.dfinal])
    agree({n: p.grad for n, p in parameters.items()}, expected.parameters)
    assert all(p.grad is None for p in layer.parameters())
    agree(dict(layer.named_parameters()), own, tolerance=0)


@each_cell
@pytest.mark.parametrize("policy", ["full", "truncated:3"])
def test_func_grad(cell: str, policy: str, agree: Agree) -> None:
    layer = ours(build(cell, num_layers=2), gradient=policy)
    data = case(layer)
    expected = gradients(layer, data.x, data.initial, data.dy, data.dfinal, bptt.policies.parse(policy))

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        y, final = functional_call(layer, parameters, (x, as_hx(data.initial)))
        return (y * data.dy).sum() + sum((z * dz).sum() for z, dz in zip(as_tuple(final), data.dfinal, strict=True))

    parameters = {n: p.detach() for n, p in layer.named_parameters()}
    dp, dx = torch.func.grad(loss, argnums=(0, 1))(parameters, data.x)
    agree(dp, expected.parameters)
    agree(dx, expected.x)


@each_cell
def test_weight_norm(cell: str, agree: Agree) -> None:
    theirs = build(cell, num_layers=2)
    layers = [theirs, ours(theirs)]
    data = case(theirs)
    results = []
    for layer in layers:
        parametrizations.weight_norm(layer, "weight_hh_l0", dim=0)
        layer.parametrizations.weight_hh_l0.original0.data.mul_(1.5)
        results.append(measure(layer, data).values())
    agree(results[1], results[0])


@each_cell
def test_assigned_weight(cell: str, agree: Agree) -> None:
    """A weight replaced by assignment is the one used (`layer.weight_hh_l0 = nn.Parameter(...)`)."""
    theirs = build(cell, num_layers=2)
    layers = [theirs, ours(theirs)]
    data = case(theirs)
    weight = torch.eye(theirs.weight_hh_l1.shape[1]).repeat(len(theirs.weight_hh_l1), 1)[: len(theirs.weight_hh_l1)]
    for layer in layers:
        layer.weight_hh_l1 = nn.Parameter(weight.double())
    agree(measure(layers[1], data).values(), measure(layers[0], data).values())


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "to_and_back": lambda layer: copy.deepcopy(layer).float().to(torch.float64),
    "meta": lambda layer: copy.deepcopy(layer).to("meta").to_empty(device="cpu"),
}


@each_cell
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("policy", ["truncated:3/2", "randomized:0.6"])
def test_copies(cell: str, how: str, policy: str, agree: Agree) -> None:
    layer = ours(build(cell, num_layers=2), gradient=policy, memory="states")
    for p in layer.parameters():
        p.data = p.data.float().double()
    data = case(layer)
    copied = COPIES[how](layer)
    assert repr(copied) == repr(layer)
    if how == "meta":
        copied.load_state_dict(layer.state_dict())
    results = []
    for one in (copied, layer):
        torch.manual_seed(15)
        results.append(measure(one, data).values())
    agree(results[0], results[1], tolerance=0)
    with torch.no_grad():
        copied.weight_hh_l0.zero_()
    assert layer.weight_hh_l0.abs().min() > 0


def test_state_dict_on_disk(agree: Agree) -> None:
    layer = ours(build("gru", num_layers=2))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = ours(build("gru", seed=2, num_layers=2))
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    agree(dict(other.state_dict()), dict(layer.state_dict()), tolerance=0)


@each_cell
def test_double_and_float(cell: str, agree: Agree) -> None:
    theirs = build(cell, dtype=torch.float32, num_layers=2)
    mine = ours(theirs).double()
    data = case(mine)
    agree(measure(mine, data).values(), measure(theirs.double(), data).values())


@pytest.mark.parametrize("policy", ["full", "truncated:3/2", "randomized:0.6", "randomized:mean=3,tail=4"])
@pytest.mark.parametrize("memory", ["gates", "states"])
def test_same_seed_same_bits(policy: str, memory: str, agree: Agree) -> None:
    layer = ours(build("lstm", num_layers=2, dropout=0.4, bidirectional=True), gradient=policy, memory=memory)
    data = case(layer)
    results = []
    for _ in range(2):
        torch.manual_seed(16)
        results.append(measure(layer, data).values())
    agree(results[0], results[1], tolerance=0)


def test_randomized_differs_between_calls() -> None:
    layer = ours(build("gru"), gradient="randomized:0.5")
    data = case(layer, T=20)
    first, second = measure(layer, data), measure(layer, data)
    torch.testing.assert_close(first.y, second.y, rtol=0, atol=0)
    assert not torch.equal(first.x, second.x)


@each_cell
def test_training_follows_torch(cell: str, agree: Agree) -> None:
    """Twenty steps of an optimiser with clipping arrive at the same weights."""
    theirs = build(cell, num_layers=2)
    layers = [theirs, ours(theirs)]
    data = case(theirs)
    for layer in layers:
        optimiser = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.5)
        for _ in range(20):
            optimiser.zero_grad()
            (layer(data.x)[0] - data.dy).square().mean().backward()
            nn.utils.clip_grad_norm_(layer.parameters(), 0.3)
            optimiser.step()
    agree(dict(layers[1].named_parameters()), dict(layers[0].named_parameters()), tolerance=1e-9)
