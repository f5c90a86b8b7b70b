"""The short way of steps that draw, that read a captured tensor with lanes, or that solve linear systems."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bptt import scan

from .ways import Results, Ways, gradients

T, B, H = 12, 2, 5

POLICIES = "full", "chunked:5", "truncated:6/3", "truncated:4"
Case = tuple[Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], list[Tensor]]


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> Ways:
    return Ways(monkeypatch)


def _with_dropout() -> Case:
    cell = nn.Linear(2 * H, H, dtype=torch.float64)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(cell(torch.nn.functional.dropout(torch.cat([h, x], 1), 0.3)) + 0.1 * torch.randn_like(h))
        return h, h

    return step, list(cell.parameters())


def _with_lanes() -> Case:
    memory, w = (torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((B, 4, H), (H, H)))

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        p = torch.softmax(torch.bmm(memory, (h @ w)[:, :, None])[:, :, 0], 1)
        h = torch.tanh(torch.bmm(p[:, None], memory)[:, 0] + x)
        return h, p

    return step, [memory, w]


def _with_a_solve() -> Case:
    w = torch.randn(H, H, dtype=torch.float64, requires_grad=True)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        matrix = h[:, :, None] * x[:, None, :] + 3 * torch.eye(H, dtype=torch.float64)
        h = torch.tanh(torch.linalg.solve(matrix, (x @ w)[:, :, None])[:, :, 0])
        return h, h

    return step, [w]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("made", [_with_dropout, _with_lanes, _with_a_solve])
def test_bits_of_steps_that_draw_attend_or_solve(made: Callable[[], Case], policy: str, ways: Ways) -> None:
    torch.manual_seed(0)
    step, captured = made()
    h, x = (torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((B, H), (T, B, H)))

    def call() -> Results:
        torch.manual_seed(1)
        final, ys = scan(step, h, x, gradient=policy)
        return [*gradients([final, ys], [h, x, *captured]), torch.rand(3)]

    for _ in range(5):
        call()
    ways.both(call)
    with torch.no_grad():
        ways.both(lambda: [torch.manual_seed(1).get_state(), *scan(step, h, x, gradient=policy)])


def test_second_derivatives_draw_the_same_numbers(ways: Ways) -> None:
    torch.manual_seed(0)
    step, captured = _with_dropout()
    h, x = torch.randn(B, H, dtype=torch.float64), torch.randn(T, B, H, dtype=torch.float64)

    def call() -> Results:
        torch.manual_seed(1)
        loss = scan(step, h, x)[1].sin().sum()
        (first,) = torch.autograd.grad(loss, captured[:1], create_graph=True)
        return [first.detach(), *torch.autograd.grad(first.square().sum(), captured)]

    for _ in range(5):
        call()
    ways.both(call)


def test_a_matrix_that_has_become_singular_raises_what_the_step_raises(ways: Ways) -> None:
    def step(carry: tuple[Tensor, Tensor], x: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        S, h = carry
        h = 0.5 * h + torch.linalg.solve(S, x)
        return (S * 1.0, h), h

    S, h, xs = torch.eye(3).repeat(B, 1, 1), torch.zeros(B, 3, 1), torch.randn(T, B, 3, 1, requires_grad=True)
    for _ in range(5):
        scan(step, (S, h), xs)
    assert ways.taken[-1]
    S[1, 2, 2] = 0
    with pytest.raises(RuntimeError, match="singular"):
        scan(step, (S, h), xs)
