"""A reset separates sequences."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from reference import NETS, Case, Gradients, as_hx, as_tuple, build, case, measure, ours
from sweeps import RESETS, Agree, T, each_cell, each_net, some_policies
from torch import Tensor

import bptt
from bptt import Truncated


def pieces(resets: list[bool]) -> Iterator[tuple[int, int]]:
    """First and last step of each sequence of a lane."""
    starts = [0, *(t for t, reset in enumerate(resets) if reset and t > 0), len(resets)]
    for first, after in itertools.pairwise(starts):
        yield first, after - 1


def separately(layer: Any, data: Case, resets: Tensor) -> Gradients:
    """Each lane cut at its resets and each piece run alone."""
    D = 2 if layer.bidirectional else 1
    x = data.x.clone().requires_grad_()
    initial = tuple(z.clone().requires_grad_() for z in data.initial)
    ys, finals = [], []
    for b in range(x.shape[1]):
        lane: list[Tensor] = []
        final = [torch.zeros_like(z[:, b]) for z in initial]
        for first, last in pieces(resets[:, b].tolist()):
            enter = [torch.zeros_like(z[:, b]) for z in initial]
            for mine, z in zip(enter, initial, strict=True):
                if first == 0 and not resets[0, b]:
                    mine[0::D] = z[0::D, b]
                if last == len(x) - 1 and D == 2:
                    mine[1::D] = z[1::D, b]
            y, hx = layer(x[first : last + 1, b : b + 1], as_hx(z[:, None] for z in enter))
            lane.append(y)
            for mine, z in zip(final, as_tuple(hx), strict=True):
                if last == len(x) - 1:
                    mine[0::D] = z[0::D, 0]
                if first == 0 and D == 2:
                    mine[1::D] = z[1::D, 0]
        ys.append(torch.cat(lane))
        finals.append(final)
    y = torch.cat(ys, 1)
    final = tuple(torch.stack(z, 1) for z in zip(*finals, strict=True))
    parameters = dict(layer.named_parameters())
    grads = torch.autograd.grad(
        [y, *final], [*parameters.values(), x, *initial], [data.dy, *data.dfinal], materialize_grads=True
    )
    n = len(parameters)
    return Gradients(y, final, dict(zip(parameters, grads, strict=False)), grads[n], grads[n + 1 :])


@each_cell
@each_net
def test_resets_equal_separate_sequences(cell: str, net: str, agree: Agree) -> None:
    theirs = build(cell, **NETS[net])
    data = case(theirs, T=T, B=4)
    agree(measure(ours(theirs), data, resets=RESETS).values(), separately(theirs, data, RESETS).values())


@each_cell
@each_net
@pytest.mark.parametrize("window", [1, 2, 4])
def test_resets_equal_separate_sequences_truncated(cell: str, net: str, window: int, agree: Agree) -> None:
    """With one loss a block, where the blocks begin does not depend on where the sequence does."""
    mine = ours(build(cell, **NETS[net]), gradient=Truncated(window))
    data = case(mine, T=T, B=4)
    agree(measure(mine, data, resets=RESETS).values(), separately(mine, data, RESETS).values())


@each_cell
@pytest.mark.parametrize("net", ["one", "bi_two"])
def test_resets_layouts(cell: str, net: str, agree: Agree) -> None:
    """Time first `[T, B]`, batch first `[B, T]`, unbatched `[T]`, not contiguous: the same result."""
    theirs = build(cell, **NETS[net])
    data = case(theirs, T=T, B=4)
    expected = measure(ours(theirs), data, resets=RESETS)
    first = build(cell, batch_first=True, **NETS[net])
    agree(measure(ours(first), data, resets=RESETS.T.contiguous()).values(), expected.values())
    agree(measure(ours(first), data, resets=RESETS.T).values(), expected.values())
    for layer in (ours(theirs), ours(first)):
        y, final = layer(data.x[:, 2], as_hx(z[:, 2] for z in data.initial), resets=RESETS[:, 2])
        agree([y, as_tuple(final)], [expected.y[:, 2], tuple(z[:, 2] for z in expected.final)])


def test_no_resets_change_nothing(agree: Agree) -> None:
    theirs = build("lstm", num_layers=2, bidirectional=True)
    data = case(theirs, T=T)
    for policy in some_policies("bi_two", B=3):
        mine = ours(theirs, gradient=policy)
        agree(measure(mine, data, resets=torch.zeros(T, 3, dtype=torch.bool)).values(), measure(mine, data).values())


def test_a_reset_stops_nan_and_infinity(agree: Agree) -> None:
    """A state that overflowed is replaced by zero, not multiplied by it: nothing of it crosses, either way."""
    theirs = build("relu", I=2, H=3)
    data = case(theirs, T=T, B=1)
    x = data.x.clone()
    x[2] = float("inf")
    resets = torch.zeros(T, 1, dtype=torch.bool)
    resets[3] = True
    y, _ = ours(theirs)(x, resets=resets)
    expected, _ = theirs(x[3:])
    agree(y[3:], expected)


@pytest.mark.parametrize("net", ["one", "two", "bi_two"])
@pytest.mark.parametrize("memory", ["gates", "states", "checkpoints:steps=3"])
@pytest.mark.parametrize("kernel", ["cpu", "eager"])
def test_resets_may_be_written_to_after_the_call(net: str, memory: str, kernel: str, agree: Agree) -> None:
    """An environment's buffer, used for the next rollout before backward; also by NumPy, whom no version tells of."""
    for form in ("plain", "batch_first", "unbatched"):
        theirs = build("gru", **NETS[net], batch_first=form == "batch_first")
        layer = ours(theirs, gradient="truncated:3/2", memory=memory, kernel=kernel)
        x = case(theirs).x
        x = x.transpose(0, 1) if form == "batch_first" else x[:, 0] if form == "unbatched" else x
        found = []
        for reused in (False, True):
            array = np.random.default_rng(2).random(x.shape[:-1]) < 0.4
            y, _ = layer(x, resets=torch.from_numpy(array))
            if reused:
                array[:] = False
            found.append(torch.autograd.grad(y.square().sum(), list(layer.parameters())))
        agree(found[1], found[0], tolerance=0)


def test_resets_may_be_written_to_by_the_loss_of_a_stream(agree: Agree) -> None:
    layer, found = ours(build("gru")), []
    x = torch.randn(11, 3, 5, dtype=torch.float64)
    for policy in ("full", "chunked:4", "truncated:3"):
        for reused in (False, True):
            resets = torch.rand(11, 3, generator=torch.Generator().manual_seed(1)) < 0.4

            def loss(steps: slice, y: Tensor, resets: Tensor = resets, reused: bool = reused) -> Tensor:
                if reused:
                    resets[steps] = False
                return y.square().sum()

            found.append(bptt.stream_gradients(layer, x, loss, resets=resets, gradient=policy).parameters)
        agree(found[-1], found[-2], tolerance=0)
