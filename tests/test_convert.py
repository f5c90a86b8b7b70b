"""`convert` and `revert`: what is shared, what comes back, what is named and refused while layers are swapped."""

import logging
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from reference import build, case, measure
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from variants import Agree, each_cell

import bptt


class Scaled(nn.Module):
    """A parametrization without an inverse."""

    def forward(self, w: Tensor) -> Tensor:
        return 2 * w


def parametrized_bias(layer: nn.Module) -> None:
    parametrize.register_parametrization(layer, "bias_ih_l0", Scaled())
    parametrize.register_parametrization(layer, "bias_ih_l0", Scaled())


WEIGHTS: dict[str, Callable[[Any], Any]] = {
    "plain": lambda layer: None,
    "weight norm": lambda layer: parametrizations.weight_norm(layer, "weight_hh_l0"),
    "two weights": lambda layer: [parametrizations.weight_norm(layer, f"weight_{w}_l0") for w in ("ih", "hh")],
    "spectral norm": lambda layer: parametrizations.spectral_norm(layer, "weight_hh_l0"),
    "orthogonal": lambda layer: parametrizations.orthogonal(layer, "weight_hh_l0"),
    "a bias, twice": parametrized_bias,
    "weight norm by a hook": lambda layer: nn.utils.weight_norm(layer, "weight_hh_l0"),
    "spectral norm by a hook": lambda layer: nn.utils.spectral_norm(layer, "weight_hh_l0"),
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight_hh_l0", 0.4),
}


def made(cell: str, weights: str, **kw: Any) -> nn.Sequential:
    layer = build(cell, **{"num_layers": 2, **kw})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # weight norm by a hook is deprecated
        WEIGHTS[weights](layer)
    return nn.Sequential(layer)


def values(model: nn.Sequential) -> list[Any]:
    """State, outputs and gradients of a call, and the state after it, which spectral norm changes."""
    start = {name: value.clone() for name, value in model.state_dict().items()}
    result = measure(model[0], case(model[0]))
    after = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(start)
    return [start, result.values(), after]


@each_cell
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("training", [True, False])
def test_there_and_back(cell: str, weights: str, training: bool, agree: Agree) -> None:
    """The same parameters, and the same bits, however the weights come about."""
    model = made(cell, weights).train(training)
    layer, parameters, names = model[0], list(model.parameters()), [name for name, _ in model.named_modules()]
    theirs = values(model)
    assert bptt.convert(model, "truncated:3") is model
    assert isinstance(model[0], bptt.nn.RNN | bptt.nn.GRU | bptt.nn.LSTM)
    ours = values(model)
    agree(ours[0], theirs[0], tolerance=0)
    if not (training and weights.startswith("spectral")):  # an iteration for every time that the weight is read
        agree(values(bptt.convert(model, "full"))[1:], theirs[1:])
        bptt.convert(model, "truncated:3")
    assert bptt.revert(model) is model
    assert type(model[0]).__mro__[-4:] == type(layer).__mro__[-4:]
    assert type(model[0]).__name__ == type(layer).__name__
    agree(values(model), theirs, tolerance=0)
    agree(values(bptt.convert(model, "truncated:3")), ours, tolerance=0)
    assert [name for name, _ in model.named_modules()] == names
    assert all(m.training is training for m in model.modules())
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]


def test_each_layer_has_its_own_cache_of_parametrizations(agree: Agree) -> None:
    """torch's cache goes by the layer that a parametrization was registered on, whose address is soon another's."""
    models = [made("gru", "weight norm", seed=seed) for seed in range(6)]
    data = case(models[0][0])
    for swap in (bptt.convert, bptt.revert):
        for model in models:
            swap(model)
        expected = [model[0](data.x)[0] for model in models]
        with parametrize.cached():
            agree([model[0](data.x)[0] for model in models], expected, tolerance=0)


