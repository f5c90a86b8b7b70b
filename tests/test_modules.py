"""Layers as modules: state, arguments, `convert`, kernels."""

import copy

import pytest
import torch
from reference import NETS, build, case, measure, ours
from torch import Tensor, nn
from variants import CONSTRUCTORS, KINDS, Agree, each_cell

import bptt
from bptt.kernels import cpu

# Modules


@each_cell
@pytest.mark.parametrize("constructor", CONSTRUCTORS)
def test_state_dict_both_ways(cell: str, constructor: str, agree: Agree) -> None:
    theirs = build(cell, **CONSTRUCTORS[constructor])
    mine = ours(build(cell, seed=1, **CONSTRUCTORS[constructor]))
    assert list(mine.state_dict()) == list(theirs.state_dict())
    mine.load_state_dict(theirs.state_dict(), strict=True)
    agree(dict(mine.state_dict()), dict(theirs.state_dict()), tolerance=0)
    other = build(cell, seed=2, **CONSTRUCTORS[constructor])
    other.load_state_dict(mine.state_dict(), strict=True)
    agree(dict(other.state_dict()), dict(theirs.state_dict()), tolerance=0)


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_initial_weights(kind: str, agree: Agree) -> None:
    made = []
    for home in (nn, bptt.nn):
        torch.manual_seed(4)
        made.append(getattr(home, kind)(5, 4, 2, bidirectional=True))
    theirs, mine = made
    agree(dict(mine.state_dict()), dict(theirs.state_dict()), tolerance=0)


POSITIONAL = {
    "RNN": (5, 4, 2, "relu", False, True, 0.25, True),
    "GRU": (5, 4, 2, False, True, 0.25, True),
    "LSTM": (5, 4, 2, False, True, 0.25, True, 3),
}


@pytest.mark.parametrize("kind", KINDS)
def test_positional_arguments(kind: str) -> None:
    theirs, mine = getattr(nn, kind)(*POSITIONAL[kind]), getattr(bptt.nn, kind)(*POSITIONAL[kind])
    for name in nn.RNNBase.__constants__:
        assert getattr(mine, name) == getattr(theirs, name)
    assert [(n, p.shape) for n, p in mine.named_parameters()] == [(n, p.shape) for n, p in theirs.named_parameters()]


@pytest.mark.parametrize("kind", KINDS)
def test_device_and_dtype(kind: str) -> None:
    layer = getattr(bptt.nn, kind)(5, 4, device="cpu", dtype=torch.float64)
    assert {(p.dtype, p.device.type) for p in layer.parameters()} == {(torch.float64, "cpu")}


@pytest.mark.parametrize("kind", KINDS)
def test_extends_rnnbase_and_not_torch_layers(kind: str) -> None:
    cls = getattr(bptt.nn, kind)
    assert issubclass(cls, nn.RNNBase)
    assert not issubclass(cls, getattr(nn, kind))
    assert cls.__name__ == kind


@pytest.mark.parametrize("kind", KINDS)
def test_repr_shows_the_policy(kind: str) -> None:
    layer = getattr(bptt.nn, kind)(5, 4, 2, gradient=bptt.Truncated(20, every=5))
    assert repr(layer).startswith(f"{kind}(5, 4, num_layers=2")
    assert "truncated:20/5" in repr(layer)


@each_cell
@pytest.mark.parametrize("net", ["one", "bi_two"])
def test_text_form_of_the_policy(cell: str, net: str, agree: Agree) -> None:
    theirs = build(cell, **NETS[net])
    data = case(theirs)
    for text, policy in (("truncated:3/2", bptt.Truncated(3, every=2)), ("chunked:2", bptt.Chunked(2))):
        agree(
            measure(ours(theirs, gradient=text), data).values(),
            measure(ours(theirs, gradient=policy), data).values(),
            tolerance=0,
        )


# Convert


