"""A layer is a good citizen of autograd: derivatives of every order, hooks, frozen parts, modes, copies."""

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import CELLS, NETS, Case, Fixed, as_hx, as_tuple, build, case, gradients, measure, ours
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence

import bptt
from bptt.kernels import Eager

Agree = Callable[..., None]

each_cell = pytest.mark.parametrize("cell", CELLS)
each_net = pytest.mark.parametrize("net", NETS)


def policies(T: int, B: int, rows: int) -> dict[str, bptt.policies.Policy]:
    generator = torch.Generator().manual_seed(12)
    xi = [2 * torch.rand(T, B, generator=generator, dtype=torch.float64) for _ in range(rows)]
    return {
        "full": bptt.Full(),
        "chunked": bptt.Chunked(2),
        "truncated": bptt.Truncated(2),
        "truncated_every": bptt.Truncated(3, every=2),
        "fixed": Fixed(*xi),
    }


def as_function(layer: Any, **kw: Any) -> Callable[..., tuple[Tensor, ...]]:
    """The layer as a function of (x, initial state, parameters) to (y, final state)."""
    names = [name for name, _ in layer.named_parameters()]
    states = 2 if layer.mode == "LSTM" else 1

    def function(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        parameters = dict(zip(names, rest[states:], strict=True))
        y, final = functional_call(layer, parameters, (x, as_hx(rest[:states])), kw)
        return (y, *as_tuple(final))

    return function


def leaves(layer: Any, data: Case) -> list[Tensor]:
    tensors = [data.x, *data.initial, *layer.parameters()]
    return [z.detach().clone().requires_grad_() for z in tensors]


# Numerical derivatives


def flattened(function: Callable[..., tuple[Tensor, ...]], like: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """The function from one vector to one vector: a check along one random direction then covers every argument."""

    def flat(vector: Tensor) -> Tensor:
        parts = [part.view(z.shape) for part, z in zip(vector.split([z.numel() for z in like]), like, strict=True)]
        return torch.cat([z.reshape(-1) for z in function(*parts)])

    return flat


def check(function: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor], *, second: bool = False) -> None:
    """The first derivative, or the derivative of the gradient, against finite differences."""
    flat = flattened(function, inputs)
    vector = torch.cat([z.detach().reshape(-1) for z in inputs]).requires_grad_()
    if second:
        generator = torch.Generator().manual_seed(13)
        cotangent = torch.randn(flat(vector).shape, generator=generator, dtype=torch.float64).requires_grad_()
        assert gradgradcheck(flat, [vector], [cotangent], fast_mode=True)
    else:
        assert gradcheck(flat, [vector], fast_mode=True)


def packed_function(layer: Any, lengths: tuple[int, ...]) -> Callable[..., tuple[Tensor, ...]]:
    def function(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(17)  # dropout
        y, *final = as_function(layer)(pack_padded_sequence(x, lengths, enforce_sorted=False), *rest)
        return (y.data, *final)

    return function


RESETS = torch.tensor([[1, 0], [0, 0], [1, 1], [0, 0]]).bool()


@each_cell
@each_net
@pytest.mark.parametrize("memory", ["gates", "states"])
def test_gradcheck(cell: str, net: str, memory: str) -> None:
    layer = ours(build(cell, I=2, H=3, **NETS[net]), memory=memory)
    check(as_function(layer), leaves(layer, case(layer, T=4, B=2)))


@each_cell
def test_gradcheck_of_every_entry(cell: str) -> None:
    layer = ours(build(cell, I=1, H=3))
    assert gradcheck(as_function(layer), leaves(layer, case(layer, T=3, B=1)))


@each_cell
@pytest.mark.parametrize("net", ["two", "bi_two"])
@pytest.mark.parametrize("variant", ["resets", "packed_with_dropout"])
def test_gradcheck_of_variants(cell: str, net: str, variant: str) -> None:
    layer = ours(build(cell, I=2, H=3, dropout=0.4 if variant != "resets" else 0.0, **NETS[net]))
    function = as_function(layer, resets=RESETS) if variant == "resets" else packed_function(layer, (2, 4))
    check(function, leaves(layer, case(layer, T=4, B=2)))


@each_cell
@pytest.mark.parametrize("net", ["one", "two", "bi_two"])
@pytest.mark.parametrize("policy", ["full", "chunked", "truncated", "truncated_every", "fixed"])
def test_gradgradcheck(cell: str, net: str, policy: str) -> None:
    """The second derivative is the derivative of the gradient the policy defines, whichever that is."""
    T, B = 4, 2
    rows = NETS[net]["num_layers"] * 2 if "bidirectional" in NETS[net] else 1
    layer = ours(build(cell, I=2, H=3, **NETS[net]), gradient=policies(T, B, rows)[policy])
    check(as_function(layer), leaves(layer, case(layer, T, B)), second=True)


@each_cell
@pytest.mark.parametrize("variant", ["resets", "packed_with_dropout", "states"])
def test_gradgradcheck_of_variants(cell: str, variant: str) -> None:
    theirs = build(
        cell, I=2, H=3, num_layers=2, bidirectional=True, dropout=0.4 if variant == "packed_with_dropout" else 0
    )
    layer = ours(theirs, gradient="truncated:2", memory="states" if variant == "states" else "gates")
    function = {
        "resets": as_function(layer, resets=RESETS),
        "packed_with_dropout": packed_function(layer, (2, 4)),
        "states": as_function(layer),
    }[variant]
    check(function, leaves(layer, case(layer, T=4, B=2)), second=True)


@each_cell
@pytest.mark.parametrize("net", ["two", "bi_two"])
def test_third_derivative(cell: str, net: str, agree: Agree) -> None:
    theirs = build(cell, I=2, H=3, **NETS[net])
    data = case(theirs, T=3, B=2)

    def run(layer: Any) -> list[Any]:
        x = data.x.clone().requires_grad_()
        out = layer(x)[0].square().sum()
        results = []
        for _ in range(3):
            (g,) = torch.autograd.grad(out, x, create_graph=True)
            out = g.square().sum()
            results.append(g)
        return [*results, torch.autograd.grad(out, list(layer.parameters()), materialize_grads=True)]

    agree(run(ours(theirs)), run(theirs), tolerance=1e-9)


@each_cell
@pytest.mark.parametrize("policy", ["full", "chunked", "truncated", "truncated_every", "fixed"])
@pytest.mark.parametrize("net", ["two", "bi_two"])
def test_gradient_that_can_be_differentiated_is_the_same(cell: str, policy: str, net: str, agree: Agree) -> None:
    """`create_graph=True` takes another path to the same first derivative."""
    rows = NETS[net]["num_layers"] * 2 if "bidirectional" in NETS[net] else 1
    layer = ours(build(cell, **NETS[net]), gradient=policies(7, 3, rows)[policy])
    data = case(layer)
    inputs = leaves(layer, data)
    results = [
        torch.autograd.grad(as_function(layer)(*inputs), inputs, [data.dy, *data.dfinal], create_graph=create)
        for create in (False, True)
    ]
    assert not any(g.requires_grad for g in results[0])
    assert all(g.requires_grad for g in results[1])
    agree(results[1], results[0])


# Which gradients are asked for


def names(layer: Any) -> list[str]:
    return ["x", *(f"initial{i}" for i in range(2 if layer.mode == "LSTM" else 1))] + [
        n for n, _ in layer.named_parameters()
    ]


@each_cell
@pytest.mark.parametrize("net", ["one", "two", "bi"])
@pytest.mark.parametrize("policy", ["full", "truncated"])
@pytest.mark.parametrize("only", [True, False])
def test_frozen_subsets(cell: str, net: str, policy: str, only: bool, agree: Agree) -> None:
    """Each tensor alone requires a gradient, or each alone does not: what is frozen gets None, the rest is equal."""
    theirs = build(cell, I=2, H=3, **NETS[net])
    data = case(theirs, T=4, B=2)
    mine = ours(theirs, gradient=policies(4, 2, 1)[policy])
    everything = leaves(mine, data)
    outputs = as_function(mine)(*everything)
    expected = torch.autograd.grad(outputs, everything, [data.dy, *data.dfinal])
    for i, name in enumerate(names(mine)):
        tensors = [z.detach().clone().requires_grad_((j == i) is only) for j, z in enumerate(everything)]
        torch.autograd.backward(as_function(mine)(*tensors), [data.dy, *data.dfinal])
        for z, e in zip(tensors, expected, strict=True):
            agree(z.grad, e if z.requires_grad else None, name)


@each_cell
def test_frozen_parameters_of_a_module(cell: str, agree: Agree) -> None:
    theirs = build(cell, num_layers=2)
    layers = [theirs, ours(theirs)]
    data = case(theirs)
    for layer in layers:
        layer.weight_hh_l0.requires_grad_(False)
        layer.bias_ih_l1.requires_grad_(False)
        (layer(data.x)[0] * data.dy).sum().backward()
    theirs, mine = ({n: p.grad for n, p in layer.named_parameters()} for layer in layers)
    assert mine["weight_hh_l0"] is None
    assert mine["bias_ih_l1"] is None
    agree(mine, theirs)


@each_cell
def test_nothing_requires_a_gradient(cell: str) -> None:
    layer = ours(build(cell)).requires_grad_(False)
    y, final = layer(case(layer).x)
    for z in (y, *as_tuple(final)):
        assert not z.requires_grad
        assert z.grad_fn is None


@each_cell
def test_gradients_accumulate(cell: str, agree: Agree) -> None:
    layer = ours(build(cell, num_layers=2))
    data = case(layer)
    expected = measure(layer, data)
    for _ in range(3):
        y, final = layer(data.x, as_hx(data.initial))
        torch.autograd.backward([y, *as_tuple(final)], [data.dy, *data.dfinal])
    for name, p in layer.named_parameters():
        agree(p.grad, 3 * expected.parameters[name], name)


# Modes


@each_cell
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("net", ["one", "bi_two"])
def test_without_grad(cell: str, mode: Any, net: str, agree: Agree) -> None:
    theirs = build(cell, **NETS[net])
    mine = ours(theirs, gradient="truncated:3")
    data = case(theirs)
    expected = theirs(data.x, as_hx(data.initial))
    with mode():
        y, final = mine(data.x, as_hx(data.initial))
    for z in (y, *as_tuple(final)):
        assert not z.requires_grad
    agree([y, as_tuple(final)], [expected[0], as_tuple(expected[1])])


@each_cell
@pytest.mark.parametrize("net", ["one", "bi_two"])
def test_outputs_hold_nothing_else_without_grad(cell: str, net: str) -> None:
    """No output is a view of a buffer much larger than itself."""
    layer = ours(build(cell, **NETS[net]))
    with torch.no_grad():
        y, final = layer(case(layer, T=50, B=3).x)
    outputs = (y, *as_tuple(final))
    held = {z.untyped_storage().data_ptr(): z.untyped_storage().nbytes() for z in outputs}
    assert sum(held.values()) <= 1.1 * sum(z.nbytes for z in outputs)


def test_nothing_is_kept_alive_without_grad() -> None:
    layer = ours(build("lstm_proj", num_layers=2, bidirectional=True))
    x = case(layer).x

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    with torch.no_grad():
        layer(x)
        before = alive()
        y, final = layer(x)
        assert alive() - before == len((y, *as_tuple(final)))


def test_nothing_is_taped_without_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward does not even build the gate tape when no backward can follow."""
    asked: list[bool] = []
    forward = Eager.forward

    def spy(self: Eager, *args: Any) -> Any:
        asked.append(args[-1])
        return forward(self, *args)

    monkeypatch.setattr(Eager, "forward", spy)
    layer = ours(build("gru"), memory="gates")
    x = case(layer).x
    layer(x)
    with torch.no_grad():
        layer(x)
    layer.requires_grad_(False)
    layer(x)
    assert asked == [True, False, False]


@each_cell
def test_graph_is_freed_with_the_outputs(cell: str) -> None:
    """No cycle keeps the tape: the input goes with the outputs, the garbage collector off."""
    layer = ours(build(cell, num_layers=2), gradient="truncated:3/2")
    data = case(layer)
    gc.disable()
    try:
        x = data.x.clone().requires_grad_() * 1.0
        y, final = layer(x)
        alive = weakref.ref(x)
        del x
        assert alive() is not None
        del y, final
        assert alive() is None
    finally:
        gc.enable()


@each_cell
@pytest.mark.parametrize("policy", ["full", "truncated:3/2"])
@pytest.mark.parametrize("memory", ["gates", "states"])
def test_retain_graph(cell: str, policy: str, memory: str, agree: Agree) -> None:
    layer = ours(build(cell, num_layers=2, dropout=0.4), gradient=policy, memory=memory)
    data = case(layer)
    inputs = leaves(layer, data)
    outputs = as_function(layer)(*inputs)
    cotangents = [data.dy, *data.dfinal]
    first = torch.autograd.grad(outputs, inputs, cotangents, retain_graph=True)
    second = torch.autograd.grad(outputs, inputs, cotangents)
    agree(second, first, tolerance=0)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(outputs, inputs, cotangents)


@each_cell
@pytest.mark.parametrize("memory", ["gates", "states"])
@pytest.mark.parametrize("what", ["y", "x", "weight_hh_l0"])
def test_modification_before_backward_raises(cell: str, memory: str, what: str) -> None:
    """What the backward pass reads must not change silently."""
    layer = ours(build(cell), memory=memory)
    x = case(layer).x.clone().requires_grad_()
    seen = x * 1.0
    y, _ = layer(seen)
    loss = y.square().sum() if what != "y" else y.sum()
    with torch.no_grad():
        {"y": y, "x": seen, "weight_hh_l0": layer.weight_hh_l0}[what].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@each_cell
def test_modification_of_the_output_in_the_graph(cell: str) -> None:
    """`y.mul_(2)`, recorded by autograd, overwrites what the layer saved: refused, as torch does for its own."""
    layer = ours(build(cell))
    y, _ = layer(case(layer).x)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# Hooks


@each_cell
def test_hooks(cell: str, agree: Agree) -> None:
    """Hooks of tensors see the whole gradient once; what they return is what is used; module hooks run."""
    layer = ours(build(cell, num_layers=2, bidirectional=True), gradient="truncated:3")
    data = case(layer)
    expected = measure(layer, data)
    seen: dict[str, list[Tensor]] = {name: [] for name, _ in layer.named_parameters()}
    accumulated: list[str] = []
    for name, p in layer.named_parameters():
        p.register_hook(lambda g, name=name: seen[name].append(g.clone()) or 2 * g)
        p.register_post_accumulate_grad_hook(lambda p, name=name: accumulated.append(name))
    modules: list[str] = []
    layer.register_forward_pre_hook(lambda *_: modules.append("pre"))
    layer.register_forward_hook(lambda *_: modules.append("forward"))
    layer.register_full_backward_hook(lambda *_: modules.append("backward"))
    x = data.x.clone().requires_grad_()
    x.register_hook(lambda g: 3 * g)
    y, final = layer(x, as_hx(data.initial))
    torch.autograd.backward([y, *as_tuple(final)], [data.dy, *data.dfinal])
    assert modules == ["pre", "forward", "backward"]
    assert sorted(accumulated) == sorted(seen)
    for name, p in layer.named_parameters():
        agree(seen[name], [expected.parameters[name]], name)
        agree(p.grad, 2 * expected.parameters[name], name)
    agree(x.grad, 3 * expected.x)


def test_saved_tensor_hooks(agree: Agree) -> None:
    """Everything kept for backward passes through autograd's own hooks (offloading, counting)."""
    layer = ours(build("lstm", num_layers=2))
    data = case(layer)
    expected = measure(layer, data)
    packed: list[int] = []

    def pack(z: Tensor) -> Tensor:
        packed.append(z.numel())
        return z.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda z: z):
        actual = measure(layer, data)
    agree(actual.values(), expected.values(), tolerance=0)
    assert sum(packed) >= data.x.numel()


@pytest.mark.parametrize(("cell", "gates"), [("tanh", 0), ("relu", 0), ("gru", 4), ("lstm", 4), ("lstm_proj", 4)])
def test_memory_policy_decides_what_is_kept(cell: str, gates: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers kept for backward: "states" leaves out the gate values, "auto" where they would be large."""
    T, B, H = 50, 3, 4
    theirs = build(cell, H=H, num_layers=2)

    def kept(memory: str) -> int:
        numbers: dict[int, int] = {}

        def pack(z: Tensor) -> Tensor:
            numbers[z.data_ptr()] = z.numel()
            return z

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda z: z):
            outputs = ours(theirs, memory=memory)(case(theirs, T, B).x)
        del outputs
        return sum(numbers.values())

    assert kept("gates") - kept("states") == 2 * T * B * H * gates
    assert kept("auto") == kept("gates")
    monkeypatch.setattr(bptt.memory, "AUTO_BYTES", 2 * T * B * H * 4 * 8 - 1)
    assert kept("auto") == (kept("states") if gates else kept("gates"))
    monkeypatch.setattr(bptt.memory, "AUTO_BYTES", 2 * T * B * H * 4 * 8)
    assert kept("auto") == kept("gates")


def test_checkpointing_the_layer(agree: Agree) -> None:
    """`torch.utils.checkpoint` re-runs the forward: the same random factors and masks, hence the same gradient."""
    layer = ours(build("gru", num_layers=2, dropout=0.4), gradient="randomized:0.6")
    data = case(layer)
    results = []
    for again in (False, True):
        torch.manual_seed(14)
        x = data.x.clone().requires_grad_()
        if again:
            y, h = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
        else:
            y, h = layer(x)
        results.append([y, torch.autograd.grad([y, h], [x, *layer.parameters()], [data.dy, *data.dfinal])])
    agree(results[1], results[0], tolerance=0)


# Autocast


@each_cell
@pytest.mark.parametrize("net", ["one", "bi_two"])
@pytest.mark.parametrize("policy", ["full", "truncated:3"])
@pytest.mark.parametrize("packed", [None, (2, 7, 5)])
def test_autocast_leaves_results_right(
    cell: str, net: str, policy: str, packed: tuple[int, ...] | None, agree: Agree
) -> None:
    layer = ours(build(cell, dtype=torch.float32, **NETS[net]), gradient=policy)
    data = case(layer)
    expected = measure(layer, data, packed=packed)
    with torch.autocast("cpu", torch.bfloat16):
        actual = measure(layer, data, packed=packed)
    for z in (actual.y, *actual.final, actual.x, *actual.initial, *actual.parameters.values()):
        assert z.dtype == torch.float32
    agree(actual.values(), expected.values())


@each_cell
@pytest.mark.parametrize("hx", [None, torch.bfloat16, torch.float32])
def test_autocast_after_a_linear_layer(cell: str, hx: torch.dtype | None, agree: Agree) -> None:
    """The linear layer hands on bfloat16; the recurrence computes in the dtype of its weights."""
    layer = ours(build(cell, dtype=torch.float32, num_layers=2))
    linear = nn.Linear(3, 5)
    data = case(layer)
    z = torch.randn(7, 3, 3)
    initial = None if hx is None else as_hx(s.to(hx) for s in data.initial)
    with torch.autocast("cpu", torch.bfloat16):
        x = linear(z)
        assert x.dtype == torch.bfloat16
        y, final = layer(x, initial)
    assert y.dtype == as_tuple(final)[0].dtype == torch.float32
    y_expected, _ = layer(x.float(), None if hx is None else as_hx(s.to(hx).float() for s in data.initial))
    agree(y, y_expected)
    parameters = [*layer.parameters(), linear.weight]
    agree(
        torch.autograd.grad((y * data.dy).sum(), parameters, retain_graph=True),
        torch.autograd.grad((y_expected * data.dy).sum(), parameters),
        tolerance=1e-5,
    )


def test_backward_inside_autocast(agree: Agree) -> None:
    layer = ours(build("lstm", dtype=torch.float32, num_layers=2))
    data = case(layer)
    expected = measure(layer, data)
    y, final = layer(data.x, as_hx(data.initial))
    with torch.autocast("cpu", torch.bfloat16):
        torch.autograd.backward([y, *as_tuple(final)], [data.dy, *data.dfinal])
    agree({n: p.grad for n, p in layer.named_parameters()}, expected.parameters)


# Transformations and copies


@each_cell
def test_functional_call(cell: str, agree: Agree) -> None:
    """Other weights for one call; the module's own stay untouched, and get no gradient."""
    layer, other = ours(build(cell, num_layers=2)), ours(build(cell, seed=2, num_layers=2))
    data = case(layer)
    own = {n: p.detach().clone() for n, p in layer.named_parameters()}
    expected = measure(other, data)
    parameters = {n: p.detach().clone().requires_grad_() for n, p in other.named_parameters()}
    y, final = functional_call(layer, parameters, (data.x, as_hx(data.initial)))
    agree([y, as_tuple(final)], [expected.y, expected.final])
    torch.autograd.backward([y, *as_tuple(final)], [data.dy, *data.dfinal])
    agree({n: p.grad for n, p in parameters.items()}, expected.parameters)
    assert all(p.grad is None for p in layer.parameters())
    agree(dict(layer.named_parameters()), own, tolerance=0)


@each_cell
@pytest.mark.parametrize("policy", ["full", "truncated:3"])
def test_func_grad(cell: str, policy: str, agree: Agree) -> None:
    layer = ours(build(cell, num_layers=2), gradient=policy)
    data = case(layer)
    expected = gradients(layer, data.x, data.initial, data.dy, data.dfinal, bptt.policies.parse(policy))

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        y, final = functional_call(layer, parameters, (x, as_hx(data.initial)))
        return (y * data.dy).sum() + sum((z * dz).sum() for z, dz in zip(as_tuple(final), data.dfinal, strict=True))

    parameters = {n: p.detach() for n, p in layer.named_parameters()}
    dp, dx = torch.func.grad(loss, argnums=(0, 1))(parameters, data.x)
    agree(dp, expected.parameters)
    agree(dx, expected.x)


@each_cell
def test_weight_norm(cell: str, agree: Agree) -> None:
    theirs = build(cell, num_layers=2)
    layers = [theirs, ours(theirs)]
    data = case(theirs)
    results = []
    for layer in layers:
        parametrizations.weight_norm(layer, "weight_hh_l0", dim=0)
        layer.parametrizations.weight_hh_l0.original0.data.mul_(1.5)
        results.append(measure(layer, data).values())
    agree(results[1], results[0])


@each_cell
def test_assigned_weight(cell: str, agree: Agree) -> None:
    """A weight replaced by assignment is the one used (`layer.weight_hh_l0 = nn.Parameter(...)`)."""
    theirs = build(cell, num_layers=2)
    layers = [theirs, ours(theirs)]
    data = case(theirs)
    weight = torch.eye(theirs.weight_hh_l1.shape[1]).repeat(len(theirs.weight_hh_l1), 1)[: len(theirs.weight_hh_l1)]
    for layer in layers:
        layer.weight_hh_l1 = nn.Parameter(weight.double())
    agree(measure(layers[1], data).values(), measure(layers[0], data).values())


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "to_and_back": lambda layer: copy.deepcopy(layer).float().to(torch.float64),
    "meta": lambda layer: copy.deepcopy(layer).to("meta").to_empty(device="cpu"),
}


@each_cell
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("policy", ["truncated:3/2", "randomized:0.6"])
def test_copies(cell: str, how: str, policy: str, agree: Agree) -> None:
    layer = ours(build(cell, num_layers=2), gradient=policy, memory="states")
    for p in layer.parameters():
        p.data = p.data.float().double()
    data = case(layer)
    copied = COPIES[how](layer)
    assert repr(copied) == repr(layer)
    if how == "meta":
        copied.load_state_dict(layer.state_dict())
    results = []
    for one in (copied, layer):
        torch.manual_seed(15)
        results.append(measure(one, data).values())
    agree(results[0], results[1], tolerance=0)
    with torch.no_grad():
        copied.weight_hh_l0.zero_()
    assert layer.weight_hh_l0.abs().min() > 0


def test_state_dict_on_disk(agree: Agree) -> None:
    layer = ours(build("gru", num_layers=2))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = ours(build("gru", seed=2, num_layers=2))
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    agree(dict(other.state_dict()), dict(layer.state_dict()), tolerance=0)


@each_cell
def test_double_and_float(cell: str, agree: Agree) -> None:
    theirs = build(cell, dtype=torch.float32, num_layers=2)
    mine = ours(theirs).double()
    data = case(mine)
    agree(measure(mine, data).values(), measure(theirs.double(), data).values())


@pytest.mark.parametrize("policy", ["full", "truncated:3/2", "randomized:0.6", "randomized:mean=3,tail=4"])
@pytest.mark.parametrize("memory", ["gates", "states"])
def test_same_seed_same_bits(policy: str, memory: str, agree: Agree) -> None:
    layer = ours(build("lstm", num_layers=2, dropout=0.4, bidirectional=True), gradient=policy, memory=memory)
    data = case(layer)
    results = []
    for _ in range(2):
        torch.manual_seed(16)
        results.append(measure(layer, data).values())
    agree(results[0], results[1], tolerance=0)


def test_randomized_differs_between_calls() -> None:
    layer = ours(build("gru"), gradient="randomized:0.5")
    data = case(layer, T=20)
    first, second = measure(layer, data), measure(layer, data)
    torch.testing.assert_close(first.y, second.y, rtol=0, atol=0)
    assert not torch.equal(first.x, second.x)


@each_cell
def test_training_follows_torch(cell: str, agree: Agree) -> None:
    """Twenty steps of an optimiser with clipping arrive at the same weights."""
    theirs = build(cell, num_layers=2)
    layers = [theirs, ours(theirs)]
    data = case(theirs)
    for layer in layers:
        optimiser = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.5)
        for _ in range(20):
            optimiser.zero_grad()
            (layer(data.x)[0] - data.dy).square().mean().backward()
            nn.utils.clip_grad_norm_(layer.parameters(), 0.3)
            optimiser.step()
    agree(dict(layers[1].named_parameters()), dict(layers[0].named_parameters()), tolerance=1e-9)