def test_parametrizations_are_removed_from_a_swapped_layer() -> None:
    for swaps in ([bptt.convert], [bptt.convert, bptt.revert]):
        model = made("lstm", "two weights")
        for swap in swaps:
            swap(model)
        for name in ("weight_ih_l0", "weight_hh_l0"):
            parametrize.remove_parametrizations(model[0], name)
        assert type(model[0]) is (bptt.nn.LSTM if swaps == [bptt.convert] else nn.LSTM)


@pytest.mark.parametrize("swaps", [[bptt.convert], [bptt.convert, bptt.revert]])
def test_hooks_go_along(swaps: list[Callable[..., Any]]) -> None:
    model, calls = nn.Sequential(nn.GRU(5, 4)), []
    layer = model[0]
    handles = [
        layer.register_forward_hook(lambda module, *_: calls.append(("forward", module))),
        layer.register_forward_pre_hook(lambda module, *_: calls.append(("before", module))),
        layer.register_full_backward_hook(lambda module, *_: calls.append(("backward", module))),
        layer.register_state_dict_post_hook(lambda module, *_: calls.append(("saved", module))),
        layer.register_load_state_dict_pre_hook(lambda module, *_: calls.append(("load", module))),
        layer.register_load_state_dict_post_hook(lambda module, *_: calls.append(("loaded", module))),
    ]
    del layer
    for swap in swaps:
        swap(model)

    def run() -> list[Any]:
        calls.clear()
        model[0](torch.zeros(7, 3, 5, requires_grad=True))[0].sum().backward()
        model.load_state_dict(model.state_dict())
        return list(calls)

    assert run() == [(name, model[0]) for name in ("before", "forward", "backward", "saved", "load", "loaded")]
    for handle in handles[:4]:
        handle.remove()
    assert [name for name, _ in run()] == ["load", "loaded"]


def test_attributes_and_buffers_go_along() -> None:
    model = nn.Sequential(nn.GRU(5, 4))
    model[0].seen = seen = []
    model[0].register_buffer("mask", torch.ones(3), persistent=False)
    bptt.revert(bptt.convert(model))
    assert model[0].seen is seen
    assert list(model[0].state_dict()) == list(nn.GRU(5, 4).state_dict())
    assert vars(model[0]).keys() - vars(nn.GRU(5, 4)).keys() == {"seen"}


