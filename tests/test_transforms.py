"""The layers inside torch.func's transforms of reverse mode and vmap, against a plain loop."""

from typing import Any

import pytest
import torch
from reference import as_tuple, build, ours
from torch import Tensor
from torch.func import grad, jacrev, jvp, vjp, vmap
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_leaves, tree_map
from transforms import CASES, like, loss, made

import bptt

cases = pytest.mark.parametrize(("cell", "net"), CASES)
kernels = pytest.mark.parametrize("kernel", ["cpu", "eager", "fused"])


def close(own: Any, expected: Any) -> None:
    torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-9)


@cases
@kernels
def test_what_vjp_returns(cell: str, net: str, kernel: str) -> None:
    """Called outside of the transform, in grad mode and without, twice; and inside another one."""
    own, loop, given = made(cell, net, kernel)

    def pulled(f: Any) -> list[Any]:
        outputs, back = vjp(f, *given)
        cotangents = like(outputs)
        found = [back(cotangents), back(cotangents)]
        with torch.no_grad():
            found.append(back(cotangents))
        with_aux, back, aux = vjp(lambda *given: (f(*given), given[0] + 1), *given, has_aux=True)
        assert torch.equal(aux, given[0] + 1)
        return [*found, back(like(with_aux))]

    close(pulled(own), pulled(loop))
    nested = [
        grad(lambda x, f=f: tree_leaves(vjp(f, x, *given[1:])[1](like(f(*given))))[0].sin().sum()) for f in (own, loop)
    ]
    close(nested[0](given[0]), nested[1](given[0]))


@cases
@kernels
def test_orders(cell: str, net: str, kernel: str) -> None:
    own, loop, given = made(cell, net, kernel)

    def second(f: Any) -> Any:
        first = grad(loss(f), (0, 1, 2))
        return grad(lambda *given: sum(g.square().sum() for g in tree_leaves(first(*given))), (0, 1, 2))(*given)

    def twice(f: Any) -> Any:
        _, back = vjp(lambda x: vjp(f, x, *given[1:])[1](like(f(*given)))[0], given[0])
        return back(torch.ones_like(given[0])), back(torch.ones_like(given[0]))

    close(grad(loss(own), (0, 1, 2))(*given), grad(loss(loop), (0, 1, 2))(*given))
    close(second(own), second(loop))
    close(twice(own), twice(loop))
    close(jacrev(lambda x: own(x, *given[1:])[0])(given[0]), jacrev(lambda x: loop(x, *given[1:])[0])(given[0]))


def test_a_cotangent_of_ordinary_autograd() -> None:
    """The function that vjp returns is differentiable in its cotangents, and in what its primals were made of."""
    own, loop, (x, hx, weights) = made("gru", "one", "cpu")

    def found(f: Any) -> Any:
        leaf, scale = x.clone().requires_grad_(), torch.tensor(2.0, dtype=x.dtype, requires_grad=True)
        outputs, back = vjp(lambda x: f(x, hx, weights), leaf * 1)
        dx = back(tuple(scale * out.detach() for out in outputs))[0]
        return torch.autograd.grad(dx.sin().sum(), (leaf, scale))

    close(found(own), found(loop))


@cases
@kernels
@pytest.mark.parametrize("mapped", ["x", "hx", "weights", "all"])
def test_vmap(cell: str, net: str, kernel: str, mapped: str) -> None:
    """Over any of the arguments, of the layer, of its gradient (that of each sample) and inside a gradient."""
    own, loop, given = made(cell, net, kernel)
    dims: list[Any] = [0 if mapped in (name, "all") else None for name in ("x", "hx", "weights")]
    whole = tree_map(lambda t: torch.stack([t, t / 2, -t]), given)
    arguments = [w if d == 0 else t for w, d, t in zip(whole, dims, given, strict=True)]
    if mapped == "x":
        dims[0], arguments[0] = 2, arguments[0].movedim(0, 2)
    for both in (lambda f: f, lambda f: grad(loss(f), (0, 1, 2))):
        close(vmap(both(own), tuple(dims))(*arguments), vmap(both(loop), tuple(dims))(*arguments))
    around = [grad(loss(lambda *given, f=f: vmap(f, tuple(dims))(*given)), (0, 1, 2))(*arguments) for f in (own, loop)]
    close(*around)