# Gradients without autograd


@each_cell
@each_net
@pytest.mark.parametrize("policy", ["full", "chunked:3", "truncated:3", "truncated:4/3"])
def test_bptt_gradients(cell: str, net: str, policy: str, agree: Agree) -> None:
    """Parameters, x, hx and the adjoints lambda_t = dL/dh_t of the top layer, also under no_grad."""
    theirs = build(cell, **NETS[net])
    data = case(theirs)
    mine = ours(theirs)
    expected = gradients(theirs, data.x, data.initial, data.dy, data.dfinal, bptt.policies.parse(policy))
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            actual = bptt.gradients(mine, data.x, data.dy, as_hx(data.initial), as_hx(data.dfinal), gradient=policy)
        agree(actual.parameters, expected.parameters)
        agree(actual.x, expected.x)
        agree(as_tuple(actual.hx), expected.initial)
        agree(actual.adjoints, expected.adjoints)
    assert all(p.grad is None for p in mine.parameters())


@each_cell
def test_bptt_gradients_uses_the_layers_policy(cell: str, agree: Agree) -> None:
    theirs = build(cell, num_layers=2)
    data = case(theirs)
    actual = bptt.gradients(ours(theirs, gradient="truncated:3"), data.x, data.dy)
    zeros = tuple(torch.zeros_like(z) for z in data.initial)
    expected = gradients(theirs, data.x, zeros, data.dy, zeros, bptt.Truncated(3))
    agree(actual.parameters, expected.parameters)
    agree(actual.x, expected.x)
    agree(actual.adjoints, expected.adjoints)


@each_cell
def test_adjoints_are_those_of_a_plain_loop(cell: str, agree: Agree) -> None:
    """lambda_t against `retain_grad` on every state of torch.nn run one step at a time."""
    theirs = build(cell)
    data = case(theirs)
    state, hs = data.initial, []
    for t in range(len(data.x)):
        _, hx = theirs(data.x[t : t + 1], as_hx(state))
        state = as_tuple(hx)
        state[0].retain_grad()
        hs.append(state[0])
    torch.autograd.backward([*hs, *state], [*(dy[None] for dy in data.dy), *data.dfinal])
    grads = bptt.gradients(ours(theirs), data.x, data.dy, as_hx(data.initial), as_hx(data.dfinal))
    agree(grads.adjoints, torch.cat([h.grad for h in hs]))
