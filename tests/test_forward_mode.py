"""Forward mode: tangents of the layers against a plain loop; refused by name wherever one would be lost."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import CELLS, build, ours
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jvp, linearize, vmap
from torch.nn.utils.rnn import pack_padded_sequence
from transforms import CASES, like, loss, made

import bptt

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # by torch's own forward mode

DTYPES = [torch.float32, torch.float64, torch.bfloat16]

cases = pytest.mark.parametrize(("cell", "net"), CASES)
kernels = pytest.mark.parametrize("kernel", ["cpu", "eager", "fused"])
frozen = pytest.mark.parametrize("frozen", [True, False])


def close(own: Any, expected: Any) -> None:
    torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-9)


def refused(function: Callable[..., Any], *given: Any) -> None:
    with pytest.raises(NotImplementedError, match=r"bptt has no forward-mode derivatives here.*torch\.func\.vjp"):
        function(*given)


def layer_of(cell: str, kernel: str, dtype: torch.dtype, frozen: bool, **kw: Any) -> tuple[Any, Tensor]:
    layer = ours(build(cell, dtype=dtype, **kw), kernel=kernel).requires_grad_(not frozen)
    return layer, torch.randn(7, 3, 5, dtype=dtype)


def dual(tensor: Tensor) -> Tensor:
    return forward_ad.make_dual(tensor, torch.ones_like(tensor))


def tangents(outputs: Any) -> list[Tensor]:
    return [forward_ad.unpack_dual(out).tangent for out in outputs]


@cases
@kernels
@pytest.mark.parametrize("moving", ["x", "hx", "weights", "all"])
def test_jvp(cell: str, net: str, kernel: str, moving: str) -> None:
    own, loop, given = made(cell, net, kernel)
    own_given, rest = [i for i, name in enumerate(("x", "hx", "weights")) if moving in (name, "all")], list(given)

    def at(f: Any) -> Any:
        def function(*some: Any) -> Any:
            for i, value in zip(own_given, some, strict=True):
                rest[i] = value
            return f(*rest)

        primals = tuple(given[i] for i in own_given)
        return jvp(function, primals, tuple(like(p) for p in primals))

    close(at(own), at(loop))


@cases
@kernels
def test_orders(cell: str, net: str, kernel: str) -> None:
    """Forward over reverse, reverse over forward, forward over forward."""
    own, loop, given = made(cell, net, kernel)
    v = like(given)
    for second in (
        lambda f: jvp(grad(loss(f), (0, 1, 2)), given, v)[1],
        lambda f: grad(lambda *given: jvp(loss(f), given, v)[1], (0, 1, 2))(*given),
        lambda f: jvp(lambda *given: jvp(loss(f), given, v)[1], given, v)[1],
        lambda f: vmap(lambda dx: jvp(lambda x: f(x, *given[1:]), (given[0],), (dx,))[1])(torch.stack([v[0], -v[0]])),
    ):
        close(second(own), second(loop))


@pytest.mark.parametrize("cell", list(CELLS))
def test_jacobians_and_hessians(cell: str) -> None:
    own, loop, (x, hx, weights) = made(cell, "one", "cpu")
    close(jacfwd(lambda x: own(x, hx, weights)[0])(x), jacfwd(lambda x: loop(x, hx, weights)[0])(x))
    bias = weights["bias_hh_l0"]
    hessians = [hessian(lambda b, f=f: loss(f)(x, hx, {**weights, "bias_hh_l0": b}))(bias) for f in (own, loop)]
    close(*hessians)
    forward = torch.autograd.functional.jacobian(
        lambda x: own(x, hx, weights)[0], x, vectorize=True, strategy="forward-mode"
    )
    close(forward, jacfwd(lambda x: loop(x, hx, weights)[0])(x))


@cases
@kernels
def test_dual_tensors(cell: str, net: str, kernel: str) -> None:
    """With and without grad mode; the tangent of a gradient, the gradient of a tangent."""
    own, loop, (x, hx, weights) = made(cell, net, kernel)

    def found(f: Any) -> Any:
        leaf, out = x.clone().requires_grad_(), []
        with forward_ad.dual_level():
            moving = forward_ad.make_dual(leaf, like(x))
            with torch.no_grad():
                out += tangents(f(moving, hx, weights))
            value = loss(f)(moving, hx, weights)
            (gradient,) = torch.autograd.grad(value, moving, create_graph=True)
            out += tangents([value, gradient])
            out += torch.autograd.grad(forward_ad.unpack_dual(value).tangent, leaf)
        return out

    close(found(own), found(loop))


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")  # by torch's own folding
@pytest.mark.parametrize(
    ("cell", "net"), [("tanh", "one"), ("relu", "bi_two"), ("gru", "one"), ("lstm", "one"), ("lstm_proj", "one")]
)
def test_linearize(cell: str, net: str) -> None:
    """torch records every step of the tangent: seconds where there are many."""
    own, loop, given = made(cell, net, "cpu")
    (y, *_), push = linearize(own, *given)
    close(y, loop(*given)[0])
    for seed in (1, 2):
        v = like(given, seed)
        close(push(*v), jvp(loop, given, v)[1])


@pytest.mark.parametrize("form", ["packed", "lengths", "flat"])
def test_linearize_refuses_several_lengths(form: str) -> None:
    """torch's graph has no values of theirs; of torch.nn's packed sequences neither."""
    x = torch.randn(4, 3, 3)
    packed = pack_padded_sequence(x, [3, 4, 1], enforce_sorted=False)
    layers: list[Any] = [bptt.nn.GRU(3, 5), bptt.nn.Recurrent(torch.nn.GRUCell(3, 5))]
    for layer in layers:
        calls: dict[str, Callable[[Tensor], Any]] = {
            "packed": lambda d, f=layer: f(packed._replace(data=d))[0].data,
            "lengths": lambda d, f=layer: f(d, lengths=[3, 4, 1])[0],
            "flat": lambda d, f=layer: f(d, cu_seqlens=torch.tensor([0, 3, 7, 8]))[0],
        }
        with pytest.raises(NotImplementedError, match="linearize and make_fx cannot trace the lengths of sequences"):
            linearize(calls[form], x if form == "lengths" else packed.data)


@pytest.mark.parametrize("cell", list(CELLS))
def test_gradcheck(cell: str) -> None:
    own, _, given = made(cell, "two" if cell == "lstm_proj" else "bi", "cpu")
    leaves, form = torch.utils._pytree.tree_flatten(given)
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]

    def f(*leaves: Tensor) -> Any:
        return own(*torch.utils._pytree.tree_unflatten(leaves, form))

    checks = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(f, leaves, fast_mode=True, **checks)
    assert torch.autograd.gradgradcheck(f, leaves, fast_mode=True, check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize("kernel", ["cpu", "eager", "fused"])
@pytest.mark.parametrize("policy", ["chunked:2", "truncated:3", "randomized:0.5"])
def test_a_tangent_is_the_full_one_under_any_policy(policy: str, kernel: str) -> None:
    """And its gradient, or a tangent of a gradient, is refused; a window of all steps cuts nothing."""
    if kernel == "fused" and policy == "randomized:0.5":
        pytest.skip("torch's layers multiply no adjoint")
    own, loop, given = made("gru", "two", kernel, gradient=policy)
    v = like(given)
    close(jvp(own, given, v), jvp(loop, given, v))
    close(
        jvp(lambda x: jvp(loss(own), (x, *given[1:]), v)[1], given[:1], v[:1]),
        jvp(lambda x: jvp(loss(loop), (x, *given[1:]), v)[1], given[:1], v[:1]),
    )
    with pytest.raises(NotImplementedError, match=r"forward over reverse.*is for the full gradient"):
        jvp(grad(loss(own)), given, v)
    with pytest.raises(NotImplementedError, match=r"reverse over forward.*is for the full gradient"):
        grad(lambda x: jvp(loss(own), (x, *given[1:]), v)[1])(given[0])
    whole, *_ = made("gru", "two", kernel, gradient="truncated:5")
    close(jvp(grad(loss(whole)), given, v), jvp(grad(loss(loop)), given, v))


@kernels
def test_packed_sequences_resets_and_dropout(kernel: str) -> None:
    """Against central differences."""
    layer = bptt.nn.LSTM(3, 4, num_layers=2, bidirectional=True, dropout=0.5, dtype=torch.float64, kernel=kernel)
    packed = pack_padded_sequence(torch.randn(7, 3, 3, dtype=torch.float64), [4, 7, 2], enforce_sorted=False)
    x, resets = torch.randn(7, 3, 3, dtype=torch.float64), torch.rand(7, 3) < 0.4
    restart = tuple(torch.randn(7, 4, 3, 4, dtype=torch.float64) for _ in range(2))

    def of_packed(data: Tensor) -> list[Tensor]:
        torch.manual_seed(0)
        y, final = layer(packed._replace(data=data))
        return [y.data, *final]

    def of_resets(x: Tensor, *restart: Tensor) -> list[Tensor]:
        torch.manual_seed(0)
        y, final = layer(x, resets=resets, reset_state=restart)
        return [y, *final]

    for f, given in ((of_packed, (packed.data,)), (of_resets, (x, *restart)))[: 1 if kernel == "fused" else 2]:
        v = like(given)
        up, down = (f(*[t + s * d for t, d in zip(given, v, strict=True)]) for s in (1e-6, -1e-6))
        differences = [(a - b) / 2e-6 for a, b in zip(up, down, strict=True)]
        torch.testing.assert_close(list(jvp(f, given, v)[1]), differences, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [1, 2, 40])
def test_the_layer_that_auto_chooses(dtype: torch.dtype, T: int) -> None:
    layer, x = bptt.nn.GRU(3, 4, dtype=dtype), torch.randn(T, 2, 3, dtype=dtype)
    exact = bptt.nn.GRU(3, 4, dtype=torch.float64)
    exact.load_state_dict(layer.state_dict())
    value, tangent = jvp(lambda x: layer(x)[0], (x,), (torch.ones_like(x),))
    expected = jvp(lambda x: exact(x)[0], (x.double(),), (torch.ones_like(x).double(),))
    assert value.dtype == tangent.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close((value.double(), tangent.double()), expected, rtol=tolerance, atol=tolerance)


def test_others_are_let_through() -> None:
    layer, x = bptt.nn.GRU(5, 4), torch.randn(7, 3, 5)
    expected = layer(x)[0]
    with forward_ad.dual_level():
        assert torch.equal(layer(x)[0], expected)
        assert torch.equal(layer(dual(x).detach())[0], expected)


@frozen
def test_gradients_without_autograd(frozen: bool) -> None:
    layer, x = layer_of("gru", "auto", torch.float64, frozen)
    y, h_n = (z.detach() for z in layer(x))
    with forward_ad.dual_level():
        refused(bptt.gradients, layer, dual(x), y)
        refused(bptt.gradients, layer, x, dual(y))
        refused(bptt.gradients, layer, x, y, dual(h_n))
        refused(bptt.gradients, layer, x, y, h_n, dual(h_n))
        bptt.gradients(layer, x, y, h_n, h_n)


@pytest.mark.parametrize("policy", ["full", "chunked:3"])
def test_streams(policy: str) -> None:
    layer, x = layer_of("gru", "auto", torch.float64, False)
    with forward_ad.dual_level():
        weight = dual(torch.ones(4, dtype=torch.float64, requires_grad=True))
        for given in (dual(x), iter([dual(x)])):
            refused(lambda x: bptt.stream_gradients(layer, x, lambda _, y: y.sum(), gradient=policy), given)
        for wrt in ((), (weight,)):
            refused(lambda w: bptt.stream_gradients(layer, x, lambda _, y: (y * weight).sum(), wrt=w), wrt)
        bptt.stream_gradients(layer, x, lambda _, y: y.sum(), gradient=policy)


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")  # by torch's own folding
@frozen
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_scan(frozen: bool, mode: Any) -> None:
    """The carry, xs, and what a step captures."""
    carry, xs, own = torch.randn(2, 4), torch.randn(5, 2, 4), torch.randn(4, 4, requires_grad=not frozen)

    def scanned(carry: Tensor, xs: Tensor, weight: Tensor) -> Tensor:
        return bptt.scan(lambda c, x: (torch.tanh(c @ weight + x), c), carry, xs)[0]

    def loop(carry: Tensor, xs: Tensor, weight: Tensor) -> Tensor:
        for x in xs:
            carry = torch.tanh(carry @ weight + x)
        return carry

    with mode():
        with forward_ad.dual_level():
            weight = dual(own.detach().requires_grad_(not frozen))
            for given in ((dual(carry), xs, own), (carry, dual(xs), own), (carry, xs, weight)):
                found, expected = (forward_ad.unpack_dual(f(*given)) for f in (scanned, loop))
                torch.testing.assert_close(found.tangent, expected.tangent)
        moved = [linearize(lambda c, f=f: f(c, xs, own), carry)[1](carry) for f in (scanned, loop)]
        torch.testing.assert_close(*moved)
