"""Resets of a scan, and of a Recurrent, to a state that is given, and the gradient into it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bptt
from bptt import scan

T, B, F, H = 10, 3, 2, 4
DOUBLE = torch.float64
POLICIES = ("full", "chunked:3", "truncated:4", "truncated:5/2")
RESETS = torch.zeros(T, B, dtype=torch.bool)
RESETS[0, 0] = RESETS[3, 1] = RESETS[4, 1] = RESETS[7] = True


def rows(*sizes: int) -> Tensor:
    return torch.randn(*sizes, dtype=DOUBLE, requires_grad=True)


def posed(each: bool) -> tuple[Any, Any, Any, Any, Any]:
    """(step, layer, carry, xs, reset_state) of an LSTM: a layer is the reference. each: a state for each step."""
    layer = bptt.nn.LSTM(F, H).double()
    cell = nn.LSTMCell(F, H, dtype=DOUBLE)
    with torch.no_grad():
        for mine, theirs in zip(cell.parameters(), layer.parameters(), strict=True):
            mine.copy_(theirs)
    size = (T, B, H) if each else (B, H)

    def step(state: Any, x: Tensor) -> tuple[Any, Tensor]:
        h, c = cell(x, state)
        return (h, c), h

    return (step, cell), layer, (rows(B, H), rows(B, H)), rows(T, B, F), (rows(*size), rows(*size))


def gradients(y: Tensor, final: Any, inputs: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y.square().sum() + sum(f.sin().sum() for f in final), inputs)


@pytest.mark.parametrize("kernel", ["interpreter", "eager", "replay"])
@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_scan_gives_what_a_layer_gives(policy: str, each: bool, kernel: str) -> None:
    (step, cell), layer, carry, xs, state = posed(each)
    layer.gradient = policy
    dim = 1 if each else 0
    y, final = layer(
        xs, tuple(c[None] for c in carry), resets=RESETS, reset_state=tuple(s.unsqueeze(dim) for s in state)
    )
    expected = gradients(y, final, (*carry, xs, *state, *layer.parameters()))
    last, ys = scan(step, carry, xs, resets=RESETS, reset_state=state, gradient=policy, kernel=kernel)
    torch.testing.assert_close(ys, y)
    found = gradients(ys, last, (*carry, xs, *state, *cell.parameters()))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("memory", ["states", "checkpoints:steps=3"])
def test_every_memory(memory: str) -> None:
    (step, _), _, carry, xs, state = posed(True)
    results = []
    for kept in ("auto", memory):
        last, ys = scan(step, carry, xs, resets=RESETS, reset_state=state, gradient="truncated:4", memory=kept)
        results.append((ys, *gradients(ys, last, (*carry, xs, *state))))
    torch.testing.assert_close(*results)


def test_random_factors_do_not_weigh_the_gradient_into_the_state() -> None:
    (step, _), layer, carry, xs, state = posed(False)
    state = tuple(s.detach().requires_grad_() for s in state)
    found = []
    for kernel in ("eager", "replay"):
        policy = bptt.Randomized(0.5, generator=torch.Generator().manual_seed(1))
        last, ys = scan(step, carry, xs, resets=RESETS, reset_state=state, gradient=policy, kernel=kernel)
        found.append(gradients(ys, last, (*carry, xs, *state)))
    torch.testing.assert_close(*found)
    layer.gradient = bptt.Randomized(0.5, generator=torch.Generator().manual_seed(1))
    y, final = layer(xs, tuple(c[None] for c in carry), resets=RESETS, reset_state=tuple(s[None] for s in state))
    torch.testing.assert_close(found[0], gradients(y, final, (*carry, xs, *state)))


def test_second_derivatives() -> None:
    step = lambda h, x: (n := torch.tanh(h * w + x), n)  # noqa: E731
    w, h, state, xs = rows(H), rows(B, H), rows(B, H), rows(T, B, H)
    found = []
    for reset in (True, False):
        if reset:
            ys = scan(step, h, xs, resets=RESETS, reset_state=state)[1]
        else:
            c, out = h, []
            for x, mask in zip(xs, RESETS, strict=True):
                c, y = step(torch.where(mask[:, None], state, c), x)
                out.append(y)
            ys = torch.stack(out)
        first = torch.autograd.grad(ys.square().sum(), state, create_graph=True)[0]
        found.append(torch.autograd.grad(first.sin().sum(), (w, state, xs)))
    torch.testing.assert_close(*found)


def test_in_reverse_and_with_one_reset_for_all_lanes() -> None:
    step = lambda c, x: ((torch.tanh(c[0] + x), c[1] + 1, "kept"), c[1])  # noqa: E731
    carry, state = (rows(B, H), torch.zeros(B, dtype=torch.int64), "kept"), (rows(B, H), torch.full((B,), 7), "other")
    xs, resets = rows(T, B, H), torch.arange(T) == 4
    _, counts = scan(step, carry, xs, resets=resets, reset_state=state, reverse=True)
    assert counts[:, 0].tolist() == [11, 10, 9, 8, 7, 4, 3, 2, 1, 0]


def test_what_does_not_fit_is_an_error() -> None:
    step = lambda h, x: (h + x, h)  # noqa: E731
    h, xs = torch.zeros(B, H), torch.zeros(T, B, H)
    with pytest.raises(ValueError, match="got it without resets"):
        scan(step, h, xs, reset_state=h)
    with pytest.raises(ValueError, match=r"expected float32 \[3, 4\] on cpu, got float32 \[1, 4\]"):
        scan(step, h, xs, resets=RESETS, reset_state=h[:1])
    with pytest.raises(ValueError, match="got float64"):
        scan(step, h, xs, resets=RESETS, reset_state=h.double())
    with pytest.raises(ValueError, match="must have the carry's structure"):
        scan(step, h, xs, resets=RESETS, reset_state=(h,))
