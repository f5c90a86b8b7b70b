"""Modes and profilers see a layer by the names of its operators, and count what it does."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import bptt

T, B, I, H = 12, 3, 5, 7
GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}

each_memory = pytest.mark.parametrize("memory", ["gates", "checkpoints:steps=4"])


def counted(layer: Any, x: Tensor, **call: Any) -> tuple[int, int]:
    """The operations of forward and of backward."""
    with FlopCounterMode(display=False) as counter:
        y, _ = layer(x, **call)
        forward = counter.get_total_flops()
        y.sum().backward()
    assert set(counter.get_flop_counts()["Global"]) == {torch.ops.bptt.stack_forward, torch.ops.bptt.stack_backward}
    return forward, counter.get_total_flops() - forward


@pytest.mark.parametrize("cell", GATES)
def test_the_products_are_counted(cell: str) -> None:
    """2 M N K each: forward the input and the recurrent product, backward twice that."""
    x = torch.randn(T, B, I, requires_grad=True)
    one = 2 * T * B * GATES[cell] * H * (I + H)
    assert counted(getattr(bptt.nn, cell)(I, H), x) == (one, 2 * one)
    twice = one + 2 * T * B * GATES[cell] * H * (H + H)
    assert counted(getattr(bptt.nn, cell)(I, H, num_layers=2), x) == (twice, 2 * twice)
    both = 2 * one
    assert counted(getattr(bptt.nn, cell)(I, H, bidirectional=True), x) == (both, 2 * both)


def test_what_is_not_asked_for_is_not_counted() -> None:
    layer = bptt.nn.LSTM(I, H)
    layer.weight_ih_l0.requires_grad_(False)
    recurrent = 2 * T * B * 4 * H * H
    assert counted(layer, torch.randn(T, B, I))[1] == 2 * recurrent


def test_a_projection_is_counted() -> None:
    P = 2
    x = torch.randn(T, B, I, requires_grad=True)
    one = 2 * T * B * (4 * H * (I + P) + P * H)
    assert counted(bptt.nn.LSTM(I, H, proj_size=P), x) == (one, 2 * one)


@pytest.mark.parametrize(
    ("gradient", "steps"),
    [
        ("full", T),
        ("chunked:4", T),
        ("truncated:4/4", T),
        ("truncated:4/2", 4 * 6 - 2),
        ("truncated:3", 3 * 12 - 3),
        ("truncated:40", T),
    ],
)
def test_a_sweep_counts_the_steps_of_all_its_windows(gradient: str, steps: int) -> None:
    layer, x = bptt.nn.GRU(I, H, gradient=gradient), torch.randn(T, B, I)
    weights = 2 * T * B * 3 * H * (I + H)
    assert counted(layer, x)[1] == weights + 2 * steps * B * 3 * H * H


def test_what_is_run_again_is_counted() -> None:
    x = torch.randn(T, B, I, requires_grad=True)
    one = 2 * T * B * 4 * H * (I + H)
    assert counted(bptt.nn.LSTM(I, H, memory="states"), x) == (one, 3 * one)
    for kind in ({}, {"bidirectional": True}):
        forward, backward = counted(bptt.nn.LSTM(I, H, memory="checkpoints:steps=4", **kind), x)
        assert backward == 3 * forward  # each segment once more, with its tape
    forward, backward = counted(
        bptt.nn.LSTM(I, H, 2, bidirectional=True, memory="checkpoints:steps=4", gradient="truncated:4/2"), x
    )
    assert backward > 3 * forward  # a segment once more for every group of blocks


def test_padding_is_not_counted() -> None:
    lengths = [12, 4, 1]
    x = nn.utils.rnn.pack_padded_sequence(torch.randn(T, B, I), torch.tensor(lengths))
    with FlopCounterMode(display=False) as counter:
        bptt.nn.GRU(I, H)(x)
    assert counter.get_total_flops() == 2 * sum(lengths) * 3 * H * (I + H)


@each_memory
def test_either_half_alone_is_counted(memory: str) -> None:
    layer, x = bptt.nn.GRU(I, H, num_layers=2, memory=memory), torch.randn(T, B, I, requires_grad=True)
    expected = counted(layer, x)
    with FlopCounterMode(display=False) as ahead:
        y, _ = layer(x)
    y.sum().backward()
    y, _ = layer(x)
    with FlopCounterMode(display=False) as back:
        y.sum().backward()
    assert (ahead.get_total_flops(), back.get_total_flops()) == expected


class Seen(TorchDispatchMode):
    """Any mode of the user's."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("memory", ["auto", "states", "checkpoints:steps=4", "checkpoints:bytes=80000"])
@pytest.mark.parametrize("gradient", ["full", "chunked:3", "truncated:4/2"])
@pytest.mark.parametrize("kind", [{}, {"bidirectional": True}, {"batch_first": True, "dropout": 0.3}])
def test_a_mode_changes_no_number(kind: dict[str, Any], gradient: str, memory: str) -> None:
    """Whatever of a call it sees: all of it, forward alone, backward alone."""
    layer = bptt.nn.LSTM(I, H, num_layers=2, gradient=gradient, memory=memory, dtype=torch.float64, **kind)

    def gradients(ahead: bool, back: bool) -> tuple[Tensor, ...]:
        torch.manual_seed(5)
        x = torch.randn(T, T, I, dtype=torch.float64, requires_grad=True)
        with Seen() if ahead else torch.enable_grad():
            y, (h, c) = layer(x)
            loss = y.square().sum() + h.sum() + c.square().sum()
        with Seen() if back else torch.enable_grad():
            return (y, h, c, *torch.autograd.grad(loss, [x, *layer.parameters()]))

    expected = gradients(ahead=False, back=False)
    for ahead, back in ((True, True), (True, False), (False, True)):
        torch.testing.assert_close(gradients(ahead, back), expected, rtol=0, atol=0)


@each_memory
@pytest.mark.parametrize("kind", [{}, {"bidirectional": True}])
def test_a_profiler_shows_the_operators(kind: dict[str, Any], memory: str) -> None:
    layer, x = bptt.nn.GRU(I, H, memory=memory, **kind), torch.randn(T, B, I)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer(x)[0].sum().backward()
        with torch.no_grad():
            layer(x)
    counts = {event.key: event.count for event in profile.key_averages() if event.key.startswith("bptt::")}
    assert counts == {"bptt::stack_forward": 2, "bptt::stack_backward": 1}


def test_a_profiler_shows_a_scan() -> None:
    w = torch.ones((), requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        bptt.scan(lambda c, x: (c * w + x, c), torch.zeros(()), torch.ones(4))[0].backward()
    counts = {event.key: event.count for event in profile.key_averages() if event.key.startswith("bptt::")}
    assert counts == {"bptt::scan_steps": 1, "bptt::scan_forward": 1, "bptt::scan_backward": 1}
