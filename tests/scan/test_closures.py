"""`scan` over steps that capture modules and tensors, in every way a step may."""

import copy
import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import bptt
from bptt import Full, Truncated, scan
from bptt.policies import Policy

from .loops import (
    DOUBLE,
    POLICIES,
    B,
    Case,
    H,
    T,
    X,
    expected,
    floats,
    loop,
    measured,
    random,
    weighed,
)

Agree = Callable[..., None]

# torch's compiler itself asks what it is given for its .grad.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

each_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


# What a step may capture


class Product(torch.autograd.Function):
    """Torch function modes do not see its `apply`."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return a * b

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return (grad * b).sum_to_size(a.shape), (grad * a).sum_to_size(b.shape)


def tanh_of(value: Callable[[Tensor], Tensor], *captured: Tensor) -> Case:
    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(value(h) + x)
        return h, h

    return step, random(B, H), random(T, B, H), list(captured)


def leaf_and_what_is_made_of_it() -> Case:
    w = random(H, H)
    twice = 2 * w
    return tanh_of(lambda h: h @ w + torch.sin(h @ twice), w)


def only_what_is_made_of_it() -> Case:
    w = random(H, H)
    view, product = w.t(), w @ w
    return tanh_of(lambda h: h @ view + h @ product, w)


def in_a_list() -> Case:
    w, u = random(2, H), random(H - 2, H)
    return tanh_of(lambda h: h @ torch.cat([w, u], dim=0) + torch.stack([w[0], w[1]]).sum(), w, u)


def used_only_late() -> Case:
    """The first step does not touch it."""
    w = [random(H) for _ in range(T)]
    case = tanh_of(lambda h: h, *w)

    def step(carry: tuple[Tensor, int], x: Tensor) -> tuple[tuple[Tensor, int], Tensor]:
        h, y = case[0](carry[0] * w[carry[1]], x)
        return (h, carry[1] + 1), y

    return step, (case[1], 0), case[2], w


def the_first_carry_and_the_xs() -> Case:
    case = tanh_of(lambda h: h * case[1] + torch.sin(case[2]).sum(0))
    return case


def returned_as_it_is() -> Case:
    w, u = random(B, H), random(B, H)
    made = u * u
    return lambda h, x: (made, (w, h * x)), random(B, H), random(T, B, H), [w, u]


def as_a_mask() -> Case:
    w = random(H)
    return tanh_of(lambda h: torch.where(w > 0, h * w, w), w)


def function() -> Case:
    w = random(H)
    return tanh_of(lambda h: Product.apply(h, w), w)


def function_of_the_captured_alone() -> Case:
    w, u = random(H), random(H)
    return tanh_of(lambda h: h * Product.apply(w, u), w, u)


def function_leaf_and_what_is_made_of_it() -> Case:
    w = random(H)
    twice, square = 2 * w, w * w
    return tanh_of(lambda h: Product.apply(h, w) + Product.apply(twice, square) + h * twice, w)


def of_module(layer: nn.Module) -> Case:
    return tanh_of(layer, *layer.parameters())


def scripted() -> Case:
    """Nothing inside is seen by torch function modes, parameters included."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return of_module(torch.jit.script(nn.Linear(H, H, dtype=DOUBLE)))


def with_weight_norm() -> Case:
    return of_module(parametrizations.weight_norm(nn.Linear(H, H, dtype=DOUBLE)))


def with_spectral_norm() -> Case:
    return of_module(parametrizations.spectral_norm(nn.Linear(H, H, dtype=DOUBLE)).eval())


def with_layer_norm() -> Case:
    return of_module(nn.Sequential(nn.Linear(H, H, dtype=DOUBLE), nn.LayerNorm(H, dtype=DOUBLE)))


def with_evaluated_batch_norm() -> Case:
    return of_module(nn.BatchNorm1d(H, dtype=DOUBLE).eval())


