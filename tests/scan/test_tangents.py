"""`scan` in forward mode, in gradients of gradients and with wrapped captures by a compiled step, against a loop."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jvp, vmap
from torch.utils._pytree import tree_leaves, tree_map

import bptt

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # by torch's own forward mode

V, T, B, H = 3, 9, 2, 3

generator = torch.Generator().manual_seed(6)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


W, PER_LANE = drawn(H, H).requires_grad_(), drawn(B, H)


def two_leaves(c: Any, x: Any) -> Any:
    h = torch.tanh(c["h"] @ W + x[0] * PER_LANE) + c["c"]
    return {"h": h, "c": torch.sigmoid(x[0]) * c["c"], "n": c["n"] + 1}, (h * W.sum(), c["n"], h.sum(-1) * x[1])


def one_row(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    h = torch.tanh(h @ W + x)
    return h, (h / h.norm()).sum()


STEPS: dict[str, tuple[Callable[..., Any], Callable[[Tensor], Any], Any]] = {
    "two leaves": (two_leaves, lambda h: {"h": h, "c": h.cos(), "n": torch.arange(B)}, (T, B)),
    "one row": (one_row, lambda h: h[0], None),
}


def loop(step: Callable[..., Any], carry: Any, xs: Any) -> Any:
    ys = []
    for t in range(T):
        carry, y = step(carry, tree_map(lambda x: x[t], xs))  # noqa: B023
        ys.append(y)
    return carry, tree_map(lambda *y: torch.stack(y), *ys)


def close(own: Any, expected: Any) -> None:
    torch.testing.assert_close(own, expected, rtol=1e-10, atol=1e-10)


def value(results: Any) -> Tensor:
    return sum(o.sin().sum() for o in tree_leaves(results) if o.is_floating_point())


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """No call may run as a plain loop, and no tangent may be one of a loop."""
    bptt.scan(one_row, drawn(H), drawn(2, H))  # loads the module

    def refused(*_: Any) -> None:
        raise AssertionError("a plain loop")

    monkeypatch.setattr(sys.modules["bptt.scan.function"], "by_plain_loop", refused)
    monkeypatch.setattr(sys.modules["bptt.engine.mapped_steps"].torch.func, "jvp", jvp)
    monkeypatch.setattr(sys.modules["bptt.engine.mapped_steps"].MappedSteps, "by_loop", refused)
    monkeypatch.setattr(sys.modules["bptt.scan.mapped_call"], "is_smooth", lambda *_: True)  # which looks at a loop


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("kind", STEPS)
def test_tangents_and_what_is_made_of_them(kind: str) -> None:
    step, first, more = STEPS[kind]
    h, x = drawn(B, H), drawn(T, B, H) if more else drawn(T, H)
    rest = drawn(*more) if more else None

    def of(run: Callable[..., Any]) -> Callable[..., Any]:
        return lambda h, x: run(step, first(h), x if rest is None else (x, rest))

    def loss(run: Callable[..., Any]) -> Callable[..., Tensor]:
        return lambda h, x: value(of(run)(h, x))

    def floats(results: Any) -> list[Tensor]:
        return [t for t in tree_leaves(results) if t.is_floating_point()]

    moving = h.cos(), x.cos()
    both: list[Callable[[Any], Any]] = [
        lambda run: jvp(lambda *a: floats(of(run)(*a)), (h, x), moving),
        lambda run: jvp(lambda x: floats(of(run)(h, x)), (x,), moving[1:]),
        lambda run: jacfwd(lambda x: floats(of(run)(h, x)))(x),
        lambda run: vmap(lambda x: jvp(lambda x: floats(of(run)(h, x)), (x,), (x.cos(),))[1])(torch.stack([x, -x])),
        lambda run: jvp(lambda *a: grad(loss(run), (0, 1))(*a), (h, x), moving),
        lambda run: grad(lambda *a: jvp(loss(run), a, moving)[1], (0, 1))(h, x),
        lambda run: jvp(lambda x: jvp(lambda x: loss(run)(h, x), (x,), (x.sin(),))[1], (x,), moving[1:]),
        lambda run: grad(lambda *a: sum(g.sin().sum() for g in grad(loss(run), (0, 1))(*a)), (0, 1))(h, x),
        lambda run: hessian(lambda h: loss(run)(h, x))(h),
    ]
    for each in both:
        close(each(bptt.scan), each(loop))


@pytest.mark.usefixtures("compiled")
def test_dual_tensors_of_captured_ones() -> None:
    h, x = drawn(B, H), drawn(T, B, H)
    with forward_ad.dual_level():
        w = forward_ad.make_dual(W.detach(), W.detach().cos())

        def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            h = torch.tanh(h @ w + x)
            return h, h.sin()

        own, expected = ([forward_ad.unpack_dual(o) for o in run(step, h, x)] for run in (bptt.scan, loop))
        close(own, expected)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("options", [{}, {"gradient": "randomized:0.6"}, {"gradient": "truncated:3", "reverse": True}])
def test_resets_and_factors(options: dict[str, Any]) -> None:
    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(h @ W + x)
        return h, h.cos()

    h, x, x_of_each = drawn(B, H), drawn(T, B, H), drawn(V, T, B, H)
    r_of_each = torch.rand(V, T, B, generator=generator) < 0.3
    restart = {"resets": r_of_each[0], "reset_state": drawn(T, B, H)}

    def loss(kernel: str, **more: Any) -> Callable[..., Tensor]:
        return lambda h, x: value(bptt.scan(step, h, x, kernel=kernel, **options, **more))

    def per_sample(kernel: str, mapped: bool, **more: Any) -> Any:
        if not mapped:
            return vmap(grad(loss(kernel, **more), (0, 1)), (None, 0), randomness="same")(h, x_of_each)
        of = lambda h, x, r: loss(kernel, resets=r)(h, x)  # noqa: E731
        return vmap(grad(of, (0, 1)), (None, 0, 0), randomness="same")(h, x_of_each, r_of_each)

    for each in (
        lambda kernel: per_sample(kernel, False),
        lambda kernel: per_sample(kernel, False, resets=r_of_each[0]),
        lambda kernel: per_sample(kernel, False, resets=r_of_each[0, :, 0]),
        lambda kernel: per_sample(kernel, False, **restart),
        lambda kernel: per_sample(kernel, True),
        lambda kernel: jvp(loss(kernel, **restart), (h, x), (h.cos(), x.cos())),
    ):
        results = []
        for kernel in ("auto", "replay"):
            torch.manual_seed(3)
            with pytest.MonkeyPatch.context() as patched:
                if kernel == "replay":
                    patched.setattr(sys.modules["bptt.scan.function"], "by_plain_loop", _plain())
                results.append(each(kernel))
        close(*results)


def _plain() -> Any:
    return sys.modules["bptt.scan.plain_loop"].by_plain_loop


@pytest.mark.usefixtures("compiled")
def test_what_transforms_have_wrapped_is_captured() -> None:
    h, x, w = drawn(B, H), drawn(V, T, B, H), W.detach()

    def by(run: Any) -> Callable[..., Tensor]:
        return lambda w, x: value(run(lambda h, x: (torch.tanh(h @ w + x), h * w.sum()), h, x))

    for each in (
        lambda run: vmap(grad(by(run), (0, 1)), (None, 0))(w, x),
        lambda run: jvp(lambda w: by(run)(w, x[0]), (w,), (w.cos(),)),
        lambda run: jvp(lambda w: grad(by(run))(w, x[0]), (w,), (w.cos(),)),
        lambda run: hessian(lambda w: by(run)(w, x[0]))(w),
    ):
        close(each(bptt.scan), each(loop))
    layer = bptt.nn.Recurrent(bptt.nn.cells.MGU(H, 4)).double()
    before = dict(layer.named_parameters())
    weights = {name: p.detach().clone() for name, p in before.items()}
    for scale in (1.0, 0.5):  # other weights than the trace was made with
        weights = {name: p * scale for name, p in weights.items()}
        own = vmap(grad(lambda p, x: functional_call(layer, p, (x,))[0].sin().sum()), (None, 0))(weights, x)
        assert all(p is before[name] for name, p in layer.named_parameters())
        for v in range(V):
            leaves = [p.clone().requires_grad_() for p in weights.values()]
            y = functional_call(layer, dict(zip(weights, leaves, strict=True)), (x[v],))[0]
            close([g[v] for g in own.values()], list(torch.autograd.grad(y.sin().sum(), leaves)))


class Spike(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(v: Tensor) -> Tensor:
        return (v > 0).to(v.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad / (1 + ctx.saved_tensors[0].abs()) ** 2


def spiking(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    h = 0.9 * h + x @ W
    s = Spike.apply(h - 0.5)
    return h * (1 - s), s * h.sin()


def detaching(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    h = torch.tanh(0.5 * h.detach() + 0.3 * h + x)
    return h, h


@pytest.mark.parametrize("step", [spiking, detaching])
def test_a_gradient_that_is_no_derivative(step: Callable[..., Any]) -> None:
    """First gradients are the step's own, compiled; those of higher order too, or an error, never the operations'."""
    h, x = drawn(V, B, H), drawn(V, T, B, H)

    def loss(run: Any, **options: Any) -> Callable[..., Tensor]:
        return lambda h, x: value(run(step, h, x, **options))

    close(vmap(grad(loss(bptt.scan), (0, 1)))(h, x), vmap(grad(loss(loop), (0, 1)))(h, x))

    def twice(run: Any, **options: Any) -> Any:
        leaves = h.clone().requires_grad_(), x.clone().requires_grad_()
        first = torch.autograd.grad(vmap(loss(run, **options))(*leaves).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.sin().sum() for g in first), leaves)

    with pytest.raises(NotImplementedError, match=r"its step detaches, or has an autograd\.Function"):
        twice(bptt.scan)
    close(twice(bptt.scan, kernel="replay"), twice(loop))
    nested = [grad(lambda *a, run=run: sum(g.sin().sum() for g in grad(loss(run), (0, 1))(*a)), (0, 1))(h[0], x[0])
              for run in (bptt.scan, loop)]  # fmt: skip
    close(*nested)
    if step is detaching:
        close(*(jvp(loss(run), (h[0], x[0]), (h[1], x[1])) for run in (bptt.scan, loop)))


@pytest.mark.parametrize(
    "options", [{}, {"gradient": "truncated:3"}, {"memory": "checkpoints:steps=4"}, {"gradient": "randomized:0.5"}]
)
@pytest.mark.parametrize("resets", [False, True])
def test_batched_cotangents_are_rows(options: dict[str, Any], resets: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(c: Any, x: Any) -> Any:
        h = torch.tanh(c[0] @ W + x[0]) * lanes + c[1]
        return (h, 0.5 * c[1] + h), h * x[1][..., None]

    lanes = PER_LANE.clone().requires_grad_()
    h, x, z = (t.requires_grad_() for t in (drawn(B, H), drawn(T, B, H), drawn(T, B)))
    more = {"resets": torch.rand(T, B, generator=generator) < 0.3} if resets else {}
    torch.manual_seed(1)
    (last, _), ys = bptt.scan(step, (h, h.sin()), (x, z), **options, **more)
    of_last, of_ys, leaves = drawn(V, B, H), drawn(V, T, B, H), [h, x, z, W, lanes]
    sweeps: list[int] = []
    back = sys.modules["bptt.engine.steps"].StepProgram.backward
    monkeypatch.setattr(
        sys.modules["bptt.engine.steps"].StepProgram, "backward", lambda *a: (sweeps.append(1), back(*a))[1]
    )
    own = torch.autograd.grad((last, ys), leaves, (of_last, of_ys), is_grads_batched=True, retain_graph=True)
    assert len(sweeps) == 1
    each = [torch.autograd.grad((last, ys), leaves, (of_last[v], of_ys[v]), retain_graph=True) for v in range(V)]
    close(list(own), [torch.stack(g) for g in zip(*each, strict=True)])