class Held(nn.Module):
    """Layers that the model also holds outside of torch's tables."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.GRU(5, 5), nn.GRU(5, 5)
        self.stack, self.pair, self.by_name = [self.a, self.b], (self.b, None, self.a), {"a": self.a}


def test_lists_of_layers_follow() -> None:
    model = Held()
    for swap, cls in ((bptt.convert, bptt.nn.GRU), (bptt.revert, nn.GRU)):
        swap(model)
        assert model.stack == [model.a, model.b]
        assert model.pair == (model.b, None, model.a)
        assert model.by_name == {"a": model.a}
        assert type(model.a) is cls


# What is there to convert


def test_says_how_many_were_swapped(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.ModuleDict({"a": nn.GRU(5, 4), "b": nn.LSTM(5, 4), "c": bptt.nn.RNN(5, 4), "d": nn.Linear(4, 4)})
    with caplog.at_level(logging.INFO, logger="bptt"):
        bptt.convert(model, "chunked:3", strict=True)
        bptt.revert(model)
    assert caplog.messages == ["convert swapped 2 of 3 layers: 'a', 'b', 'c'", "revert swapped 3 layers"]


NOTHING: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "linear": (lambda: nn.Linear(5, 4), "got Linear without one$"),
    "empty": (lambda: nn.Sequential(), "got Sequential without one$"),
    "cell": (lambda: nn.LSTMCell(5, 4), r"the model itself \(LSTMCell\): a cell .* bptt\.scan"),
    "cells": (lambda: nn.Sequential(nn.GRUCell(5, 4), nn.RNNCell(5, 4)), r"'0' \(GRUCell\).*bptt\.scan.*'1' \(RNNCell"),
    "another layer": (lambda: nn.RNNBase("GRU", 5, 4), r"the model itself \(RNNBase\)"),
}


@pytest.mark.parametrize("name", NOTHING)
def test_nothing_to_convert(name: str) -> None:
    build, words = NOTHING[name]
    model = build()
    with pytest.warns(UserWarning, match=f"convert found no RNN, GRU or LSTM .*{words}") as caught:
        assert bptt.convert(model, gradient="chunked:3") is model
    assert caught[0].filename == __file__
    with pytest.raises(TypeError, match=f"model must hold an RNN, GRU or LSTM layer .*{words}"):
        bptt.convert(model, strict=True)


def test_cells_beside_layers_are_named() -> None:
    model = nn.ModuleDict({"rnn": nn.GRU(5, 4), "ours": bptt.nn.GRU(5, 4), "cell": nn.GRUCell(5, 4)})
    with pytest.warns(UserWarning, match=r"swapped 1, set 1; left as it is: 'cell' \(GRUCell\): a cell .*bptt\.scan"):
        bptt.convert(model, strict=True)
    assert type(model["rnn"]) is bptt.nn.GRU


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_compiled_by_torchscript() -> None:
    with pytest.warns(UserWarning, match=r"'0' \(GRU\): compiled by TorchScript: convert before scripting"):
        bptt.convert(nn.Sequential(torch.jit.script(nn.GRU(5, 4))))


# Subclasses


class Named(nn.LSTM):
    """Changes nothing of a call."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width)
        self.width = width


class Ours(bptt.nn.LSTM):
    def __init__(self, width: int) -> None:
        super().__init__(width, width)
        self.width = width


class Doubled(nn.GRU):
    def forward(self, input: Tensor, hx: Tensor | None = None) -> Any:
        y, h = super().forward(input, hx)
        return 2 * y, h


class Permuted(nn.GRU):
    def permute_hidden(self, hx: Tensor, permutation: Tensor | None) -> Tensor:
        return -hx


@pytest.mark.parametrize("ours", [bptt.nn.LSTM, Ours])
@pytest.mark.parametrize("normed", [False, True])
def test_subclasses(ours: type[bptt.nn.LSTM], normed: bool, agree: Agree) -> None:
    model = nn.Sequential(Named(5), nn.LSTM(5, 5)).double()
    if normed:
        parametrizations.weight_norm(model[0], "weight_hh_l0")
    x = torch.randn(7, 3, 5, dtype=torch.float64)
    expected = [model[0](x)[0], model[1](x)[0]]
    bptt.convert(model, "chunked:3", subclasses={Named: ours})
    assert [parametrize.type_before_parametrizations(layer) for layer in model] == [ours, bptt.nn.LSTM]
    assert model[0].width == 5
    agree([model[0](x)[0], model[1](x)[0]], expected)
    bptt.revert(model)
    assert [parametrize.type_before_parametrizations(layer) for layer in model] == [Named, nn.LSTM]
    agree([model[0](x)[0], model[1](x)[0]], expected, tolerance=0)


def test_subclass_of_ours_that_was_built_as_such() -> None:
    model = nn.Sequential(Ours(5))
    with pytest.raises(TypeError, match=r"'0' \(Ours\): a subclass of ours.*subclasses={Theirs: Ours}"):
        bptt.revert(model)
    assert type(bptt.revert(model, subclasses={Named: Ours})[0]) is Named
    assert not vars(model[0]).keys() - vars(Named(5)).keys()


