"""Sums over the rows of all steps, in every variant, against torch's products in float64."""

from collections.abc import Callable

import pytest
import torch

from bptt.kernels import KERNELS, Cpu, SummingKernel, variants
from bptt.kernels.row_sums import WIDEST, row_sums

SIZES = [(1, 1, 1, 1), (300, 37, 3, 70), (513, 100, 49, 17), (7, 9, 96, 48), (256, 8, 16, 33), (0, 5, 3, 2)]
"""Rows N, columns M of a, and K of each factor: less and more than a block, a tile, a vector."""


def cpu() -> SummingKernel:
    kernel = KERNELS["cpu"]
    assert isinstance(kernel, SummingKernel)
    return kernel


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("size", SIZES)
def test_sums(
    variant: str,
    dtype: torch.dtype,
    count: int,
    size: tuple[int, int, int, int],
    walkers: Callable[[int], None],
) -> None:
    walkers(count)
    torch.manual_seed(0)
    N, M, K, K2 = size
    a = torch.randn(N, M + 5, dtype=dtype)[:, 2:-3]  # a part of longer rows
    factors = [torch.randn(N, K, dtype=dtype), torch.randn(K2, N, dtype=dtype).t()]  # the second one is not dense
    for rows in (None, torch.randperm(N)[: N // 2]):
        for some in (factors, factors[:1], factors[1:]):
            found = cpu().row_sums(a, some, rows, alone=len(some) == 2)
            assert found is not None
            products, sums = found
            own = slice(None) if rows is None else rows
            assert (sums is None) == (len(some) == 1)
            for b, product in zip(some, products, strict=True):
                expected = (a[own].double().t() @ b[own].double()).to(dtype)
                torch.testing.assert_close(product, expected, rtol=1e-5, atol=1e-4 if dtype == torch.float32 else 1e-10)
            if sums is not None:
                torch.testing.assert_close(sums, a[own].double().sum(0).to(dtype), rtol=1e-5, atol=1e-4)


def test_only_rows_that_count_are_read() -> None:
    a, b, rows = torch.randn(9, 5), torch.randn(9, 4), torch.tensor([1, 4, 8])
    expected = a[rows].t() @ b[rows]
    a[[0, 2]], b[[3, 5]] = torch.nan, torch.nan
    found = cpu().row_sums(a, [b], rows, alone=True)
    assert found is not None
    torch.testing.assert_close(found[0][0], expected)
    assert found[1] is not None
    assert bool(found[1].isfinite().all())


def test_torch_computes_what_it_does_better() -> None:
    a, b = torch.randn(3, 4), torch.randn(3, 2)
    assert cpu().row_sums(a, [], None, alone=True) is None
    assert cpu().row_sums(a, [b.double()], None, alone=False) is None
    assert cpu().row_sums(a, [b.requires_grad_()], None, alone=False) is None  # it would be recorded
    wide = torch.empty(1, 1).expand(1, WIDEST)
    assert cpu().row_sums(wide, [torch.randn(1, 2)], None, alone=False) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("H", [8, 24, 40])
def test_rows_that_begin_with_the_inner_gates_error(H: int, dtype: torch.dtype) -> None:
    """Of a GRU's (dm, da_r, da_z, da_n): the last three for the input's weight, (da_r, da_z, dm) for the other."""
    a, x, h = (torch.randn(300, n, dtype=dtype) for n in (4 * H, 7, H))
    for name in variants():
        found = row_sums(Cpu(name)._variant, a, (x, h), None, True, H)
        assert found is not None
        recurrent = torch.cat([a[:, H:-H], a[:, :H]], 1)
        expected = [a[:, H:].t() @ x, recurrent.t() @ h], a.sum(0)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    assert row_sums(0, a[:, : 4 * H - 4], (x, h), None, True, H - 1) is None
