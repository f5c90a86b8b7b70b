"""The compiled kernel, in every variant, against the eager kernel and the plain loops of `reference`."""

from collections.abc import Callable

import pytest
import torch
from reference import CELLS, Case, build, case, measure, ours
from torch import Tensor

import bptt
from bptt.kernels import cpu

from .calls import KINDS, Call, draw

Agree = Callable[..., None]
Use = Callable[[str], None]

CALLS = 40
"""Drawn calls of each cell: every policy, four times."""

each_cell = pytest.mark.parametrize("cell", CELLS)


def drawn(cell: str, index: int, monkeypatch: pytest.MonkeyPatch) -> Call:
    call = draw(cell, index)
    monkeypatch.setattr(cpu, "SMALL", 10**12 if call.small else 0)
    return call


@each_cell
@pytest.mark.parametrize("index", range(CALLS))
def test_every_variant_is_eager(cell: str, index: int, use: Use, agree: Agree, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs, final states and every gradient, in both precisions, at drawn sizes and options."""
    call = drawn(cell, index, monkeypatch)
    expected = call.run("eager")
    if call.has_reference:
        agree(expected, call.reference(), f"eager, {call}")
    for variant in cpu.variants():
        use(variant)
        agree(call.run("cpu"), expected, f"{variant} float64, {call}")
        agree(call.run("cpu", torch.float32), expected, f"{variant} float32, {call}")


@each_cell
@pytest.mark.parametrize("index", range(0, CALLS, 2))
def test_gradients_without_autograd(
    cell: str, index: int, use: Use, agree: Agree, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`bptt.gradients` and the adjoints of every layer."""
    call = drawn(cell, index, monkeypatch)
    expected = call.run_without_autograd("eager")
    for variant in cpu.variants():
        use(variant)
        agree(call.run_without_autograd("cpu"), expected, f"{variant} float64, {call}")
        agree(call.run_without_autograd("cpu", torch.float32), expected, f"{variant} float32, {call}")


def test_the_draws_cover_what_they_are_meant_to() -> None:
    calls = [draw(cell, index) for cell in CELLS for index in range(CALLS)]
    assert {call.layout for call in calls} == {"dense", "strided", "transposed", "part of a row", "expanded cotangent"}
    for cell in CELLS:
        mine = [call for call in calls if call.name.startswith(f"{cell} ")]
        assert {type(call.policy).__name__ for call in mine} >= {"Full", "Chunked", "Truncated", "Randomized", "Fixed"}
        assert {call.layer.num_layers for call in mine} == {1, 2}
        assert {call.layer.bidirectional for call in mine} == {False, True}
        assert {call.layer.bias for call in mine} == {False, True}
        assert {call.memory for call in mine} == {"gates", "states"}
        assert {len(call.data.x) for call in mine} == {1, 2, 7, 33}
        assert len({call.layer.hidden_size for call in mine}) >= 5
        assert sum(call.resets is not None for call in mine) >= 5
        assert sum(call.lengths is not None for call in mine) >= 5
        assert sum(call.has_reference for call in mine) >= 5
    assert KINDS == 10


@each_cell
def test_every_window_and_block_length(cell: str, variant: str, agree: Agree) -> None:
    """Blocks that overlap or leave gaps, the last one shorter, in one layer and in a stack."""
    T = 5
    for net in ({}, {"num_layers": 2, "bidirectional": True}):
        theirs = build(cell, 2, 6, **net)
        data = case(theirs, T, B=2)
        for window in range(1, T + 1):
            for every in range(1, window + 1):
                policy = bptt.Truncated(window, every=every)
                expected = measure(ours(theirs, gradient=policy, kernel="eager"), data)
                actual = measure(ours(theirs, gradient=policy, kernel="cpu"), data)
                agree(actual.values(), expected.values(), f"{net} {policy}")


@each_cell
def test_more_rows_than_walk_together(cell: str, variant: str, agree: Agree) -> None:
    """Rows beyond those that stay in the cache are walked in groups, forward and back."""
    theirs = build(cell, 3, 70)
    data = case(theirs, T=4, B=500)
    lengths = tuple(torch.randint(1, 5, (499,), generator=torch.Generator().manual_seed(3)).tolist())
    for policy, packed in (("full", None), ("truncated:3", None), ("chunked:2", (*lengths, 4))):
        expected = measure(ours(theirs, gradient=policy, kernel="eager"), data, packed=packed)
        actual = measure(ours(theirs, gradient=policy, kernel="cpu"), data, packed=packed)
        agree(actual.values(), expected.values(), policy)


@each_cell
def test_windows_walked_in_groups(cell: str, variant: str, agree: Agree) -> None:
    """Overlapping rows are added up over groups of columns as well."""
    theirs = build(cell, 3, 61)
    data = case(theirs, T=40, B=7)
    expected = measure(ours(theirs, gradient="truncated:6/2", kernel="eager"), data)
    agree(measure(ours(theirs, gradient="truncated:6/2", kernel="cpu"), data).values(), expected.values())


@pytest.mark.parametrize("nonlinearity", ["identity", "sigmoid"])
@pytest.mark.parametrize("policy", ["full", "chunked:3", "truncated:4/2"])
def test_nonlinearities_that_torch_has_not(nonlinearity: str, policy: str, variant: str, agree: Agree) -> None:
    layer = bptt.nn.RNN(4, 19, 2, nonlinearity=nonlinearity, dtype=torch.float64, gradient=policy)
    data = case(layer, T=7, B=5)
    narrow = Case(*(z.float() if isinstance(z, Tensor) else tuple(s.float() for s in z) for z in vars(data).values()))
    layer.kernel = "eager"
    expected = measure(layer, data).values()
    layer.kernel = "cpu"
    agree(measure(layer, data).values(), expected)
    agree(measure(layer.float(), narrow).values(), expected)
