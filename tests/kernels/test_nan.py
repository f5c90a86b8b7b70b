"""NaN and infinity go where they go in the eager kernel, no further and no less far."""

from collections.abc import Callable
from itertools import cycle
from typing import Any

import pytest
import torch
from reference import CELLS, Case, Gradients, as_hx, as_tuple, build, case, measure, ours
from torch import Tensor

from bptt.kernels import cpu

Agree = Callable[..., None]
Use = Callable[[str], None]

NAN, INF = float("nan"), float("inf")

each_cell = pytest.mark.parametrize("cell", CELLS)

POLICIES = ["full", "chunked:3", "truncated:3", "truncated:4/3"]

PLACES: dict[str, Callable[[Any, Case], None]] = {
    "x at one step": lambda layer, data: data.x[4, 1, 2].fill_(NAN),
    "x at the last step": lambda layer, data: data.x[-1, 0, 0].fill_(NAN),
    "infinite x": lambda layer, data: data.x[2, 1, 0].fill_(INF),
    "initial h": lambda layer, data: data.initial[0][0, 2, 1].fill_(NAN),
    "initial state": lambda layer, data: data.initial[-1][0, 0, 0].fill_(-INF),
    "dy at one step": lambda layer, data: data.dy[3, 2, 1].fill_(NAN),
    "infinite dy": lambda layer, data: data.dy[5, 0, 0].fill_(-INF),
    "final state": lambda layer, data: data.dfinal[-1][0, 1, 0].fill_(NAN),
    "a recurrent weight": lambda layer, data: layer.weight_hh_l0.data[3, 0].fill_(INF),
    "an input weight": lambda layer, data: layer.weight_ih_l0.data[-1, 0].fill_(NAN),
    "a bias": lambda layer, data: layer.bias_hh_l0.data[1].fill_(-INF),
}


def compare(actual: dict[str, Any], expected: dict[str, Any], where: str) -> None:
    """Equal, NaN for NaN and infinity for infinity."""
    for name, wanted in expected.items():
        found = actual[name]
        if isinstance(wanted, Tensor):
            finite = wanted[wanted.isfinite()]
            largest = finite.abs().max().item() if len(finite) else 0.0
            torch.testing.assert_close(
                found, wanted, rtol=1e-10, atol=1e-10 * largest, equal_nan=True,
                msg=lambda text, name=name: f"{where} {name}: {text}",
            )  # fmt: skip
        elif isinstance(wanted, dict):
            compare(found, wanted, where)
        else:
            compare(dict(enumerate(found)), dict(enumerate(wanted)), f"{where} {name}")


@each_cell
@pytest.mark.parametrize("place", PLACES)
def test_not_finite(cell: str, place: str, use: Use) -> None:
    """One number that is not finite, in an input, a weight or a cotangent, under every policy.

    The variants take turns: each meets every two of cell, place and (layers, policy, resets), not every three. T is a
    multiple of every block: the eager kernel walks over what lies past the end of a shorter last block, times zero,
    and zero times infinity is NaN.
    """
    resets = torch.zeros(6, 3, dtype=torch.bool)
    resets[5, 1] = resets[1, 2] = True
    turns = cycle(cpu.variants())
    for _ in range(list(CELLS).index(cell) + list(PLACES).index(place)):
        next(turns)
    for layers, policies in ((1, POLICIES[2:]), (2, POLICIES)):
        theirs = build(cell, 3, 5, num_layers=layers)
        data = case(theirs, T=6, B=3)
        PLACES[place](theirs, data)
        for policy in policies:
            for kw in ({}, {"resets": resets}):
                expected = measure(ours(theirs, gradient=policy, kernel="eager"), data, **kw).values()
                variant = next(turns)
                use(variant)
                actual = measure(ours(theirs, gradient=policy, kernel="cpu"), data, **kw).values()
                compare(actual, expected, f"{variant}, {layers} layers, {policy} {kw}")


