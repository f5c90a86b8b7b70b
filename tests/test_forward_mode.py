"""Forward-mode derivatives are refused by name, wherever a tangent would be lost."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import as_tuple, build, ours
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jvp, linearize, vmap
from torch.nn.utils.rnn import pack_padded_sequence

import bptt

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # by torch's own forward mode

DTYPES = [torch.float32, torch.float64, torch.bfloat16]

layers = pytest.mark.parametrize(
    ("cell", "kernel", "dtype"),
    [(c, k, d) for c in ("tanh", "gru", "lstm") for k in ("auto", "eager") for d in DTYPES],
)
frozen = pytest.mark.parametrize("frozen", [True, False])


def refused(function: Callable[..., Any], *given: Any) -> None:
    with pytest.raises(NotImplementedError, match=r"bptt has no forward-mode derivatives.*torch\.func\.vjp"):
        function(*given)


def made(cell: str, kernel: str, dtype: torch.dtype, frozen: bool, **kw: Any) -> tuple[Any, Tensor]:
    layer = ours(build(cell, dtype=dtype, **kw), kernel=kernel).requires_grad_(not frozen)
    return layer, torch.randn(7, 3, 5, dtype=dtype)


def dual(tensor: Tensor) -> Tensor:
    return forward_ad.make_dual(tensor, torch.ones_like(tensor))


@layers
@frozen
def test_a_dual_tensor(cell: str, kernel: str, dtype: torch.dtype, frozen: bool) -> None:
    """As x, packed too, as hx, as any weight; with and without grad mode. Others are let through."""
    layer, x = made(cell, kernel, dtype, frozen, num_layers=2)
    expected, final = layer(x)
    with forward_ad.dual_level():
        for mode in (torch.enable_grad, torch.no_grad):
            with mode():
                refused(layer, dual(x))
                packed = pack_padded_sequence(x, [7, 4, 2])
                refused(layer, packed._replace(data=dual(packed.data)))
                for i in range(len(as_tuple(final))):
                    hx = [dual(s.detach()) if i == k else s.detach() for k, s in enumerate(as_tuple(final))]
                    refused(layer, x, hx[0] if len(hx) == 1 else tuple(hx))
                for name, weight in layer.named_parameters():
                    refused(functional_call, layer, {name: dual(weight.detach())}, (x,))
                refused(vmap(layer, randomness="different"), dual(x)[None])
        assert torch.equal(layer(x)[0], expected)
        assert torch.equal(layer(dual(x).detach())[0], expected)
    assert torch.equal(layer(x)[0], expected)


@layers
@frozen
def test_transforms(cell: str, kernel: str, dtype: torch.dtype, frozen: bool) -> None:
    layer, x = made(cell, kernel, dtype, frozen)

    def f(x: Tensor) -> Tensor:
        return layer(x)[0].sum()

    ones, batch = torch.ones_like(x), torch.stack([x, x])
    refused(jvp, f, (x,), (ones,))
    refused(jacfwd(f), x)
    refused(hessian(f), x)
    refused(jvp, grad(f), (x,), (ones,))
    refused(grad(lambda x: jvp(f, (x,), (ones,))[1]), x)
    refused(jvp, vmap(f), (batch,), (batch,))
    refused(vmap(lambda x: jvp(f, (x,), (ones,))[1]), batch)
    refused(jvp, vmap(grad(f)), (batch,), (batch,))


@frozen
def test_linearize(frozen: bool) -> None:
    layer, x = made("gru", "auto", torch.float32, frozen)
    refused(linearize, lambda x: layer(x)[0], x)


@frozen
def test_gradients_without_autograd(frozen: bool) -> None:
    layer, x = made("gru", "auto", torch.float64, frozen)
    y, h_n = (z.detach() for z in layer(x))
    with forward_ad.dual_level():
        refused(bptt.gradients, layer, dual(x), y)
        refused(bptt.gradients, layer, x, dual(y))
        refused(bptt.gradients, layer, x, y, dual(h_n))
        refused(bptt.gradients, layer, x, y, h_n, dual(h_n))
        bptt.gradients(layer, x, y, h_n, h_n)


@pytest.mark.parametrize("policy", ["full", "chunked:3"])
def test_streams(policy: str) -> None:
    layer, x = made("gru", "auto", torch.float64, False)
    with forward_ad.dual_level():
        weight = dual(torch.ones(4, dtype=torch.float64, requires_grad=True))
        for given in (dual(x), iter([dual(x)])):
            refused(lambda x: bptt.stream_gradients(layer, x, lambda _, y: y.sum(), gradient=policy), given)
        for wrt in ((), (weight,)):
            refused(lambda w: bptt.stream_gradients(layer, x, lambda _, y: (y * weight).sum(), wrt=w), wrt)
        bptt.stream_gradients(layer, x, lambda _, y: y.sum(), gradient=policy)


@frozen
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_scan(frozen: bool, mode: Any) -> None:
    """The carry, xs, and what a step captures."""
    carry, xs, own = torch.randn(2, 4), torch.randn(5, 2, 4), torch.randn(4, 4, requires_grad=not frozen)

    def scanned(carry: Tensor, xs: Tensor, weight: Tensor) -> Tensor:
        return bptt.scan(lambda c, x: (torch.tanh(c @ weight + x), c), carry, xs)[0]

    with mode():
        with forward_ad.dual_level():
            refused(scanned, dual(carry), xs, own)
            refused(scanned, carry, dual(xs), own)
            refused(scanned, carry, xs, dual(own.detach().requires_grad_(not frozen)))
            scanned(carry, xs, own)
        refused(jvp, lambda c: scanned(c, xs, own), (carry,), (carry,))
        refused(jacfwd(lambda w: scanned(carry, xs, w)), own.detach()) if mode is torch.no_grad else None
        refused(linearize, lambda c: scanned(c, xs, own), carry)
