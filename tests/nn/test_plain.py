"""Plain calls: the short way gives the bits of the long one, is taken where it should be, and keeps no tensor."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import bptt
from bptt.kernels.whole import WholeWalks
from bptt.nn import layers

CELLS = ("RNN", "GRU", "LSTM")
POLICIES = ("full", "chunked:3", "truncated:4/4", "truncated:4/2")
SIZES = ((1, 2, 3, 5), (7, 1, 4, 3), (20, 3, 17, 33))


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each call, whether it was plain."""
    found: list[bool] = []
    plain = layers.plain

    def spy(*arguments: Any) -> Any:
        result = plain(*arguments)
        found.append(result is not None)
        return result

    monkeypatch.setattr(layers, "plain", spy)
    return found


def results(layer: Any, x: Tensor, hx: Any, asked: str, of: Any = None) -> list[Tensor]:
    """Outputs and gradients. asked: x, h (of the initial state), f (from the final state), e (from an expanded one).

    of: the layer whose parameters get gradients, if `layer` is another call of it.
    """
    x = x.clone().requires_grad_("x" in asked)
    states = () if hx is None else tuple(h.clone().requires_grad_("h" in asked) for h in hx)
    y, final = layer(x, None if hx is None else states if len(states) == 2 else states[0])
    outputs = [y, *(final if isinstance(final, tuple) else (final,))]
    end = outputs if "f" in asked else outputs[:1]
    torch.manual_seed(1)
    cotangents = [torch.ones(()).expand_as(o) if "e" in asked else torch.randn_like(o) for o in end]
    inputs = [t for t in (x, *states, *(of or layer).parameters()) if t.requires_grad]
    return [*(o.detach() for o in outputs), *torch.autograd.grad(end, inputs, cotangents)]


