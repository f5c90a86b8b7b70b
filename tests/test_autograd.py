"""A layer is a good citizen of autograd: frozen parts, modes, hooks."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from functions import Agree, as_function, each_cell, leaves, policies
from reference import CELLS, NETS, as_hx, as_tuple, build, case, measure, ours
from torch import Tensor
from torch.func import functional_call
from torch.nn.utils.rnn import pack_padded_sequence

import bptt
from bptt.kernels import KERNELS
from bptt.kernels.whole import WholeWalks
from bptt.kernels.whole_torch import WholeTorch

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
        while gc.collect():  # what a finalizer lets go of, too
            pass
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    with torch.no_grad():
        layer(x)
        before = alive()
        y, final = layer(x)
        assert alive() - before == len((y, *as_tuple(final)))


@pytest.mark.parametrize("kernel", KERNELS)
def test_nothing_is_taped_without_a_gradient(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward does not even build the gate tape when no backward can follow."""
    asked: list[bool] = []
    forward = KERNELS[kernel].forward

    def spy(*args: Any) -> Any:
        asked.append(args[5])  # tape_gates
        return forward(*args)

    monkeypatch.setattr(KERNELS[kernel], "forward", spy)
    for whole in (WholeWalks, WholeTorch):
        taped = whole.taped

        def spy_whole(*args: Any, taped: Callable[..., Any] = taped) -> Any:
            asked.append(True)
            return taped(*args)

        monkeypatch.setattr(whole, "taped", spy_whole)
    layer = ours(build("gru"), memory="gates", kernel=kernel)
    x = case(layer).x
    layer(x)
    with torch.no_grad():
        layer(x)
    layer.requires_grad_(False)
    layer(x)
    assert asked[0]
    assert not any(asked[1:])


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
@pytest.mark.parametrize("what", ["x", "weight_hh_l0"])
def test_modification_before_backward_raises(cell: str, memory: str, what: str) -> None:
    """What the backward pass reads must not change silently."""
    layer = ours(build(cell), memory=memory)
    x = case(layer).x.clone().requires_grad_()
    seen = x * 1.0
    y, _ = layer(seen)
    loss = y.square().sum()
    with torch.no_grad():
        {"x": seen, "weight_hh_l0": layer.weight_hh_l0}[what].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def activated(z: Tensor, in_place: bool) -> Tensor:
    if not in_place:
        return torch.relu(1.3 * z + 0.2)
    z *= 1.3
    z[:1].add_(0.2)
    z[1:] += 0.2
    return torch.relu_(z)


@pytest.mark.parametrize(
    ("cell", "net", "memory", "policy"),  # either policy with every two of the others
    [
        (cell, net, memory, ("full", "truncated:3/2")[(i + j + k) % 2])
        for i, cell in enumerate(CELLS)
        for j, net in enumerate(["one", "two", "bi_two"])
        for k, memory in enumerate(["gates", "states", "checkpoints:steps=3"])
    ],
)
def test_outputs_changed_in_place(cell: str, net: str, memory: str, policy: str, agree: Agree) -> None:
    """`y += residual`, `relu_(y)`, `h_n.mul_(2)`: the gradient of what is written out, of first and second order."""
    forms: list[tuple[bool, tuple[int, ...] | None]] = [(False, None), (True, None), (False, (7, 4, 2))]
    for batch_first, packed in forms:
        theirs = build(cell, **NETS[net], batch_first=batch_first)
        layer = ours(theirs, gradient=policy, memory=memory)
        x = case(theirs).x.clone().requires_grad_()
        inputs, found = [x, *layer.parameters()], []
        for in_place in (False, True):
            given = x.transpose(0, 1) if batch_first else pack_padded_sequence(x, packed) if packed else x
            y, final = layer(given)
            y = activated(y if isinstance(y, Tensor) else y.data, in_place)
            states = [activated(z, in_place) for z in as_tuple(final)]
            loss = y.square().sum() + sum(z.square().sum() for z in states)
            first = torch.autograd.grad(loss, inputs, create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs, retain_graph=True)
            found.append([y, states, first, second, torch.autograd.grad(loss, inputs)])
        agree(found[1], found[0])


@each_cell
@pytest.mark.parametrize("write", ["no_grad", "detach", "part"])
def test_outputs_changed_outside_of_the_graph(cell: str, write: str, agree: Agree) -> None:
    """Where nothing downstream has saved y, its change leaves the layer's gradient what it was, as in torch.nn.GRU."""
    layer = ours(build(cell))
    x = case(layer).x.clone().requires_grad_()
    grads = []
    for changed in (False, True):
        y, _ = layer(x)
        loss = y.sum()
        if changed and write == "no_grad":
            with torch.no_grad():
                y.mul_(2)
        elif changed:
            (y if write == "detach" else y[2:5]).detach().zero_()
        grads.append(torch.autograd.grad(loss, [x, *layer.parameters()]))
    agree(grads[1], grads[0], tolerance=0)


@each_cell
def test_outputs_of_no_grad_are_written_to_with_grad(cell: str) -> None:
    layer, weight = ours(build(cell)), torch.ones((), dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        y, _ = layer(case(layer).x)
    y += weight
    y.sum().backward()
    assert weight.grad == y.numel()


@each_cell
@pytest.mark.parametrize("net", ["one", "bi_two"])
def test_outputs_changed_in_place_under_transforms(cell: str, net: str, agree: Agree) -> None:
    layer = ours(build(cell, **NETS[net]))
    x = case(layer).x

    def loss(parameters: dict[str, Tensor], in_place: bool) -> Tensor:
        y, final = functional_call(layer, parameters, (x,))
        return sum(activated(z, in_place).square().sum() for z in (y, *as_tuple(final)))

    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    agree(torch.func.grad(loss)(parameters, True), torch.func.grad(loss)(parameters, False))


def test_outputs_changed_in_place_in_a_compiled_graph(agree: Agree) -> None:
    layer = ours(build("gru", num_layers=2))
    x = case(layer).x

    def loss(in_place: bool) -> Tensor:
        y, final = layer(x)
        return sum(activated(z, in_place).square().sum() for z in (y, *as_tuple(final)))

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    weights = list(layer.parameters())
    agree(torch.autograd.grad(compiled(True), weights), torch.autograd.grad(loss(False), weights))


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

    def kept(memory: str, B: int = B) -> int:
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
    for B, less in ((4, 1), (5, 0)):  # sizes that are new: what is decided for a kind of call is known from then on
        monkeypatch.setattr(bptt.memory, "AUTO_BYTES", 2 * T * B * H * 4 * 8 - less)
        assert kept("auto", B) == kept("states" if gates and less else "gates", B)


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
