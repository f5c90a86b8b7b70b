"""Steps at values that are not the usual ones: what a loop does with them, a named kernel does, or it says why not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, linalg
from torch.distributions import Normal
from torch.nn import functional

import bptt
from bptt.scan import compiled

B, H, T = 3, 5, 7
SPECIAL = (math.nan, math.inf, -math.inf, 1e20, -1e20, 3e9, -3e9, -2.7, 2.7, -0.5, 0.0)

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)

ODD: dict[str, Callable[[Tensor], Tensor]] = {
    "long": lambda x: x.long().to(x.dtype),
    "int": lambda x: x.int().to(x.dtype),
    "positive": lambda x: (x.long() > 0).to(x.dtype),
    "all": lambda x: x.all(1),
    "any": lambda x: (x.clamp(max=0.0) * 0.5).any(1),
    "cumsum": lambda x: x.nan_to_num(0.5, 1.0, 2.0).cumsum(1),
    "cumprod": lambda x: x.nan_to_num(0.5, 1.0, 2.0).cumprod(1),
    "power": lambda x: x**0.3 + x**-1.5,
    "reflected": lambda x: functional.pad(x[:, None], (1, 2), mode="reflect")[:, 0],
    "nearest": lambda x: functional.interpolate(x[:, None], 8)[:, 0],
    "in order": lambda x: x.sort(dim=1, stable=True, descending=True)[1],
}


@pytest.fixture(autouse=True)
def _forget() -> None:
    compiled._KEPT.clear()


def outcome(call: Callable[[], Any]) -> Any:
    """What a call gives, or "raises"."""
    try:
        return call()
    except (RuntimeError, ValueError, IndexError):
        return "raises"


def loop(step: Any, carry: Any, xs: Any) -> tuple[Any, list[Any]]:
    ys = []
    for x in xs:
        carry, y = step(carry, x)
        ys.append(y)
    return carry, ys


@each_dtype
@pytest.mark.parametrize("name", ODD)
def test_values_without_a_number_are_those_of_a_loop(name: str, dtype: torch.dtype) -> None:
    step = lambda c, x: ((c[0] * 0.5, x), ODD[name](c[1]))  # noqa: E731
    torch.manual_seed(1)
    xs = torch.tensor(SPECIAL, dtype=dtype)[torch.randint(0, len(SPECIAL), (40, B, H))]
    first = torch.randn(B, H, dtype=dtype), xs[0]
    told = bptt.explain(step, first, xs[0])
    assert told.kernel == "interpreter", told.reason
    ys = bptt.scan(step, first, xs, kernel=told.kernel)[1]
    torch.testing.assert_close(ys, torch.stack(loop(step, first, xs)[1]), equal_nan=True, rtol=1e-5, atol=0)


@each_dtype
def test_whole_numbers_begin_anew_where_their_dtype_ends(dtype: torch.dtype) -> None:
    step = lambda c, x: ((c[0] * 0.5 + x, c[1] * 37), c[1])  # noqa: E731
    xs = torch.randn(T, B, H, dtype=dtype)
    first = torch.randn(B, H, dtype=dtype), torch.tensor([3, -3, 1], dtype=torch.int32)
    ys = bptt.scan(step, first, xs)[1]
    found = outcome(lambda: bptt.scan(step, first, xs, kernel="interpreter")[1])
    want = torch.stack(loop(step, first, xs)[1])
    assert torch.equal(ys, want)
    assert found == "raises" or torch.equal(found, want)


def diagonal(x: Tensor) -> Tensor:
    return x[:, :2, None] * torch.eye(2, dtype=x.dtype)


def forgetful(c: Tensor, x: Tensor) -> tuple[Any, Any]:
    return torch.where(x[:, :1] > 0.1, Normal(c, x, validate_args=True).mean.tanh(), 0.5), c.sum(1) > 0


FAILING: dict[str, Callable[[Tensor, Tensor], tuple[Any, Any]]] = {
    "a solution in bounds": lambda c, x: (c * 0.5, linalg.solve(diagonal(x), c[:, :2]).nan_to_num().clamp(-1, 1)),
    "a solution or another": lambda c, x: (
        c * 0.5,
        torch.where((z := linalg.solve(diagonal(x), c[:, :2])).abs() < 1e6, z, x[:, :2]),
    ),
    "an inverse in bounds": lambda c, x: (c * 0.5, linalg.inv(diagonal(x))[:, 0].nan_to_num().clamp(-1, 1)),
    "the larger of a factor": lambda c, x: (c * 0.5, linalg.cholesky(diagonal(x))[:, 0].argmax(1)),
    "a factor in bounds": lambda c, x: (c * 0.5, linalg.cholesky(diagonal(x))[:, 0].nan_to_num().clamp(-1, 1)),
    "a check that leaves no trace": forgetful,
    "a count as an index": lambda c, x: (
        c * 0.5 + torch.arange(12, dtype=x.dtype).view(4, 3)[(x <= 0).sum(1) + 3].sum(1, keepdim=True) * x.cos(),
        c.sin() * x.exp(),
    ),
}


@each_dtype
@pytest.mark.parametrize("name", FAILING)
def test_what_a_loop_refuses_is_refused(name: str, dtype: torch.dtype) -> None:
    step = FAILING[name]
    first, xs = torch.randn(B, H, dtype=dtype), torch.rand(T, B, H, dtype=dtype) + 0.2
    wrong = xs.clone()
    wrong[1, 1, 1] = -1.0 if "solution" not in name and "inverse" not in name else 0.0
    kernel = bptt.explain(step, first, xs[0]).kernel
    bptt.scan(step, first, xs, kernel=kernel)
    assert outcome(lambda: loop(step, first, wrong)) == "raises"
    for _ in range(2):
        assert outcome(lambda: bptt.scan(step, first, wrong, kernel=kernel)) == "raises"
    assert outcome(lambda: bptt.scan(step, first, wrong)) == "raises"


@each_dtype
def test_a_streamed_scan_refuses_what_a_loop_does(dtype: torch.dtype) -> None:
    first, xs = torch.randn(B, H, dtype=dtype), torch.rand(T, B, H, dtype=dtype) + 0.2
    wrong, scale = xs.clone(), torch.ones((), dtype=dtype, requires_grad=True)
    wrong[1, 1, 1] = 0.0
    step = lambda c, x: (c * scale, linalg.solve(diagonal(x), c[:, :2]).nan_to_num().clamp(-1, 1))  # noqa: E731
    streamed = lambda x: bptt.stream_scan(step, first, x, lambda _, ys: ys.sum(), wrt=[scale])  # noqa: E731
    assert outcome(lambda: streamed(xs)) != "raises"
    assert outcome(lambda: streamed(wrong)) == "raises"
    assert outcome(lambda: bptt.scan(step, first, wrong, resets=xs[..., 0] < 0.5)) == "raises"


@each_dtype
def test_the_largest_of_a_window_is_no_padding(dtype: torch.dtype) -> None:
    step = lambda c, x: (c, (functional.max_pool1d(c[:, None], 3, 2, 1)[:, 0].exp() + x[:, :1]))  # noqa: E731
    first, xs = torch.full((B, H), -math.inf, dtype=dtype), torch.randn(T, B, H, dtype=dtype)
    index = lambda c, x: (c + x * 0, functional.max_pool1d(c[:, None], 3, 2, 1, return_indices=True)[1])  # noqa: E731
    kernel = bptt.explain(index, first, xs[0]).kernel
    found = bptt.scan(index, first, xs, kernel=kernel)[1]
    assert torch.equal(found, torch.stack(loop(index, first, xs)[1]))
    assert torch.isfinite(bptt.scan(step, first, xs)[1]).all()