@pytest.mark.parametrize("asked", ["", "x", "xhf", "fe", "h"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("cell", CELLS)
def test_bits_of_the_long_way(cell: str, policy: str, asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for T, B, inputs, H in SIZES:
        for dtype, bias, memory in ((torch.float32, True, "gates"), (torch.float64, False, "states")):
            layer = getattr(bptt.nn, cell)(inputs, H, bias=bias, gradient=policy, memory=memory, dtype=dtype)
            x, hx = torch.randn(T, B, inputs, dtype=dtype), [torch.randn(1, B, H, dtype=dtype)] * (1 + (cell == "LSTM"))
            for state in (None, hx):
                short = results(layer, x, state, asked)
                with monkeypatch.context() as patch:
                    patch.setattr(layers, "plain", lambda *_: None)
                    long = results(layer, x, state, asked)
                for a, b in zip(short, long, strict=True):
                    assert torch.equal(a, b)
                    assert a.stride() == b.stride()


@pytest.mark.parametrize(("memory", "asked"), [("auto", "xhf"), ("auto", "fe"), ("checkpoints", "xhf")])
@pytest.mark.parametrize("policy", ["full", "chunked:3", "randomized:0.6"])
@pytest.mark.parametrize(("layers_of", "both"), [(1, False), (3, False), (2, True)])
@pytest.mark.parametrize("cell", CELLS)
def test_bits_of_nets(
    cell: str, layers_of: int, both: bool, policy: str, memory: str, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several layers and directions, factors, resets and checkpoints; the numbers that are drawn are the same."""
    options = {"num_layers": layers_of, "bidirectional": both, "gradient": policy, "memory": memory}
    for (T, B, inputs, H), dtype in zip(SIZES, (torch.float64, torch.float32, torch.float32), strict=True):
        layer = getattr(bptt.nn, cell)(inputs, H, dtype=dtype, **options)
        layer.bias_hh_l0.requires_grad_(False)
        x, first = torch.randn(T, B, inputs, dtype=dtype), torch.randn(layers_of * (1 + both), B, H, dtype=dtype)
        hx = [first] * (1 + (cell == "LSTM"))
        for resets in (None, torch.rand(T, B) < 0.3):
            found = []
            for way in (layers.plain, lambda *_: None):
                torch.manual_seed(0)
                with monkeypatch.context() as patch:
                    patch.setattr(layers, "plain", way)
                    with torch.no_grad():
                        y = layer(x, resets=resets)[0]
                    found.append([y, *results(partial(layer, resets=resets), x, hx, asked, layer)])
            for a, b in zip(*found, strict=True):
                assert torch.equal(a, b)
                assert a.stride() == b.stride()


def test_a_net_whose_graph_is_walked_twice_keeps_its_factors() -> None:
    """Once observed, which is the long way, and once not."""
    layer, x = bptt.nn.GRU(3, 4, gradient="randomized:0.5", num_layers=2), torch.randn(9, 2, 3)
    y, _ = layer(x, resets=torch.rand(9, 2) < 0.3)
    with FlopCounterMode(display=False):
        first = torch.autograd.grad(y.sum(), list(layer.parameters()), retain_graph=True)
    again = torch.autograd.grad(y.sum(), list(layer.parameters()))
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("cell", CELLS)
def test_which_calls_are_plain(cell: str, taken: list[bool]) -> None:
    x = torch.randn(5, 2, 3)
    make: Callable[..., Any] = getattr(bptt.nn, cell)
    with torch.no_grad():
        make(3, 4)(x)
    make(3, 4)(x)
    make(3, 4)(x[:, 0].contiguous())
    make(3, 4, batch_first=True)(x)
    with torch.no_grad():
        make(3, 4, memory="checkpoints")(x)
        make(3, 4, gradient="randomized:0.5")(x)
    make(3, 4, num_layers=2, dropout=0.5).eval()(x)
    make(3, 4, bidirectional=True)(x)
    make(3, 4, memory="checkpoints")(x)
    make(3, 4, gradient="randomized:0.5")(x)
    make(3, 4)(x, resets=torch.ones(5, 2, dtype=torch.bool))
    assert taken == [True] * 11
    taken.clear()
    make(3, 4, num_layers=2, dropout=0.5)(x)
    make(3, 4, num_layers=2, gradient="truncated:3")(x)
    make(3, 4, memory="checkpoints:steps=2")(x)
    make(3, 4, kernel="eager")(x)
    make(3, 4)(x.transpose(0, 1).contiguous().transpose(0, 1))
    make(3, 4, batch_first=True)(x, resets=torch.ones(5, 2, dtype=torch.bool))
    with torch.autocast("cpu"):
        make(3, 4)(x)
    assert taken == [False] * 7


@pytest.mark.parametrize("cell", CELLS)
def test_weights_are_read_at_every_call(cell: str, taken: list[bool]) -> None:
    """Whatever wrote them: an optimiser, load_state_dict, `.data`, which raises no version."""
    layer, other, x = getattr(bptt.nn, cell)(3, 4), getattr(bptt.nn, cell)(3, 4), torch.randn(5, 2, 3)
    for write in (
        lambda: layer.load_state_dict(other.state_dict()),
        lambda: [p.data.mul_(2) for p in layer.parameters()],
        lambda: [setattr(p, "data", p.data.clone() + 1) for p in layer.parameters()],
        lambda: layer.weight_hh_l0.data.zero_(),
        lambda: layer.to(torch.float64),
    ):
        before = layer(x.to(layer.weight_ih_l0.dtype))[0]
        write()
        after = layer(x.to(layer.weight_ih_l0.dtype))[0]
        fresh = getattr(bptt.nn, cell)(3, 4, kernel="eager", dtype=layer.weight_ih_l0.dtype)
        fresh.load_state_dict(layer.state_dict())
        assert not torch.equal(after.to(before.dtype), before)
        torch.testing.assert_close(after, fresh(x.to(after.dtype))[0])
    assert all(taken[::3])


@pytest.mark.parametrize("cell", CELLS)
def test_outputs_may_be_changed_in_place(cell: str) -> None:
    layer, x = getattr(bptt.nn, cell)(3, 4), torch.randn(5, 2, 3)
    expected = torch.autograd.grad(layer(x)[0].sum(), list(layer.parameters()))
    y, _ = layer(x)
    loss = y.sum()
    y.detach().zero_()
    for a, b in zip(torch.autograd.grad(loss, list(layer.parameters())), expected, strict=True):
        assert torch.equal(a, b)
    y, _ = layer(x)
    y.mul_(2)  # autograd records it
    for a, b in zip(torch.autograd.grad(y.sum(), list(layer.parameters())), expected, strict=True):
        torch.testing.assert_close(a, 2 * b)


@pytest.mark.parametrize("cell", CELLS)
def test_double_backward(cell: str) -> None:
    layer, x = getattr(bptt.nn, cell)(3, 4, dtype=torch.float64), torch.randn(4, 2, 3, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda x: layer(x)[0], (x.requires_grad_(),))


def test_nothing_of_a_call_is_kept() -> None:
    layer, x = bptt.nn.GRU(3, 4), torch.randn(5, 2, 3)
    y, h_n = layer(x)
    y.sum().backward()
    alive = [weakref.ref(t) for t in (x, y, h_n, *layer.parameters())]
    del layer, x, y, h_n
    gc.collect()
    assert [ref() for ref in alive] == [None] * len(alive)


def test_copies_and_pickles(taken: list[bool]) -> None:
    layer, x = bptt.nn.LSTM(3, 4), torch.randn(5, 2, 3)
    expected = layer(x)[0]
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(again(x)[0], expected)
    assert taken == [True] * 3


def test_weights_of_another_size_are_refused() -> None:
    layer = bptt.nn.GRU(3, 4)
    layer(torch.randn(5, 2, 3))
    layer.weight_hh_l0.data = torch.randn(12, 5)
    with pytest.raises(RuntimeError, match="sizes must fit together"):
        layer(torch.randn(5, 2, 3))


def test_scratch_memory_is_bounded() -> None:
    """The passes keep no tensor: what they hold are sizes, and the walks' columns, which `frames` bounds."""
    layer = bptt.nn.RNN(3, 4)
    layer(torch.randn(5, 2, 3))
    held = [o for o in gc.get_objects() if type(o) is WholeWalks]
    assert held
    assert not any(isinstance(value, Tensor) for passes in held for value in vars(passes).values())
