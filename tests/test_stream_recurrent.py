"""`stream_gradients` of a layer of any cell is one backward pass over all steps, whatever is in memory at once."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves

import bptt
from bptt.nn import Recurrent

T, B, I, H = 23, 3, 4, 5
D = torch.float64


@pytest.fixture(autouse=True)
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as sqrt(T / alpha) asks for, also where their tape is small."""
    monkeypatch.setattr("bptt.nn._segmented_scan.SEGMENT_BYTES", 0)


class Leaky(nn.Module):
    """A cell with a pair of states, in a dict, that puts out another thing than its state."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.inner, self.rate = nn.Linear(inputs + H, H, dtype=D), nn.Parameter(torch.rand(H, dtype=D))

    def initial_state(self, batch: int) -> dict[str, Tensor]:
        return {"h": torch.zeros(batch, H, dtype=D), "slow": torch.ones(batch, H, dtype=D)}

    def forward(self, x: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        h = torch.tanh(self.inner(torch.cat([x, state["h"]], 1)))
        slow = self.rate * state["slow"] + (1 - self.rate) * h
        return h * slow, {"h": h, "slow": slow}


class OwnStart(nn.Module):
    """A cell that makes its own first state, of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.start = nn.GRUCell(I, H, dtype=D), nn.Parameter(torch.randn(H, dtype=D))

    def forward(self, x: Tensor, h: Tensor | None = None) -> Tensor:
        return self.cell(x, self.start.expand(len(x), H) if h is None else h)


LAYERS: dict[str, Callable[..., Recurrent]] = {
    "lstm": lambda **kw: Recurrent(nn.LSTMCell(I, H, dtype=D), **kw),
    "two layers": lambda **kw: Recurrent(lambda n: nn.GRUCell(H if n else I, H, dtype=D), 2, **kw),
    "leaky": lambda **kw: Recurrent(Leaky(I), **kw),
    "learned": lambda **kw: Recurrent(nn.LSTMCell(I, H, dtype=D), learn_initial_state=True, **kw),
    "own start": lambda **kw: Recurrent(OwnStart(), **kw),
}


def case(layer: Recurrent, batch_first: bool = False) -> tuple[Tensor, nn.Linear, Callable[..., Tensor]]:
    x, weights = torch.randn(T, B, I, dtype=D), torch.randn(T, B, 2, dtype=D)
    head = nn.Linear(H, 2, dtype=D)

    def loss(steps: slice, y: Tensor) -> Tensor:
        return (head(y).tanh() * weights[steps]).sum()

    return x, head, loss


def agree(found: Any, layer: Recurrent, head: nn.Linear, value: Tensor, final: Any, hx: Any = None) -> None:
    given = [] if hx is None else tree_leaves(hx)
    named = dict(layer.named_parameters())
    grads = torch.autograd.grad(value, [*named.values(), *head.parameters(), *given], materialize_grads=True)
    assert found.loss == pytest.approx(value.item())
    n, m = len(named), len(named) + 2
    assert_close(found.parameters, dict(zip(named, grads[:n], strict=True)), rtol=1e-9, atol=1e-10)
    assert_close(list(found.wrt), list(grads[n:m]), rtol=1e-9, atol=1e-10)
    assert_close(tree_leaves(found.final), [t.detach() for t in tree_leaves(final)])
    if given:
        assert_close(tree_leaves(found.hx), list(grads[m:]), rtol=1e-9, atol=1e-10)
    assert all(p.grad is None for p in (*layer.parameters(), *head.parameters()))