def with_attention() -> Case:
    return of_module(nn.TransformerEncoderLayer(H, 2, 5, dropout=0.0, dtype=DOUBLE))


def with_one_of_our_layers() -> Case:
    layer = bptt.nn.GRU(H, H, dtype=DOUBLE)
    return tanh_of(lambda h: layer(torch.stack([h, h * h]))[0].sum(0), *layer.parameters())


def with_a_scan_inside() -> Case:
    w, u = random(H), random(H)
    twice = 2 * w

    def inner(c: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sin(c * w + x * twice), c * u

    def value(h: Tensor) -> Tensor:
        final, ys = scan(inner, h, torch.stack([h, torch.cos(h)]))
        return final + ys.sum(0)

    return tanh_of(value, w, u)


def with_a_vectorised_part() -> Case:
    w = random(H)
    return tanh_of(torch.func.vmap(lambda row: row * w), w)


def with_a_functional_gradient() -> Case:
    w = random(H)
    return tanh_of(torch.func.grad(lambda h: torch.sin(h * w).sum()), w)


def with_a_checkpoint_inside() -> Case:
    layer = nn.Linear(H, H, dtype=DOUBLE)
    return tanh_of(lambda h: checkpoint(lambda h: torch.sin(layer(h)), h, use_reentrant=False), *layer.parameters())


def compiled() -> Case:
    layer = nn.Linear(H, H, dtype=DOUBLE)
    return tanh_of(torch.compile(layer, backend="eager"), *layer.parameters())


def with_a_gradient_in_a_tensor_of_its_own() -> Case:
    w = random(H)

    def value(h: Tensor) -> Tensor:
        with torch.enable_grad():
            z = h.detach()
            z.requires_grad = True
            return torch.autograd.grad(torch.sin(z * w).sum(), z, create_graph=True)[0]

    return tanh_of(value, w)


def with_a_gradient_inside() -> Case:
    w = random(H)

    def value(h: Tensor) -> Tensor:
        with torch.enable_grad():
            energy = torch.sin(h.requires_grad_() * w).sum()
            return torch.autograd.grad(energy, h, create_graph=True)[0]

    return tanh_of(value, w)


def partly_without_grad() -> Case:
    w = random(H)

    def value(h: Tensor) -> Tensor:
        with torch.no_grad():
            scale = (w * w).sum()
        return h * w * scale

    return tanh_of(value, w)


CLOSURES = {
    maker.__name__: maker
    for maker in [
        leaf_and_what_is_made_of_it,
        only_what_is_made_of_it,
        in_a_list,
        used_only_late,
        the_first_carry_and_the_xs,
        returned_as_it_is,
        as_a_mask,
        function,
        function_of_the_captured_alone,
        function_leaf_and_what_is_made_of_it,
        scripted,
        compiled,
        with_weight_norm,
        with_spectral_norm,
        with_layer_norm,
        with_evaluated_batch_norm,
        with_attention,
        with_one_of_our_layers,
        with_a_scan_inside,
        with_a_vectorised_part,
        with_a_functional_gradient,
        with_a_checkpoint_inside,
        with_a_gradient_inside,
        with_a_gradient_in_a_tensor_of_its_own,
        partly_without_grad,
    ]
}


@pytest.mark.parametrize("name", CLOSURES)
@pytest.mark.parametrize("policy", [Full(), Truncated(3, every=2)], ids=str)
@pytest.mark.parametrize("memory", ["auto", "states"])
def test_closures(name: str, policy: Policy, memory: str, agree: Agree) -> None:
    case = CLOSURES[name]()
    agree(measured(case, policy, memory=memory), expected(case, policy))


@pytest.mark.parametrize("name", [n for n in CLOSURES if n not in ("with_attention",)])
@pytest.mark.parametrize("memory", ["auto", "states"])
def test_second_derivatives_of_closures(name: str, memory: str, agree: Agree) -> None:
    case = CLOSURES[name]()
    inputs = [*floats(case[1]), *floats(case[2]), *case[3]]
    second = []
    for run in (lambda: scan(*case[:3], memory=memory)[0], lambda: loop(*case[:3], T)[0]):
        grads = torch.autograd.grad(weighed(floats(run()), 0), inputs, create_graph=True, materialize_grads=True)
        penalty = torch.stack([(g * g).sum() for g in grads]).sum()
        second.append(torch.autograd.grad(penalty, inputs, materialize_grads=True, retain_graph=True))
    agree(*second)


@pytest.mark.parametrize("name", ["leaf_and_what_is_made_of_it", "function", "function_leaf_and_what_is_made_of_it"])
def test_hooks_on_captured_tensors_see_the_whole_gradient(name: str, agree: Agree) -> None:
    case = CLOSURES[name]()
    want = expected(case, Truncated(3))
    seen = []

    def halve(grad: Tensor) -> Tensor:
        seen.append(grad)
        return grad / 2

    case[3][0].register_hook(halve)
    *rest, got = measured(case, Truncated(3))
    agree([*rest, got], [*want[:-1], want[-1] / 2])
    agree(seen[-1], want[-1])
    if name != "function":
        return
    assert all(not other.any() for other in seen[:-1])


def test_accumulated_gradients_and_module_hooks(agree: Agree) -> None:
    cell = nn.GRUCell(X, H, dtype=DOUBLE)
    order = []
    for name, p in cell.named_parameters():
        p.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    case = (lambda h, x: (cell(x, h),) * 2), random(B, H), random(T, B, X), list(cell.parameters())
    want = expected(case, Full())[2:]
    _, ys = scan(*case[:3])
    final, ys = scan(*case[:3])
    torch.stack([*(weighed([y], t) for t, y in enumerate(ys)), weighed([final], 1000)]).sum().backward()
    agree([p.grad for p in cell.parameters()], want)
    assert sorted(order) == sorted(name for name, _ in cell.named_parameters())


def test_a_closure_that_is_replaced_before_backward(agree: Agree) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(H, H, dtype=DOUBLE)

        def forward(self, h: Tensor, xs: Tensor) -> Tensor:
            return scan(lambda h, x: (torch.tanh(self.layer(h)) + x,) * 2, h, xs, kernel="replay")[1]

    net = Net()
    others = {name: (2 * p).detach().requires_grad_() for name, p in net.named_parameters()}
    ys = functional_call(net, others, (random(B, H), random(T, B, H)))
    for create_graph in (False, True):
        with pytest.raises(RuntimeError, match=r"uses a parameter \[4(, 4)?\] that it did not use in forward"):
            torch.autograd.grad(ys.sum(), list(others.values()), create_graph=create_graph)


# Side effects of a step


def test_running_statistics_are_updated_once() -> None:
    norm = nn.BatchNorm1d(H, dtype=DOUBLE)
    plain = copy.deepcopy(norm)
    h, xs = random(B, H), random(T, B, H)
    _, ys = scan(lambda h, x: (norm(h) + x, h), h, xs, gradient=Truncated(2))
    ys.square().sum().backward()
    loop(lambda h, x: (plain(h) + x, h), h, xs, T)
    for name, value in plain.named_buffers():
        torch.testing.assert_close(norm.get_buffer(name), value)


@pytest.mark.parametrize("create_graph", [False, True])
def test_everything_is_freed(create_graph: bool) -> None:
    step, carry, xs, captured = CLOSURES["function"]()
    gc.collect()
    gc.disable()
    try:
        final, ys = scan(step, carry, xs, gradient=Truncated(2))
        refs = [weakref.ref(final.grad_fn)]
        grads = torch.autograd.grad(final.sum() + ys.sum(), [carry, *captured], create_graph=create_graph)
        refs += [weakref.ref(g) for g in grads]
        del final, ys, grads
        assert [ref() for ref in refs] == [None] * 3
    finally:
        gc.enable()