class Model(nn.Module):
    """Recurrent layers at several depths, one of them used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LSTM(5, 4, num_layers=2, bidirectional=True, dropout=0.3)
        self.inner = nn.ModuleDict({"gru": nn.GRU(8, 4, batch_first=True), "list": nn.ModuleList([nn.RNN(4, 4)])})
        self.again = self.inner["list"][0]
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.first(x)
        y, _ = self.inner["gru"](y.transpose(0, 1))
        y, _ = self.inner["list"][0](y.transpose(0, 1))
        return self.head(self.again(y)[0])


@pytest.mark.parametrize("training", [True, False])
def test_convert_swaps_every_layer_and_shares_parameters(training: bool, agree: Agree) -> None:
    model = Model().double().train(training)
    expected_model = copy.deepcopy(model)
    names, parameters = zip(*model.named_parameters(), strict=True)
    converted = bptt.convert(model, gradient=bptt.Full())
    assert [n for n, _ in converted.named_parameters()] == list(names)
    for p, before in zip(converted.parameters(), parameters, strict=True):
        assert p is before
    assert not any(isinstance(m, nn.RNN | nn.GRU | nn.LSTM) for m in converted.modules())
    assert converted.again is converted.inner["list"][0]
    assert all(m.training is training for m in converted.modules())
    x = torch.randn(7, 3, 5, dtype=torch.float64)
    results = []
    for m in (converted, expected_model):
        torch.manual_seed(5)
        y = m(x)
        results.append([y, torch.autograd.grad(y.square().sum(), list(m.parameters()))])
    agree(*results)


@each_cell
def test_convert_of_a_layer_alone(cell: str, agree: Agree) -> None:
    theirs = build(cell, num_layers=2)
    data = case(theirs)
    policy = bptt.Truncated(3)
    expected = measure(ours(theirs, gradient=policy), data)
    agree(measure(bptt.convert(copy.deepcopy(theirs), gradient=policy), data).values(), expected.values())
    agree(
        measure(bptt.convert(copy.deepcopy(theirs), gradient="truncated:3", memory="states"), data).values(),
        expected.values(),
    )


def test_convert_again_changes_the_policy(agree: Agree) -> None:
    theirs = build("gru", num_layers=2)
    data = case(theirs)
    expected = measure(ours(theirs, gradient="chunked:2"), data)
    layer = bptt.convert(copy.deepcopy(theirs), gradient="truncated:3")
    agree(measure(bptt.convert(layer, gradient="chunked:2"), data).values(), expected.values())


def test_convert_leaves_frozen_parameters_frozen() -> None:
    model = Model()
    model.first.weight_hh_l0.requires_grad_(False)
    assert not bptt.convert(model, gradient="full").first.weight_hh_l0.requires_grad


def test_convert_leaves_our_settings_where_none_are_given() -> None:
    model = nn.ModuleList([bptt.nn.LSTM(5, 4, gradient="truncated:7", memory="gates"), nn.GRU(5, 4)])
    bptt.convert(model, memory="states")
    assert [str(layer.gradient) for layer in model] == ["truncated:7", "full"]
    assert [layer.memory for layer in model] == ["states", "states"]


# Kernels


@each_cell
def test_named_kernel_is_used(cell: str, agree: Agree) -> None:
    theirs = build(cell, num_layers=2)
    data = case(theirs)
    agree(measure(ours(theirs, kernel="eager"), data).values(), measure(theirs, data).values())


@pytest.mark.parametrize("kind", KINDS)
def test_explain_says_what_was_chosen(kind: str) -> None:
    layer = getattr(bptt.nn, kind)(5, 4, num_layers=2, gradient="truncated:3")
    gates = 0 if kind == "RNN" else 7 * 3 * 2 * 4 * 4 * 4  # steps, lanes, layers, values a unit, units, bytes
    assert bptt.explain(layer, torch.zeros(7, 3, 5)).splitlines() == [
        f"kernel 'cpu' ({cpu.variants()[0]}) for {kind.lower()}, torch.float32 on cpu: "
        "the most preferred of the kernels there are",
        f"keeps states{' and gates' if gates else ''}: memory='auto', the gates take {gates:,} bytes",
        "gradient truncated:3",
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_meta_device_gives_shapes(kind: str) -> None:
    """Shapes forward and backward without values, as torch.nn."""
    for gradient in ("full", "chunked:2", "truncated:3", "randomized:0.5"):
        layer = getattr(bptt.nn, kind)(3, 4, 2, bidirectional=True, device="meta", gradient=gradient)
        y, _ = layer(torch.zeros(7, 2, 3, device="meta"))
        y.sum().backward()
        assert y.shape == (7, 2, 8)
        assert layer.weight_ih_l0.grad.shape == layer.weight_ih_l0.shape
