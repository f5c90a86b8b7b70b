"""`scan` and `Recurrent` inside torch.func's transforms and in forward mode, against a loop without any of ours."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn.utils.rnn import pack_padded_sequence

import bptt

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # by torch's own forward mode

T, B, H = 9, 3, 2


def data() -> tuple[Tensor, Tensor, Tensor]:
    """(h, xs, w)."""
    generator = torch.Generator().manual_seed(3)
    shapes: list[tuple[int, ...]] = [(B, H), (T, B, H), (H, H)]
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)  # type: ignore[return-value]


def scanned(h: Tensor, xs: Tensor, w: Tensor, gradient: str = "full", **options: Any) -> tuple[Tensor, Tensor]:
    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(h @ w + x)
        return h, h * w.sum()

    return bptt.scan(step, h, xs, gradient=gradient, **options)


def loop(h: Tensor, xs: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    ys = []
    for x in xs:
        h = torch.tanh(h @ w + x)
        ys.append(h * w.sum())
    return h, torch.stack(ys)


def loss(f: Any, **options: Any) -> Any:
    def value(*given: Tensor) -> Tensor:
        h, ys = f(*given, **options)
        return h.cos().sum() + ys.sin().sum()

    return value


def close(own: Any, expected: Any) -> None:
    torch.testing.assert_close(own, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("enabled", [True, False])
def test_as_a_plain_loop(enabled: bool) -> None:
    given, every = data(), (0, 1, 2)
    moving = tuple(torch.ones_like(t) for t in given)
    whole = [torch.stack([t, -t]) for t in given]
    with torch.set_grad_enabled(enabled):
        close(jvp(scanned, given, moving), jvp(loop, given, moving))
        close(jacfwd(scanned, every)(*given), jacfwd(loop, every)(*given))
        close(vmap(scanned)(*whole), vmap(loop)(*whole))
        close(vmap(scanned, (None, 1, None))(given[0], whole[1].movedim(0, 1), given[2]),
              vmap(loop, (None, 1, None))(given[0], whole[1].movedim(0, 1), given[2]))  # fmt: skip
    close(grad(loss(scanned), every)(*given), grad(loss(loop), every)(*given))
    close(jacrev(scanned, 2)(*given), jacrev(loop, 2)(*given))
    close(vjp(scanned, *given)[1](loop(*given)), vjp(loop, *given)[1](loop(*given)))
    close(hessian(loss(scanned), 2)(*given), hessian(loss(loop), 2)(*given))
    close(vmap(grad(loss(scanned), every))(*whole), vmap(grad(loss(loop), every))(*whole))


def test_dual_tensors() -> None:
    given = data()
    for moving in range(3):
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(t, t.cos()) if i == moving else t for i, t in enumerate(given)]
            own, expected = ([forward_ad.unpack_dual(o) for o in f(*duals)] for f in (scanned, loop))
            close(own, expected)


@pytest.mark.parametrize("policy", ["chunked:3", "truncated:3", "truncated:4/2", "randomized:0.5"])
@pytest.mark.parametrize("options", [{}, {"reverse": True}, {"resets": True}])
def test_policies(policy: str, options: dict[str, Any]) -> None:
    """The gradient and its derivative are those outside of transforms; the tangent is the full one."""
    given, options = data(), dict(options)
    if "resets" in options:
        options |= {"resets": torch.rand(T, B, generator=torch.Generator().manual_seed(1)) < 0.3}
        options["reset_state"] = torch.full((B, H), 0.5, dtype=torch.float64)

    def seeded(*given: Tensor, gradient: str = policy) -> Any:
        torch.manual_seed(2)
        return scanned(*given, gradient=gradient, **options)

    leaves = [t.clone().requires_grad_() for t in given]
    first = torch.autograd.grad(loss(seeded)(*leaves), leaves, create_graph=True)
    close(list(grad(loss(seeded), (0, 1, 2))(*given)), list(first))
    second = torch.autograd.grad(sum(g.sin().sum() for g in first), leaves)
    close(list(grad(lambda *t: sum(g.sin().sum() for g in grad(loss(seeded), (0, 1, 2))(*t)), (0, 1, 2))(*given)),
          list(second))  # fmt: skip
    moving = tuple(t.cos() for t in given)
    close(jvp(seeded, given, moving), jvp(lambda *t: seeded(*t, gradient="full"), given, moving))
    with pytest.raises(NotImplementedError, match="forward over reverse"):
        jvp(grad(loss(seeded), 2), given, moving)
    with pytest.raises(NotImplementedError, match="reverse over forward"):
        grad(lambda *t: jvp(loss(seeded), t, moving)[1], 2)(*given)


@pytest.mark.parametrize("gradient", ["full", "truncated:3"])
@pytest.mark.parametrize("form", [{}, {"num_layers": 2}, {"num_layers": 2, "bidirectional": True}])
def test_recurrent(form: dict[str, Any], gradient: str) -> None:
    D = 2 if "bidirectional" in form else 1
    torch.manual_seed(0)
    cells: Any = (lambda n: bptt.nn.cells.MGU(H if n == 0 else D * 4, 4)) if form else bptt.nn.cells.MGU(H, 4)
    layer = bptt.nn.Recurrent(cells, gradient=gradient, **form).double()
    _, x, _ = data()
    weights = {n: p.detach() for n, p in layer.named_parameters()}

    def value(x: Tensor, weights: dict[str, Tensor]) -> Tensor:
        y, final = functional_call(layer, weights, (x,))
        return y.sin().sum() + sum(s.cos().sum() for s in torch.utils._pytree.tree_leaves(final))

    leaf = x.clone().requires_grad_()
    expected = torch.autograd.grad(value(leaf, dict(layer.named_parameters())), [leaf, *layer.parameters()])
    dx, dw = grad(value, (0, 1))(x, weights)
    close([dx, *dw.values()], list(expected))
    per_sample = vmap(grad(value, (0, 1)), (0, None))(torch.stack([x, x / 2]), weights)
    close([per_sample[0][0], *(g[0] for g in per_sample[1].values())], list(expected))
    tangent = jvp(lambda x: value(x, weights), (x,), (torch.ones_like(x),))[1]
    with bptt.using(layer, gradient="full"):
        close(tangent, grad(value)(x, weights).sum())


def test_a_named_kernel_says_so() -> None:
    with pytest.raises(RuntimeError, match="kernel='eager' cannot run this step inside the transforms"):
        grad(loss(scanned, kernel="eager"))(*data())


def test_sequences_of_several_lengths() -> None:
    """Packed ones and flat ones, of which torch's functions read the memory where no transform is."""
    for layer in (bptt.nn.Recurrent(bptt.nn.cells.MGU(H, 4)).double(), bptt.nn.GRU(H, 4, dtype=torch.float64)):
        packed = pack_padded_sequence(data()[1], [4, 9, 2], enforce_sorted=False)
        offsets = torch.tensor([0, 4, 4, 13, 15])

        def of_packed(x: Tensor, layer: Any = layer, packed: Any = packed) -> Tensor:
            y, final = layer(packed._replace(data=x))
            return y.data.sin().sum() + final.cos().sum()

        def of_flat(x: Tensor, layer: Any = layer, offsets: Tensor = offsets) -> Tensor:
            y, final = layer(x, cu_seqlens=offsets)
            return y.sin().sum() + final.cos().sum()

        for value in (of_packed, of_flat):
            leaf = packed.data.clone().requires_grad_()
            (expected,) = torch.autograd.grad(value(leaf), leaf)
            close(grad(value)(packed.data), expected)
            close(vmap(grad(value))(torch.stack([packed.data] * 2)), torch.stack([expected] * 2))
            moving = packed.data.cos()
            close(jvp(value, (packed.data,), (moving,))[1], (expected * moving).sum())
        for x, name in ((data()[1], "lengths"), (packed.data, "cu_seqlens")):
            with pytest.raises(ValueError, match=f"{name} must be the same in all calls of a vmap"):
                vmap(lambda n, layer=layer, x=x, name=name: layer(x, **{name: n})[0])(
                    torch.ones(2, B, dtype=torch.int64)
                )


@pytest.mark.parametrize("kind", ["Recurrent", "GRU"])
def test_no_calls(kind: str) -> None:
    layer: Any = bptt.nn.GRU(H, 4) if kind == "GRU" else bptt.nn.Recurrent(bptt.nn.cells.MGU(H, 4))
    x = torch.zeros(0, 9, B, H, requires_grad=True)
    y = vmap(lambda x: layer(x)[0])(x)
    assert y.shape == (0, 9, B, 4)
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape
    weights = {n: p.detach() for n, p in layer.named_parameters()}
    per_sample = vmap(grad(lambda p, x: functional_call(layer, p, (x,))[0].sum()), (None, 0))(weights, x.detach())
    assert [g.shape for g in per_sample.values()] == [(0, *p.shape) for p in weights.values()]
