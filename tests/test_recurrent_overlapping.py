"""Bidirectional stacks of any cell under blocks that overlap: by autograd of each block's span alone."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import bptt

T, B, I, H = 11, 3, 4, 5
D = torch.float64


class Rated(nn.Module):
    """A GRU cell whose rows are independent."""

    def __init__(self, n: int, start: bool = False) -> None:
        super().__init__()
        self.cell = nn.GRUCell(2 * H if n else I, H, dtype=D)

    def initial_state(self, batch: int) -> Tensor:
        return torch.zeros(batch, H, dtype=D)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return self.cell(x, h)


class Coupled(Rated):
    """One whose rows are not."""

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        h = self.cell(x, h)
        return h - 0.3 * h.mean(0, keepdim=True)


class PerLane(Rated):
    """One with a tensor for each lane."""

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.gain = torch.rand(B, H, dtype=D)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return self.gain[torch.arange(len(h)) % B] * self.cell(x, h)


class OwnStart(nn.Module):
    """A cell that makes its own first state, of a parameter."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.cell, self.start = nn.GRUCell(2 * H if n else I, H, dtype=D), nn.Parameter(torch.randn(H, dtype=D))

    def forward(self, x: Tensor, h: Tensor | None = None) -> Tensor:
        return self.cell(x, self.start.expand(len(x), H) if h is None else h)


CELLS: dict[str, Callable[[int], nn.Module]] = {
    "rated": Rated,
    "coupled": Coupled,
    "per lane": PerLane,
    "own start": OwnStart,
}


def stack(
    cells: Sequence[nn.Module], x: Tensor, low: int, high: int, states: Sequence[Any], masks: Sequence[Tensor]
) -> tuple[Tensor, list[list[Tensor]]]:
    """(y of the steps low to high, of each cell the states after its own steps), by plain loops."""
    y, after = x[low : high + 1], []
    for k, cell in enumerate(cells):
        d = k % 2
        if d == 0:
            below = y if not masks or k == 0 else y * masks[k // 2 - 1][low : high + 1]
            halves = []
        h, out = states[k], []
        for t in reversed(range(len(below))) if d else range(len(below)):
            h = cell(below[t]) if h is None else cell(below[t], h)
            out.append(h)
        after.append(out)
        halves.append(torch.stack(out[::-1] if d else out))
        if d:
            y = torch.cat(halves, 2)
    return y, after


def by_span(
    layer: bptt.nn.Recurrent,
    x: Tensor,
    first: Sequence[Any],
    window: int,
    every: int,
    dy: Tensor,
    dfinal: Sequence[Tensor],
    wanted: Sequence[Tensor],
    masks: Sequence[Tensor] = (),
) -> list[Tensor]:
    """The gradients by their definition: a block of one half's losses, in that direction's own time, and its span."""
    cells = list(layer.cells)
    with torch.no_grad():
        _, whole = stack(cells, x, 0, T - 1, first, masks)
    total = [torch.zeros_like(t) for t in wanted]
    for source in (0, 1):
        for a in range(0, T, every):
            b = min(a + every, T) - 1
            span = max(0, b - window + 1), min(T - 1, a + window - 1)
            low, high = span if source == 0 else (T - 1 - span[1], T - 1 - span[0])
            begins = [T - 1 - high if k % 2 else low for k in range(len(cells))]
            states = [f if s == 0 else w[s - 1] for f, w, s in zip(first, whole, begins, strict=True)]
            y, after = stack(cells, x, low, high, states, masks)
            steps = slice(a - low, b - low + 1) if source == 0 else slice(T - 1 - b - low, T - a - low)
            part = slice(source * H, (source + 1) * H)
            loss = (y[steps, :, part] * dy[low:][steps, :, part]).sum()
            if b == T - 1:
                loss = loss + sum((after[k][-1] * dfinal[k]).sum() for k in range(source, len(cells), 2))
            for whole_grad, grad in zip(total, torch.autograd.grad(loss, wanted, allow_unused=True), strict=True):
                whole_grad += 0 if grad is None else grad
    return total


@pytest.mark.parametrize(
    ("name", "policy", "kernel"),
    [
        ("rated", "truncated:4", "auto"),
        ("rated", "truncated:5/3", "replay"),
        ("rated", "truncated:4/4", "auto"),
        ("rated", "truncated:9/2", "auto"),
        ("coupled", "truncated:4", "replay"),
        ("coupled", "truncated:5/3", "auto"),
        ("coupled", "truncated:9/2", "replay"),
        ("per lane", "truncated:4/4", "auto"),
        ("per lane", "truncated:5/3", "replay"),
        ("per lane", "truncated:9/2", "auto"),
        ("own start", "truncated:4", "auto"),
        ("own start", "truncated:4/4", "replay"),
        ("own start", "truncated:5/3", "auto"),
        ("own start", "truncated:9/2", "replay"),
    ],
)
def test_by_definition(name: str, policy: str, kernel: str) -> None:
    torch.manual_seed(0)
    layer = bptt.nn.Recurrent(
        lambda n: CELLS[name](n), 3 if name == "rated" else 2, bidirectional=True, gradient=policy, kernel=kernel
    )
    K = len(layer.cells)
    x = torch.randn(T, B, I, dtype=D, requires_grad=True)
    hx = None if name == "own start" else torch.randn(K, B, H, dtype=D, requires_grad=True)
    dy, dfinal = torch.randn(T, B, 2 * H, dtype=D), torch.randn(K, B, H, dtype=D)
    wanted = [x, *layer.parameters(), *(() if hx is None else (hx,))]
    first = [None] * K if hx is None else list(hx.unbind())
    reach = bptt.policies.parse(policy)
    expected = by_span(layer, x, first, reach.window, reach.every, dy, dfinal.unbind(), wanted)
    y, final = layer(x, hx)
    grads = torch.autograd.grad([y, final], wanted, [dy, dfinal])
    assert_close(list(grads), expected, rtol=1e-9, atol=1e-10)
    with torch.no_grad():
        assert_close(y, layer(x, hx)[0])


def test_dropout_between_the_layers() -> None:
    torch.manual_seed(0)
    layer = bptt.nn.Recurrent(lambda n: Rated(n), 2, bidirectional=True, gradient="truncated:4/2", dropout=0.4)
    x, hx = torch.randn(T, B, I, dtype=D, requires_grad=True), torch.randn(4, B, H, dtype=D)
    dy, wanted = torch.randn(T, B, 2 * H, dtype=D), [x, *layer.parameters()]
    layer(x, hx)
    torch.manual_seed(3)
    y, _ = layer(x, hx)
    torch.manual_seed(3)
    mask = nn.functional.dropout(torch.ones(T, B, 2 * H, dtype=D), 0.4)
    expected = by_span(layer, x, list(hx), 4, 2, dy, [torch.zeros(B, H, dtype=D)] * 4, wanted, [mask])
    assert_close(list(torch.autograd.grad(y, wanted, dy)), expected, rtol=1e-9, atol=1e-10)


def test_derivatives_of_the_second_order() -> None:
    """Of the same graph, by both ways to run the blocks."""
    torch.manual_seed(0)
    layer = bptt.nn.Recurrent(lambda n: Rated(n), 2, bidirectional=True, gradient="truncated:4/2")
    x, found = torch.randn(T, B, I, dtype=D, requires_grad=True), []
    for kernel in ("auto", "replay"):
        layer.kernel = kernel
        grads = torch.autograd.grad(layer(x)[0].square().sum(), [x, *layer.parameters()], create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in grads), [x, *layer.parameters()]))
    assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)
