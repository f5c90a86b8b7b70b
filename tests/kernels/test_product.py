"""Large products go to oneDNN: the same values in every layout, and torch.mm wherever something else looks on."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import bptt
from bptt.kernels import product, summed_product

module = sys.modules["bptt.kernels.product"]  # of the name of its function

SIZES = [
    (1, 1200, 1100),
    (1300, 1000, 3),
    (700, 3, 1300),
    (129, 257, 131),
    (64, 512, 300),
    (9001, 70, 40),
    (20_011, 130, 97),
]


@pytest.fixture(autouse=True, params=[False, True], ids=["oneDNN", "MKL"])
def by_mkl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether torch.mm is taken for the faster one, as it is on some processors."""
    monkeypatch.setattr(module, "BY_MKL", request.param)
    return bool(request.param)


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
            out = torch.full((N, M + 2), torch.nan, dtype=dtype)
            assert product(a, b, out[:, 1:-1]).data_ptr() == out[:, 1:].data_ptr()
            assert (out[:, 1:-1].double() - expected).abs().max() < bound
            assert out[:, [0, -1]].isnan().all()


def test_weights_with_gaps_are_copied(by_mkl: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which oneDNN's product takes a thousand times as long."""
    given: list[Tensor] = []

    def linear(x: Tensor, w: Tensor, *options: Any) -> Tensor:
        given.append(w)
        return x @ w.t()

    monkeypatch.setattr(module, "ONEDNN_LINEAR", linear)
    x, w, y = torch.randn(3000, 130), torch.randn(40, 130), torch.randn(3000, 100)
    for b in layouts(w):
        torch.testing.assert_close(product(x, b), x @ w.t(), rtol=1e-4, atol=1e-4)
    for q in layouts(y):
        torch.testing.assert_close(summed_product(x, q), x.t() @ y, rtol=1e-4, atol=1e-3)
    assert given == [] if by_mkl else len(given) >= 8
    assert all(b.is_contiguous() or b.t().is_contiguous() for b in given)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_over_rows(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    N, K, M = sizes
    a, b = torch.randn(N, K, dtype=dtype), torch.randn(N, M, dtype=dtype)
    expected = a.double().t() @ b.double()
    bound = (1e-5 if dtype == torch.float32 else 1e-13) * expected.abs().max()
    for p in layouts(a):
        for q in layouts(b):
            found = summed_product(p, q)
            assert found.dtype == dtype
            assert found.shape == (K, M)
            assert (found.double() - expected).abs().max() < bound


@pytest.mark.skipif(module.ONEDNN_LINEAR is None, reason="this build of torch has no oneDNN")
def test_few_sizes(by_mkl: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN keeps compiled code for every size: sequences of many lengths must not fill the memory with it."""
    sizes = set()

    def counted(x: Tensor, w: Tensor, *rest: Any) -> Tensor:
        sizes.add((*x.shape, len(w)))
        return linear(x, w, *rest)

    linear = module.ONEDNN_LINEAR
    monkeypatch.setattr(module, "ONEDNN_LINEAR", counted)
    layer = bptt.nn.LSTM(128, 128)
    for T in range(100, 200):
        y, _ = layer(torch.zeros(T, 16, 128).requires_grad_())
        y.sum().backward()
    # The input's product, its gradient and those of two weights, at most sixteen sizes an octave.
    assert not sizes if by_mkl else 3 <= len(sizes) <= 4 * (16 + 2)


@pytest.mark.skipif(module.ONEDNN_LINEAR is None, reason="this build of torch has no oneDNN")
def test_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ONEDNN_LINEAR", pytest.fail)
    torch._C._set_mkldnn_enabled(False)  # as torch.backends.mkldnn.flags does, which warns of what else it sets
    try:
        product(torch.zeros(300, 200), torch.zeros(300, 200))
        summed_product(torch.zeros(300, 200), torch.zeros(300, 200))
    finally:
        torch._C._set_mkldnn_enabled(True)


def test_nothing_to_multiply() -> None:
    assert product(torch.zeros(0, 2000), torch.zeros(2000, 2000)).shape == (0, 2000)
    assert not product(torch.zeros(2000, 0), torch.zeros(2000, 0)).any()
    assert not summed_product(torch.zeros(0, 2000), torch.zeros(0, 2000)).any()
    assert summed_product(torch.zeros(2000, 0), torch.zeros(2000, 2000)).shape == (0, 2000)


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
    assert summed_product(x, w).requires_grad


def test_in_a_transform() -> None:
    x, w = torch.randn(3, 300, 200), torch.randn(300, 200)
    torch.testing.assert_close(torch.func.vmap(product, (0, None))(x, w), x @ w.t())
