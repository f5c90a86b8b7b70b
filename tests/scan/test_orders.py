"""Derivatives of every order: those of the policy's graph, written here as plain loops with `detach`."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from reference import Fixed
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from bptt import Adaptive, Chunked, Full, Randomized, Truncated, scan
from bptt.policies import Policy

from .loops import (
    DOUBLE,
    RESETS,
    Agree,
    B,
    Case,
    FixedTruncated,
    H,
    T,
    X,
    beside,
    factors,
    floats,
    is_float,
    lstm,
    random,
    rnn,
    softmax_over_rows,
    tree,
    weighed,
)


class Scaled(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, c: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return c.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.saved_tensors[0], None


Segment = tuple[int, int, int]  # the step before which the carry is detached, the first and the last loss

SEGMENTS: dict[str, list[Segment]] = {
    "full": [(0, 0, T - 1)],
    "chunked": [(0, 0, 2), (3, 3, 5), (6, 6, 6)],
    "chunked_one": [(t, t, t) for t in range(T)],
    "truncated": [(max(0, t - 2), t, t) for t in range(T)],
    "truncated_one": [(t, t, t) for t in range(T)],
    "truncated_every": [(0, 0, 1), (0, 2, 3), (2, 4, 5), (3, 6, 6)],
    "adaptive": [(max(0, t - 1), t, t) for t in range(T)],
}
POLICIES: dict[str, Policy] = {
    "full": Full(),
    "chunked": Chunked(3),
    "chunked_one": Chunked(1),
    "truncated": Truncated(3),
    "truncated_one": Truncated(1),
    "truncated_every": Truncated(4, every=2),
    "adaptive": Adaptive(0.5, 5, window=2),
}
each_policy = pytest.mark.parametrize("name", POLICIES)


def graph(
    case: Case,
    segments: Sequence[Segment],
    *,
    xi: Tensor | None = None,
    resets: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Any, list[Any]]:
    """The final carry, and the ys in time's order: one loop per segment, of which only its own losses are taken."""
    step, carry, xs, _ = case
    T = len(floats(xs)[0])
    ys: list[Any] = [None] * T
    final = carry
    for detached, first, last in segments:
        final = carry
        for t in range(last + 1):
            now = T - 1 - t if reverse else t

            def enter(c: Any, t: int = t, now: int = now, detached: int = detached) -> Any:
                if is_float(c) and xi is not None:
                    c = Scaled.apply(c, beside(xi[t], c))
                if is_float(c) and t == detached > 0:
                    c = c.detach()
                if isinstance(c, Tensor) and resets is not None:
                    c = torch.where(beside(resets[now], c), torch.zeros_like(c), c)
                return c

            final, y = step(tree_map(enter, final), tree_map(lambda x, now=now: x[now], xs))
            if t >= first:
                ys[now] = y
    return final, ys


def curved(final: Any, ys: Sequence[Any]) -> Tensor:
    """A loss that is not linear in the ys nor in the final carry, and joins steps that lie apart."""
    per_step = torch.stack([weighed(floats(y), t) for t, y in enumerate(ys)])
    return (per_step.sin() * per_step.flip(0)).sum() + weighed(floats(final), 1000).square() + per_step.sum() ** 3 / 50


def unstacked(ys: Any, T: int) -> list[Any]:
    return [tree_map(lambda y, t=t: y[t] if isinstance(y, Tensor) else y, ys) for t in range(T)]


def orders(loss: Tensor, inputs: Sequence[Tensor], count: int) -> list[list[Tensor]]:
    """The gradient; the gradient of a curved function of it; and so on."""
    found = []
    for n in range(count):
        grads = torch.autograd.grad(loss, inputs, create_graph=True, materialize_grads=True)
        found.append([g.detach() for g in grads])
        loss = torch.stack([weighed([g, g * g], n + i) for i, g in enumerate(grads)]).sum()
    return found


def agree_in_all_orders(
    case: Case,
    policy: Policy,
    segments: Sequence[Segment],
    agree: Agree,
    count: int = 3,
    memory: str = "auto",
    **kw: Any,
) -> None:
    inputs = [*floats(case[1]), *floats(case[2]), *case[3]]
    T = len(floats(case[2])[0])
    want = orders(curved(*graph(case, segments, **kw)), inputs, count)
    kw.pop("xi", None)
    final, ys = scan(*case[:3], gradient=policy, memory=memory, **kw)
    got = orders(curved(final, unstacked(ys, T)), inputs, count)
    for order, (a, b) in enumerate(zip(got, want, strict=True)):
        agree(a, b, f"order {order + 1}")


