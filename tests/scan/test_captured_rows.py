"""`M[rows, i]` with captured row numbers: one element of each row is gathered, as long as they are these numbers."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import bptt
from bptt.policies import parse

T, B, N, H = 12, 3, 7, 5
D = torch.float64


def attended(B: int, rows: Tensor, negative: bool = False) -> tuple[Any, Any, Tensor, list[Tensor]]:
    """(step, carry, xs, captured): a cell that reads one of the vectors of its lane, where its state is largest."""
    torch.manual_seed(0)
    memory = torch.randn(B, N, H, dtype=D, requires_grad=True)
    cell = torch.nn.GRUCell(H, H, dtype=D)

    def step(carry: tuple[Tensor, Tensor], x: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        h, i = carry
        read = memory[rows, i - N if negative else i]
        h = cell(x + read, h)
        i = (i + 1 + h.argmax(1)) % N
        return (h, i), h * memory[rows, i]

    carry = torch.randn(B, H, dtype=D, requires_grad=True), torch.arange(B) % N
    return step, carry, torch.randn(T, B, H, dtype=D, requires_grad=True), [memory, *cell.parameters()]


def by_loop(step: Any, carry: Any, xs: Tensor, wanted: list[Tensor], policy: str) -> tuple[Tensor, list[Tensor]]:
    """(ys, gradients of the sum of their squares) by autograd of a loop for each block of losses."""
    states, ys = [carry], []
    with torch.no_grad():
        for x in xs:
            c, y = step(states[-1], x)
            states.append(c)
            ys.append(y)
    total = [torch.zeros_like(t) for t in wanted]
    for earliest, first, last in parse(policy).reach(T).blocks(T):
        c, loss = states[earliest] if earliest else carry, torch.zeros((), dtype=D)
        for t in range(earliest, last + 1):
            c, y = step(c, xs[t])
            loss = loss + y.square().sum() if t >= first else loss
        for whole, grad in zip(total, torch.autograd.grad(loss, wanted, allow_unused=True), strict=True):
            whole += 0 if grad is None else grad
    return torch.stack(ys), total


def judge(step: Any, carry: Any, xs: Tensor, captured: list[Tensor], policy: str, kernel: str) -> None:
    wanted = [carry[0], xs, *captured]
    _, ys = bptt.scan(step, carry, xs, gradient=policy, kernel=kernel)
    expected, grads = by_loop(step, carry, xs, wanted, policy)
    assert_close(ys.detach(), expected, rtol=1e-10, atol=1e-12)
    assert_close(list(torch.autograd.grad(ys.square().sum(), wanted)), grads, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("policy", ["full", "chunked:5", "truncated:4", "truncated:5/2"])
def test_gathered(policy: str, negative: bool) -> None:
    judge(*attended(B, torch.arange(B), negative), policy, "eager")


def test_explained() -> None:
    step, carry, xs, _ = attended(B, torch.arange(B))
    told = str(bptt.explain(step, carry, xs[0]))
    assert "gather(memory, 1" in told
    assert "replayed" not in told


@pytest.mark.parametrize("policy", ["full", "truncated:5/2"])
def test_other_row_numbers(policy: str) -> None:
    """Another tensor of them, other numbers of lanes, and numbers that change in place, at once or between calls."""
    rows = torch.arange(B)
    case = attended(B, rows)
    for _ in range(2):
        judge(*case, policy, "auto")
    rows.copy_(rows.flip(0))
    judge(*case, policy, "auto")
    with pytest.raises(RuntimeError, match="held the numbers of the rows when the step was traced, and does not now"):
        bptt.scan(*case[:3], kernel="eager")
    rows.copy_(rows.flip(0))
    bptt.scan(*case[:3], kernel="eager")
    for n in (B, 4, 2):
        judge(*attended(n, torch.arange(n)), policy, "eager")
    judge(*attended(B, torch.tensor([1, 1, 0])), policy, "auto")