@pytest.mark.parametrize("memory", ["checkpoints", "checkpoints:bytes=20000"])
@pytest.mark.parametrize("policy", ["full", "chunked:6", "truncated:9", "truncated:6/4", "randomized:0.7"])
@pytest.mark.parametrize("net", LAYERS)
def test_the_same_gradients(net: str, policy: str, memory: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[net](gradient=policy)
    x, head, loss = case(layer)
    torch.manual_seed(5)
    y, final = layer(x)
    torch.manual_seed(5)
    found = bptt.stream_gradients(layer, x.numpy(), loss, wrt=head.parameters(), memory=memory)
    agree(found, layer, head, loss(slice(0, T), y), final)


@pytest.mark.parametrize("kernel", ["auto", "replay"])
@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("policy", ["full", "chunked:6", "truncated:6/4"])
@pytest.mark.parametrize("net", ["lstm", "two layers", "leaky"])
def test_states_and_resets(net: str, policy: str, pieces: bool, kernel: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[net](gradient=policy, kernel=kernel, batch_first=True)
    x, head, loss = case(layer)
    resets = torch.rand(T, B) < 0.2
    hx = torch.utils._pytree.tree_map(lambda t: torch.randn_like(t).requires_grad_(), layer(x.transpose(0, 1))[1])
    y, final = layer(x.transpose(0, 1), hx, resets=resets.t())
    given = [piece.numpy() for piece in x.split([1, 20, 2])] if pieces else x
    found = bptt.stream_gradients(layer, given, loss, hx, wrt=head.parameters(), resets=resets.numpy())
    agree(found, layer, head, loss(slice(0, T), y.transpose(0, 1)), final, hx)


@pytest.mark.parametrize(
    ("policy", "pieces", "each"),
    [("full", True, False), ("chunked:6", False, True), ("truncated:6/4", True, True), ("truncated:6/4", False, False)],
)
@pytest.mark.parametrize("net", ["lstm", "two layers"])
def test_a_state_to_reset_to(net: str, policy: str, pieces: bool, each: bool) -> None:
    torch.manual_seed(0)
    layer = LAYERS[net](gradient=policy)
    x, _, loss = case(layer)
    resets = torch.rand(T, B) < 0.2
    state = torch.utils._pytree.tree_map(
        lambda t: torch.randn(*((T,) if each else ()), *t.shape, dtype=D).requires_grad_(), layer(x)[1]
    )
    y, _ = layer(x, resets=resets, reset_state=state)
    leaves = tree_leaves(state)
    expected = torch.autograd.grad(loss(slice(0, T), y), [*leaves, *layer.parameters()])
    given = x.split(7) if pieces else x
    found = bptt.stream_gradients(layer, given, loss, resets=resets, reset_state=state)
    got = [*tree_leaves(found.reset_state), *found.parameters.values()]
    assert_close(got, list(expected), rtol=1e-9, atol=1e-10)


def test_the_gradient_of_a_first_state_that_is_not_given() -> None:
    """In the form of the states; of zeros."""
    torch.manual_seed(0)
    layer = LAYERS["lstm"]()
    x, _, loss = case(layer)
    hx = (torch.zeros(1, B, H, dtype=D, requires_grad=True), torch.zeros(1, B, H, dtype=D, requires_grad=True))
    expected = torch.autograd.grad(loss(slice(0, T), layer(x, hx)[0]), hx)
    assert_close(bptt.stream_gradients(layer, x, loss).hx, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("policy", ["full", "chunked:23", "truncated:6/4"])
def test_dropout_between_layers(policy: str) -> None:
    """Drawn for all steps at once, as by the layer."""
    torch.manual_seed(0)
    layer = LAYERS["two layers"](gradient=policy, dropout=0.4)
    x, head, loss = case(layer)
    layer(x)
    torch.manual_seed(5)
    y, final = layer(x)
    torch.manual_seed(5)
    found = bptt.stream_gradients(layer, x, loss, wrt=head.parameters())
    agree(found, layer, head, loss(slice(0, T), y), final)


def test_tokens_and_frozen_parameters(tmp_path: Any) -> None:
    torch.manual_seed(0)

    class Embedded(nn.Module):
        hidden_size = H

        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.cell = nn.Embedding(7, I), nn.GRUCell(I, H)

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            return self.cell(self.embedding(x), h)

    layer = Recurrent(Embedded().double())
    layer.cells[0].cell.bias_hh.requires_grad_(False)
    np.save(tmp_path / "x.npy", torch.randint(7, (T, B)).numpy())
    x = np.load(tmp_path / "x.npy", mmap_mode="r")
    found = bptt.stream_gradients(layer, x, lambda _, y: y.square().sum())
    layer(torch.from_numpy(np.array(x)))[0].square().sum().backward()
    assert_close(found.parameters, {n: p.grad for n, p in layer.named_parameters() if p.requires_grad})
    assert "cells.0.cell.bias_hh" not in found.parameters


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"layer": LAYERS["lstm"](reverse=True)}, ValueError, "layer must be one-directional"),
        ({"layer": Recurrent([nn.GRUCell(I, H), nn.GRUCell(I, H)], bidirectional=True)}, ValueError, "one-direct"),
        ({"x": 3}, TypeError, "x must have a length and slices of steps, or be an iterable of pieces: got int"),
        ({"x": torch.zeros(0, B, I)}, ValueError, "at least 1 step: got 0"),
        ({"x": iter([])}, ValueError, "at least 1 step: got 0"),
        ({"x": torch.zeros(T, I)}, ValueError, r"x must be \[T, B, ...\], time first"),
        ({"x": [torch.zeros(2, B, I), torch.zeros(2, 7, I)]}, ValueError, r"pieces \[n, 3, 4\] like the first"),
        ({"hx": torch.zeros(1, B, H)}, TypeError, "hx"),
        ({"resets": torch.zeros(T, B)}, TypeError, "resets must be bool"),
        ({"reset_state": torch.zeros(1, B, H)}, ValueError, "reset_state is what resets restart from"),
        ({"memory": "gates"}, ValueError, "memory must be Checkpoints"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {"layer": LAYERS["lstm"](), "x": torch.zeros(T, B, I), "loss": lambda _, y: y.sum()}
    with pytest.raises(error, match=message):
        bptt.stream_gradients(**({"memory": "checkpoints:steps=10"} | good | arguments))
