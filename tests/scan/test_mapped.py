"""`scan` under torch.func.vmap and a gradient by a compiled step, whose rows are those of all calls, against a loop."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves, tree_map

import bptt

V, T, B, H = 4, 11, 3, 2

generator = torch.Generator().manual_seed(5)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


W, PER_LANE = drawn(H, H).requires_grad_(), drawn(B, H).requires_grad_()


def rows(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    h = torch.tanh(h @ W + x)
    return h, h * W.sum()


def captured_lanes(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    h = torch.tanh(h @ W + x * PER_LANE)
    return h, h.sum(-1)


def one_row(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    h = torch.tanh(h @ W + x)
    return h, (h / h.norm()).sum()


STEPS: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "rows": (rows, (B, H)),
    "captured lanes": (captured_lanes, (B, H)),
    "one row": (one_row, (H,)),
}


def loop(step: Callable[..., Any], h: Any, xs: Any) -> Any:
    ys = []
    for t in range(T):
        h, y = step(h, tree_map(lambda x: x[t], xs))  # noqa: B023
        ys.append(y)
    return h, tree_map(lambda *y: torch.stack(y), *ys)


def loss(f: Callable[..., Any]) -> Callable[..., Tensor]:
    return lambda h, x: sum(o.sin().sum() for o in tree_leaves(f(h, x)) if o.is_floating_point())


def close(own: Any, expected: Any) -> None:
    torch.testing.assert_close(own, expected, rtol=1e-10, atol=1e-10)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """No call may run as a plain loop."""
    bptt.scan(rows, drawn(1, H), drawn(2, 1, H))  # loads the module

    def refused(*_: Any) -> None:
        raise AssertionError("a plain loop")

    monkeypatch.setattr(sys.modules["bptt.scan.function"], "by_plain_loop", refused)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("kind", STEPS)
def test_as_a_loop(kind: str) -> None:
    step, shape = STEPS[kind]
    h, xs = drawn(V, *shape), drawn(V, T, *shape)

    def own(h: Tensor, x: Tensor) -> Any:
        return bptt.scan(step, h, x)

    def plain(h: Tensor, x: Tensor) -> Any:
        return loop(step, h, x)

    last = xs.movedim(0, -1).contiguous()
    both: list[Callable[[Any], Any]] = [
        lambda f: vmap(f)(h, xs),
        lambda f: vmap(f, (None, 0))(h[0], xs),
        lambda f: vmap(f, (0, None), out_dims=(1, -1))(h, xs[0]),
        lambda f: vmap(f, (0, -1), out_dims=(-1, 0))(h, last),
        lambda f: vmap(vmap(f, (None, 0)), (0, None))(h, xs),
        lambda f: vmap(grad(loss(f), (0, 1)))(h, xs),
        lambda f: grad(loss(f), (0, 1))(h[0], xs[0]),
        lambda f: vmap(jacrev(f, (0, 1)))(h[:2], xs[:2]),
    ]
    for of in both:
        close(of(own), of(plain))
    with torch.no_grad():
        close(vmap(own)(h, xs), vmap(plain)(h, xs))

    def outside(f: Any) -> Any:  # ordinary autograd around vmap, twice; the second time by operations of torch
        leaves = [h.clone().requires_grad_(), xs.clone().requires_grad_(), W, PER_LANE][: 4 if shape == (B, H) else 3]
        used = leaves if step is captured_lanes else leaves[:3]
        first = torch.autograd.grad(loss(vmap(f))(*used[:2]), used, create_graph=True)
        return first, torch.autograd.grad(sum(g.sin().sum() for g in first), used)

    close(outside(own), outside(plain))


def test_many_cotangents_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["bptt.engine.mapped"], "MOST_VALUES", 500)
    h, xs = drawn(B, H), drawn(T, B, H)
    close(jacrev(lambda h, x: bptt.scan(rows, h, x), (0, 1))(h, xs), jacrev(lambda *a: loop(rows, *a), (0, 1))(h, xs))
    layer = bptt.nn.GRU(H, 3, dtype=torch.float64)
    close(jacrev(lambda x: layer(x)[0])(xs), torch.autograd.functional.jacobian(lambda x: layer(x)[0], xs))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("policy", ["chunked:4", "truncated:4", "truncated:5/2"])
def test_policies(policy: str) -> None:
    h, xs = drawn(V, B, H), drawn(V, T, B, H)
    own = vmap(grad(loss(lambda h, x: bptt.scan(rows, h, x, gradient=policy)), (0, 1)))(h, xs)
    for v in range(V):
        leaves = [h[v].clone().requires_grad_(), xs[v].clone().requires_grad_()]
        close([g[v] for g in own], list(torch.autograd.grad(
            loss(lambda h, x: bptt.scan(rows, h, x, gradient=policy))(*leaves), leaves)))  # fmt: skip


@pytest.mark.usefixtures("compiled")
def test_trees() -> None:
    def step(c: Any, x: Any) -> Any:
        h = torch.tanh(c["h"] @ W + x[0])
        return {"h": h, "n": c["n"] + 1, "k": c["k"] * 0.5 + h.sum(-1)}, {"y": h, "n": c["n"], "q": x[1] * h[..., 0]}

    first = {"h": drawn(V, B, H), "n": torch.arange(V * B).view(V, B), "k": drawn(V, B)}
    xs = drawn(V, T, B, H), drawn(V, T, B)
    close(vmap(lambda c, x: bptt.scan(step, c, x))(first, xs), vmap(lambda c, x: loop(step, c, x))(first, xs))

    def of(f: Any) -> Any:
        rest = {k: v[0] for k, v in first.items()}
        return vmap(grad(lambda h, x: loss(lambda h, x: f(step, {**rest, "h": h}, x))(h, x), (0, 1)))(first["h"], xs)

    close(of(bptt.scan), of(loop))


def test_what_runs_as_a_loop() -> None:
    """Where the compiled step has no way, results are those of the loop all the same."""
    h, xs, w = drawn(V, B, H), drawn(V, T, B, H), W.detach()

    def by(f: Any) -> Any:
        return lambda w, h, x: loss(lambda h, x: f(lambda h, x: (torch.tanh(h @ w + x),) * 2, h, x))(h, x)

    for _ in range(2):
        close(vmap(grad(by(bptt.scan)), (None, 0, 0))(w, h, xs), vmap(grad(by(loop)), (None, 0, 0))(w, h, xs))
    close(vmap(by(bptt.scan))(torch.stack([w] * V), h, xs), vmap(by(loop))(torch.stack([w] * V), h, xs))
    layer = bptt.nn.Recurrent(bptt.nn.cells.MGU(H, 3)).double()
    weights = {name: p.detach() for name, p in layer.named_parameters()}
    own = vmap(grad(lambda p, x: functional_call(layer, p, (x,))[0].sin().sum()), (None, 0))(weights, xs)
    for v in range(V):
        expected = torch.autograd.grad(layer(xs[v])[0].sin().sum(), list(layer.parameters()))
        close([g[v] for g in own.values()], list(expected))


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_draws_follow_vmaps_randomness(randomness: str) -> None:
    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(h @ W + x) + torch.randn_like(h)
        return h, h

    h, xs, results = drawn(V, B, H), drawn(V, T, B, H), []
    for f in (bptt.scan, loop):
        torch.manual_seed(1)
        results.append(vmap(lambda h, x: f(step, h, x), randomness=randomness)(h, xs))  # noqa: B023
    close(*results)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_a_tangent_of_what_vjp_returned() -> None:
    h, xs, own = drawn(B, H), drawn(T, B, H), []
    for f in (bptt.scan, loop):
        (_, ys), back = vjp(lambda h, x: f(rows, h, x), h, xs)  # noqa: B023
        own.append(jvp(lambda c: back((c, ys)), (h,), (h.cos(),)))  # noqa: B023
    close(*own)


def test_a_step_that_changes_something_is_run_itself() -> None:
    calls: list[int] = []

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(1)
        return torch.tanh(h @ W + x), h

    h, xs = drawn(V, B, H), drawn(V, T, B, H)
    vmap(lambda h, x: bptt.scan(step, h, x))(h, xs)
    assert len(calls) == T