REFUSED_SUBCLASSES: dict[str, tuple[Any, str]] = {
    "forward": ({Doubled: bptt.nn.GRU}, "Doubled has a forward of its own"),
    "permute_hidden": ({Permuted: bptt.nn.GRU}, "Permuted has a permute_hidden of its own"),
    "another kind": ({Named: bptt.nn.GRU}, r"Named to bptt\.nn\.LSTM or a subclass of it: got .*GRU"),
    "torch's": ({Named: nn.LSTM}, r"Named to bptt\.nn\.LSTM or a subclass of it"),
    "no layer": ({nn.Linear: bptt.nn.GRU}, r"subclasses of torch\.nn\.RNN, GRU or LSTM: got .*Linear"),
    "turned round": ({bptt.nn.LSTM: Named}, r"subclasses of torch\.nn\.RNN, GRU or LSTM: got .*LSTM"),
    "names": ({"Named": bptt.nn.LSTM}, "got 'Named'"),
    "a list": ([Named], r"subclasses must be a mapping .*got list"),
}


@pytest.mark.parametrize("name", REFUSED_SUBCLASSES)
def test_refused_subclasses(name: str) -> None:
    subclasses, words = REFUSED_SUBCLASSES[name]
    for swap in (bptt.convert, bptt.revert):
        with pytest.raises(TypeError, match=words):
            swap(nn.Sequential(nn.GRU(5, 4), bptt.nn.GRU(5, 4)), subclasses=subclasses)


def test_all_that_cannot_be_swapped_is_named() -> None:
    model = nn.Sequential(nn.GRU(5, 4), Named(4), Doubled(5, 4))
    words = (
        r"'1' \(Named\): a subclass of torch\.nn\.LSTM: name .*subclasses={Named: bptt\.nn\.LSTM}; "
        r"'2' \(Doubled\): .*has a forward of its own.*with bptt\.nn\.GRU inside"
    )
    with pytest.raises(TypeError, match=words):
        bptt.convert(model)
    assert type(model[0]) is nn.GRU


# Wrappers


def test_a_replaced_forward_is_refused() -> None:
    """As accelerate's hooks replace it: it would go on calling the old layer, under the old gradient."""
    for swap, layer in ((bptt.convert, nn.GRU(5, 4)), (bptt.revert, bptt.nn.GRU(5, 4))):
        layer.forward = layer.forward
        with pytest.raises(TypeError, match=r"'0' \(GRU\): its forward was replaced"):
            swap(nn.Sequential(layer))


def test_compiled_layers_are_refused_and_compiled_models_follow() -> None:
    for swap, layer in ((bptt.convert, nn.GRU(5, 4)), (bptt.revert, bptt.nn.GRU(5, 4))):
        with pytest.raises(TypeError, match=rf"'_orig_mod' \(GRU\): .*{swap.__name__} before compiling"):
            swap(torch.compile(layer, backend="eager"))
        model = torch.compile(nn.Sequential(layer), backend="eager")
        swap(model)
        assert type(model._orig_mod[0]) is (bptt.nn.GRU if swap is bptt.convert else nn.GRU)


@pytest.fixture
def process_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_sharded_layers_are_refused(process_group: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    for make in (
        lambda: fully_shard(nn.LSTM(5, 4), mesh=mesh),
        lambda: fully_shard(nn.Sequential(nn.LSTM(5, 4)), mesh=mesh),
    ):
        with pytest.raises(TypeError, match=r"sharded by FSDP.*convert before sharding"):
            bptt.convert(make())
    with pytest.raises(TypeError, match=r"sharded by FSDP.*revert before sharding"):
        bptt.revert(fully_shard(bptt.nn.LSTM(5, 4), mesh=mesh))
    model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.GRU(5, 4)))
    bptt.convert(model, "chunked:3")
    model(torch.zeros(7, 3, 5))[0].sum().backward()
    assert type(model.module[0]) is bptt.nn.GRU
    assert all(p.grad is not None for p in model.parameters())


def test_the_old_layer_is_let_go() -> None:
    model = nn.Sequential(nn.GRU(5, 4))
    old = weakref.ref(model[0])
    bptt.convert(model)
    assert old() is None