@pytest.mark.parametrize(("policy", "second"), [("full", 10.14), ("chunked:1", 1.69), ("truncated:1", 1.69)])
def test_two_steps_of_a_linear_net(policy: str, second: float) -> None:
    """y_2 = w y_1, y_1 = w: L = y_2^2 / 2 has the second derivative 6 w^2, and y_1^2 where y_1 is detached."""
    w = torch.tensor(1.3, dtype=DOUBLE, requires_grad=True)
    _, ys = scan(lambda h, _: (w * h, w * h), torch.ones((), dtype=DOUBLE), length=2, gradient=policy)
    (first,) = torch.autograd.grad(ys[1] ** 2 / 2, w, create_graph=True)
    (got,) = torch.autograd.grad(first, w)
    assert got.item() == pytest.approx(second, rel=1e-12)


@pytest.mark.parametrize("make", [rnn, lstm, softmax_over_rows])
@pytest.mark.parametrize("memory", ["auto", "states"])
@each_policy
def test_losses_that_are_not_linear(name: str, make: Callable[[], Case], memory: str, agree: Agree) -> None:
    agree_in_all_orders(make(), POLICIES[name], SEGMENTS[name], agree, memory=memory)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("make", [lstm, tree])
@each_policy
def test_resets(name: str, make: Callable[[], Case], reverse: bool, agree: Agree) -> None:
    agree_in_all_orders(make(), POLICIES[name], SEGMENTS[name], agree, 2, resets=RESETS, reverse=reverse)


@pytest.mark.parametrize("resets", [None, RESETS], ids=["", "resets"])
@pytest.mark.parametrize("windows", ["full", "truncated_every"])
def test_factors(windows: str, resets: Tensor | None, agree: Agree) -> None:
    xi = factors(B)
    policy = Fixed(xi) if windows == "full" else FixedTruncated(4, 2, xi)
    agree_in_all_orders(lstm(), policy, SEGMENTS[windows], agree, xi=xi, resets=resets)


@pytest.mark.parametrize("policy", [Randomized(0.6), Randomized.polynomial(3.0)], ids=str)
def test_randomized(policy: Policy, agree: Agree) -> None:
    torch.manual_seed(11)
    xi = policy.draw(T, B)
    assert xi is not None
    torch.manual_seed(11)
    case = lstm()
    torch.manual_seed(11)
    agree_in_all_orders(case, policy, SEGMENTS["full"], agree, xi=xi)


@each_policy
def test_a_captured_module(name: str, agree: Agree) -> None:
    """A module with an autograd.Function in it, which torch function modes do not see, and a tensor made of a leaf."""
    net = nn.Sequential(nn.Linear(X + H, H, dtype=DOUBLE), nn.Tanh(), nn.Linear(H, H, dtype=DOUBLE))
    w = random(H)
    square = w * w

    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
            ctx.save_for_backward(a, b)
            return a**3 * b

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
            a, b = ctx.saved_tensors
            return 3 * a * a * b * grad, (grad * a**3).sum(0)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.sin(net(torch.cat([x, h], 1)) + Cube.apply(h, w) + h * square)
        return h, h * w

    agree_in_all_orders(
        (step, random(B, H), random(T, B, X), [w, *net.parameters()]), POLICIES[name], SEGMENTS[name], agree
    )


def test_with_checkpoints(agree: Agree) -> None:
    agree_in_all_orders(lstm(), Truncated(4, every=2), SEGMENTS["truncated_every"], agree, 2)
    case = lstm()
    inputs = [*floats(case[1]), *floats(case[2]), *case[3]]
    found = []
    for memory in ("auto", "checkpoints:steps=2"):
        final, ys = scan(*case[:3], gradient=Truncated(3), memory=memory)
        found.append(orders(curved(final, unstacked(ys, T)), inputs, 2))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("policy", [Chunked(2), Truncated(1), Fixed(torch.tensor([[1.0], [1], [0]]).double())], ids=str)
def test_nothing_crosses_a_cut_not_even_a_nan(policy: Policy) -> None:
    """The state that enters step 2 is 0, where the square root has an infinite slope."""
    w = random(1)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, None]:
        return torch.sqrt(h) + w * x if x > 1.5 else w * x - w.detach() * x, None

    h, xs = random(1), torch.tensor([1.0, 1.0, 2.0], dtype=DOUBLE)[:, None].requires_grad_()
    final, _ = scan(step, h, xs, gradient=policy)
    loss = final.square().sum()
    (first,) = torch.autograd.grad(loss, w, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), w)
    torch.testing.assert_close((first, second), (8 * w, torch.full_like(w, 8)), check_dtype=True)
