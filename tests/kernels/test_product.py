"""Large products go to oneDNN: the same values in every layout, and torch.mm wherever something else looks on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bptt.kernels import product

SIZES = [(1, 1200, 1100), (1300, 1000, 3), (700, 3, 1300), (129, 257, 131), (64, 512, 300)]


def layouts(x: Tensor) -> list[Tensor]:
    wide = torch.zeros(len(x), x.shape[1] + 5, dtype=x.dtype)
    wide[:, 3:-2] = x
    negative = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert negative.is_neg()
    return [x, x.t().contiguous().t(), wide[:, 3:-2], x.repeat_interleave(2, 1)[:, ::2], negative]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layouts(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    N, K, M = sizes
    x, w = torch.randn(N, K, dtype=dtype), torch.randn(M, K, dtype=dtype)
    expected = x.double() @ w.double().t()
    bound = (1e-5 if dtype == torch.float32 else 1e-13) * expected.abs().max()
    for a in layouts(x):
        for b in layouts(w):
            torch.testing.assert_close(a, x, rtol=0, atol=0)
            torch.testing.assert_close(b, w, rtol=0, atol=0)
            found = product(a, b)
            assert found.dtype == dtype
            assert found.shape == (N, M)
            assert (found.double() - expected).abs().max() < bound


def test_nothing_to_multiply() -> None:
    assert product(torch.zeros(0, 2000), torch.zeros(2000, 2000)).shape == (0, 2000)
    assert not product(torch.zeros(2000, 0), torch.zeros(2000, 0)).any()


def test_not_finite() -> None:
    x, w = torch.ones(300, 200), torch.ones(300, 200)
    x[7, 3] = torch.nan
    found = product(x, w)
    assert found[7].isnan().all()
    assert found[torch.arange(300) != 7].isfinite().all()


def test_recorded_by_autograd() -> None:
    x, w = torch.randn(300, 200, requires_grad=True), torch.randn(300, 200, requires_grad=True)
    with torch.no_grad():
        expected = product(x, w)
    found = product(x, w)
    assert found.requires_grad
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    (dx,) = torch.autograd.grad(found.sum(), x)
    torch.testing.assert_close(dx, w.detach().sum(0).expand(300, 200))


def test_in_a_transform() -> None:
    x, w = torch.randn(3, 300, 200), torch.randn(300, 200)
    torch.testing.assert_close(torch.func.vmap(product, (0, None))(x, w), x @ w.t())
