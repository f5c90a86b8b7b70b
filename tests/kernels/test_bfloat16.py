"""The compiled kernel with a tape of bfloat16, against float64 on the same values: arithmetic is float32 in between."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from functions import each_cell
from reference import NETS, Case, Gradients, build, case, measure, ours
from torch import Tensor

import bptt

POLICIES = ["full", "truncated:6/4", "randomized:0.8"]


def wide(data: Case) -> Case:
    return Case(*(z.double() if isinstance(z, Tensor) else tuple(s.double() for s in z) for z in vars(data).values()))


def tensors(found: Gradients) -> list[Tensor]:
    return [found.y, *found.final, found.x, *found.initial, *found.parameters.values()]


def errors(found: Gradients, exact: Gradients) -> list[float]:
    """Of each tensor, by norms."""
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(tensors(found), tensors(exact), strict=True)]


def compare(cell: str, sizes: dict[str, int], net: dict[str, Any], layer: dict[str, Any], call: dict[str, Any]) -> None:
    theirs = build(cell, 7, 19, dtype=torch.bfloat16, **net)
    data = case(theirs, **sizes)
    torch.manual_seed(3)
    found = measure(ours(theirs, kernel="cpu", **layer), data, **call)
    torch.manual_seed(3)
    exact = measure(ours(copy.deepcopy(theirs).double(), kernel="cpu", **layer), wide(data), **call)
    assert {z.dtype for z in tensors(found)} == {torch.bfloat16}
    assert max(errors(found, exact)) < (0.15 if cell == "relu" else 0.01)  # rounding closes units at the kink


@each_cell
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("net", "memory"), [("one", "gates"), ("bi_two", "states"), ("two", "checkpoints:steps=7"), ("two", "gates")]
)
def test_policies_and_memories(cell: str, policy: str, net: str, memory: str) -> None:
    compare(cell, {"T": 23, "B": 5}, NETS[net], {"gradient": policy, "memory": memory}, {})


@each_cell
def test_a_call_that_is_not_small(cell: str) -> None:
    """Whose walks read and write bfloat16 themselves: of a small one all of it is converted at once."""
    compare(cell, {"T": 160, "B": 11}, NETS["one"], {}, {})


@each_cell
@pytest.mark.parametrize("policy", ["full", "truncated:4"])
def test_every_variant(cell: str, policy: str, variant: str) -> None:
    compare(cell, {"T": 11, "B": 5}, NETS["bi"], {"gradient": policy}, {})


@each_cell
@pytest.mark.parametrize("policy", ["full", "chunked:4", "truncated:4"])
def test_packed_and_resets(cell: str, policy: str) -> None:
    compare(cell, {"T": 9, "B": 4}, NETS["bi_two"], {"gradient": policy}, {"packed": (2, 9, 5, 9)})
    compare(cell, {"T": 9, "B": 4}, NETS["bi"], {"gradient": policy}, {"resets": torch.rand(9, 4) < 0.3})


@each_cell
@pytest.mark.parametrize("B", [2, 9])
def test_threads(cell: str, B: int, walkers: Callable[[int], None]) -> None:
    """Two of them share rows, or where there are few the panels of the weights; the bits are the same."""
    theirs = build(cell, 70, 70, dtype=torch.bfloat16)
    data = case(theirs, T=31, B=B)
    alone = measure(ours(theirs, gradient="truncated:3"), data)
    walkers(2)
    both = measure(ours(theirs, gradient="truncated:3"), data)
    for a, b in zip(tensors(alone), tensors(both), strict=True):
        torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-7)


@each_cell
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_about_as_exact_as_torch(cell: str) -> None:
    """More exact than its operations one after the other; oneDNN's LSTM, which rounds as often, is as exact."""
    theirs = build(cell, 64, 64, dtype=torch.bfloat16)
    data = case(theirs, T=50, B=8)
    exact = measure(copy.deepcopy(theirs).double(), wide(data))
    own, of_torch = (errors(measure(layer, data), exact) for layer in (ours(theirs), theirs))
    assert sum(own) < (1.05 if cell == "lstm" else 0.9) * sum(of_torch)


def test_values_are_rounded_to_the_nearest_even_one(variant: str) -> None:
    """Of a linear cell without a recurrence y is x W', here the sum of two values in float32."""
    layer = bptt.nn.RNN(2, 1, nonlinearity="identity", bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.weight_ih_l0.fill_(1)
        layer.weight_hh_l0.fill_(0)
    x = torch.randn(3000, 2) * torch.tensor([1.0, 1e-2])
    x[:4, 0], x[:4, 1] = torch.tensor([1.0, 1 + 2**-7, torch.inf, torch.nan]), torch.tensor([2**-8, 2**-8, 1.0, 1.0])
    x[4] = torch.tensor([-torch.inf, torch.inf])
    x[5] = torch.finfo(torch.bfloat16).max
    x[6] = torch.finfo(torch.bfloat16).tiny / 8
    x = x.bfloat16().view(1, 3000, 2)
    y, _ = layer(x)
    torch.testing.assert_close(y[0, :, 0], x[0].float().sum(1).bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_what_is_kept_takes_half_the_memory(kind: str) -> None:
    kept: list[int] = []
    for dtype in (torch.float32, torch.bfloat16):
        layer, memories = getattr(bptt.nn, kind)(16, 16, dtype=dtype), {}

        def pack(saved: Tensor, memories: dict[int, int] = memories) -> Tensor:
            memories[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
            return saved

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            layer(torch.randn(50, 8, 16, dtype=dtype))
        kept.append(sum(memories.values()))
    assert kept[0] == 2 * kept[1] > 0