AS_TORCH = [(cell, place) for cell in CELLS for place in PLACES if (cell, place) != ("gru", "infinite dy")]
"""torch's GRU multiplies dy by other factors first."""


@pytest.mark.parametrize(("cell", "place"), AS_TORCH)
def test_not_finite_is_as_in_torch(cell: str, place: str, use: Use) -> None:
    """The full gradient, of sequences of equal and of unequal lengths."""
    theirs = build(cell, 3, 5, num_layers=2, bidirectional=True)
    data = case(theirs, T=7, B=3)
    PLACES[place](theirs, data)
    for kw in ({}, {"packed": (7, 5, 6)}):
        expected = measure(theirs, data, **kw).values()
        for variant in cpu.variants():
            use(variant)
            compare(measure(ours(theirs, kernel="cpu"), data, **kw).values(), expected, f"{variant} {kw}")


@pytest.mark.parametrize(("cell", "place"), AS_TORCH)
def test_not_finite_in_chunks_is_as_in_torch(cell: str, place: str) -> None:
    """Chunks, the last one shorter, as torch's layer on one after the other, the state detached."""
    theirs = build(cell, 3, 5)
    data = case(theirs, T=7, B=3)
    PLACES[place](theirs, data)
    actual = measure(ours(theirs, gradient="chunked:3", kernel="cpu"), data).values()
    x = data.x.clone().requires_grad_()
    initial = tuple(z.clone().requires_grad_() for z in data.initial)
    state, ys = initial, []
    for t in range(0, 7, 3):
        y, hx = theirs(x[t : t + 3], as_hx(state if t == 0 else tuple(z.detach() for z in state)))
        state = as_tuple(hx)
        ys.append(y)
    y = torch.cat(ys)
    parameters = dict(theirs.named_parameters())
    grads = torch.autograd.grad([y, *state], [*parameters.values(), x, *initial], [data.dy, *data.dfinal])
    n = len(parameters)
    found = Gradients(y, state, dict(zip(parameters, grads, strict=False)), grads[n], grads[n + 1 :])
    compare(actual, found.values(), place)


@each_cell
@pytest.mark.parametrize("policy", ["full", "truncated:3"])
def test_a_reset_stops_them(cell: str, policy: str, variant: str, agree: Agree) -> None:
    """What lies on the other side of a reset is as if there were nothing on this side, forward and back."""
    theirs = build(cell, 3, 5)
    layer, data = ours(theirs, gradient=policy, kernel="cpu"), case(theirs, T=7, B=2)
    resets = torch.zeros(7, 2, dtype=torch.bool)
    resets[4] = True
    data.x[2, 0] = NAN
    broken = measure(layer, data, resets=resets)
    data.x[2, 0] = 0
    sound = measure(layer, data, resets=resets)
    assert broken.y[2:4, 0].isnan().all()
    agree(broken.y[4:], sound.y[4:], tolerance=0)
    agree(broken.final, sound.final, tolerance=0)
    agree(broken.x[4:], sound.x[4:], tolerance=0)
    agree(broken.x[:, 1], sound.x[:, 1], tolerance=0)

    data.dy[5, 0] = NAN
    broken = measure(layer, data, resets=resets)
    assert broken.x[5, 0].isnan().all()
    agree(broken.x[:4], sound.x[:4], tolerance=0)
    agree(broken.initial, sound.initial, tolerance=0)


@each_cell
def test_a_cut_stops_them(cell: str, variant: str, agree: Agree) -> None:
    """Nothing passes a closed edge of a policy, not even NaN."""
    theirs = build(cell, 3, 5)
    layer, data = ours(theirs, gradient="chunked:3", kernel="cpu"), case(theirs, T=7, B=2)
    sound = measure(layer, data)
    data.dy[4, 0] = NAN
    broken = measure(layer, data)
    assert broken.x[3:5, 0].isnan().all()
    for untouched in (slice(0, 3), slice(5, 7)):
        agree(broken.x[untouched], sound.x[untouched], tolerance=0)
    agree(broken.initial, sound.initial, tolerance=0)