@cases
@kernels
def test_batched_cotangents(cell: str, net: str, kernel: str) -> None:
    own, loop, given = made(cell, net, kernel)

    def found(f: Any) -> Any:
        leaves = tree_map(lambda t: t.clone().requires_grad_(), given)
        y = f(*leaves)[0]
        cotangents = torch.randn(3, *y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
        return torch.autograd.grad(y, tree_leaves(leaves), cotangents, is_grads_batched=True, allow_unused=True)

    close(found(own), found(loop))
    jacobian = torch.autograd.functional.jacobian
    own_jacobian = jacobian(lambda x: own(x, *given[1:])[0], given[0], vectorize=True)
    close(own_jacobian, jacobian(lambda x: loop(x, *given[1:])[0], given[0]))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # by torch's own forward mode
@pytest.mark.parametrize(("cell", "net", "kernel"), [("gru", "one", "cpu"), ("lstm", "bi_two", "eager")])
def test_derivatives_of_the_gradients_of_samples(cell: str, net: str, kernel: str) -> None:
    """Those of a weight for each sample, made side by side, are differentiated again and mapped again."""
    own, loop, (x, hx, weights) = made(cell, net, kernel)
    whole = torch.stack([x, x / 2, -x])

    def of_samples(f: Any, weights: Any, scale: Tensor) -> Any:
        return vmap(grad(lambda w, x: loss(f)(x * scale, hx, w)), (None, 0))(weights, whole)

    def second(f: Any) -> Any:
        return grad(lambda w, s: sum(g.sin().sum() for g in of_samples(f, w, s).values()), (0, 1))(weights, scale)

    def forward(f: Any) -> Any:
        return jvp(lambda w, s: of_samples(f, w, s), (weights, scale), (like(weights), torch.ones_like(scale)))[1]

    scale = torch.tensor(1.5, dtype=x.dtype)
    close(second(own), second(loop))
    close(forward(own), forward(loop))
    nested = [
        vmap(lambda c, f=f: of_samples(f, weights, c))(torch.tensor([1.0, 0.5], dtype=x.dtype)) for f in (own, loop)
    ]
    close(*nested)


def test_batched_cotangents_of_a_changed_output() -> None:
    layer, x = bptt.nn.GRU(3, 4, dtype=torch.float64), torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    cotangents = torch.eye(40, dtype=torch.float64).view(40, 5, 2, 4)
    changed = layer(x)[0].mul_(2)
    found = torch.autograd.grad(changed, x, cotangents, is_grads_batched=True)[0]
    close(found, torch.autograd.grad(layer(x)[0], x, 2 * cotangents, is_grads_batched=True)[0])


@pytest.mark.parametrize("memory", ["gates", "states", "checkpoints:steps=2"])
@pytest.mark.parametrize("policy", ["full", "chunked:2", "truncated:3", "truncated:4/2"])
@pytest.mark.parametrize("net", ["one", "two", "bi_two"])
def test_policies_and_memories(policy: str, memory: str, net: str) -> None:
    """What `backward` gives, in vmap and outside, and the derivative of the policy's graph."""
    own, _, given = made("lstm", net, "cpu", gradient=policy, memory=memory)
    leaves = tree_map(lambda t: t.clone().requires_grad_(), given)
    first = torch.autograd.grad(loss(own)(*leaves), tree_leaves(leaves), create_graph=True)
    close(tree_leaves(grad(loss(own), (0, 1, 2))(*given)), list(first))
    per_sample = vmap(grad(loss(own), (0, 1, 2)))(*tree_map(lambda t: torch.stack([t / 2, t]), given))
    close([g[1] for g in tree_leaves(per_sample)], list(first))
    second = torch.autograd.grad(first[0].sin().sum(), leaves[0])[0]
    close(grad(lambda x: grad(loss(own))(x, *given[1:]).sin().sum())(given[0]), second)


@kernels
@pytest.mark.parametrize("net", [{}, {"num_layers": 2, "bidirectional": True}])
def test_packed_sequences(kernel: str, net: dict[str, Any]) -> None:
    layer = bptt.nn.LSTM(3, 4, dtype=torch.float64, kernel=kernel, **net)
    packed = pack_padded_sequence(torch.randn(7, 3, 3, dtype=torch.float64), [4, 7, 2], enforce_sorted=False)

    def f(data: Tensor) -> Tensor:
        y, final = layer(packed._replace(data=data))
        return y.data.sin().sum() + sum(s.sin().sum() for s in final)

    leaf = packed.data.clone().requires_grad_()
    expected = torch.autograd.grad(f(leaf), leaf)[0]
    close(grad(f)(packed.data), expected)
    close(vjp(f, packed.data)[1](torch.ones((), dtype=torch.float64))[0], expected)
    close(vmap(grad(f))(torch.stack([packed.data + 1, packed.data]))[1], expected)
    close(vmap(f)(torch.stack([packed.data + 1, packed.data]))[1], f(packed.data))


@pytest.mark.parametrize("kernel", ["cpu", "eager"])
@pytest.mark.parametrize("each", [False, True])
def test_resets(kernel: str, each: bool) -> None:
    """Mapped too, and the state that they restart from."""
    layer = bptt.nn.GRU(3, 4, num_layers=2, dtype=torch.float64, kernel=kernel)
    x, resets = torch.randn(7, 3, 3, dtype=torch.float64), torch.rand(7, 3) < 0.4
    restart = torch.randn(*([7] if each else []), 2, 3, 4, dtype=torch.float64)

    def f(x: Tensor, restart: Tensor, resets: Tensor) -> Tensor:
        return layer(x, resets=resets, reset_state=restart)[0].sin().sum()

    leaves = x.clone().requires_grad_(), restart.clone().requires_grad_()
    expected = torch.autograd.grad(f(*leaves, ~resets), leaves)
    close(grad(f, (0, 1))(x, restart, ~resets), expected)
    mapped = vmap(grad(f, (0, 1)), (None, None, 0))(x, restart, torch.stack([resets, ~resets]))
    close([g[1] for g in mapped], list(expected))


@pytest.mark.parametrize("settings", [{"num_layers": 2, "dropout": 0.5}, {"gradient": "randomized:0.5"}])
def test_what_is_drawn_follows_vmaps_randomness(settings: dict[str, Any]) -> None:
    layer, x = bptt.nn.GRU(3, 4, **settings), torch.randn(9, 2, 3)
    given = torch.stack([x, x])
    with pytest.raises(RuntimeError, match="randomness error mode"):
        vmap(grad(lambda x: layer(x)[0].sum()))(given)
    same = vmap(grad(lambda x: layer(x)[0].sum()), randomness="same")(given)
    assert torch.equal(same[0], same[1])
    different = vmap(grad(lambda x: layer(x)[0].sum()), randomness="different")(given)
    assert not torch.equal(different[0], different[1])


@pytest.mark.parametrize("kernel", ["auto", "cpu", "eager"])
@pytest.mark.parametrize("T", [1, 2, 90])
def test_vmap_is_a_loop_over_calls(kernel: str, T: int) -> None:
    """Without grad mode too; unbatched input, and lanes that there are none of."""
    layer, x = bptt.nn.GRU(3, 4, kernel=kernel), torch.randn(5, T, 2, 3)
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            mapped = vmap(layer)(x)
            torch.testing.assert_close(mapped[0][3], layer(x[3])[0])
            torch.testing.assert_close(mapped[1][3], layer(x[3])[1])
            torch.testing.assert_close(vmap(layer, 1, 1)(x[0])[0], layer(x[0])[0])
            assert vmap(layer)(x[:, :, :0])[0].shape == (5, T, 0, 4)


def test_a_traced_gradient_holds_the_layer() -> None:
    """`make_fx` records what the compiled kernel would hide."""
    from torch.fx.experimental.proxy_tensor import make_fx

    layer = ours(build("gru"), kernel="cpu")
    x = torch.randn(4, 2, 5, dtype=torch.float64)
    gradient = grad(lambda x: sum(out.sin().sum() for out in (layer(x)[0], *as_tuple(layer(x)[1]))))
    close(make_fx(gradient)(x)(x + 1), gradient(x + 1))
