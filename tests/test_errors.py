"""What is refused, by which error, and in which words, as torch refuses it."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from variants import each_kind

import bptt


def zeros(*shape: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def hx(layer: Any, *shape: int, **kw: Any) -> Any:
    """An initial state whose every tensor is of one shape."""
    return (zeros(*shape, **kw), zeros(*shape, **kw)) if layer.mode == "LSTM" else zeros(*shape, **kw)


def packed(*shape: int, **kw: Any) -> Any:
    return pack_padded_sequence(zeros(*shape, **kw), (7, 3, 2))


def nested(layout: torch.layout) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a prototype
        return torch.nested.nested_tensor([zeros(7, 5), zeros(3, 5)], layout=layout)


def with_weight(layer: Any, name: str, value: Tensor) -> Any:
    """A call after a weight was replaced."""
    setattr(layer, name, nn.Parameter(value))
    return layer(zeros(7, 3, 5))


CALLS: dict[str, Callable[[Any], Any]] = {  # of a layer of 5 inputs, 4 hidden units and 2 layers
    "x_of_no_dimension": lambda m: m(zeros()),
    "x_of_one_dimension": lambda m: m(zeros(5)),
    "x_of_four_dimensions": lambda m: m(zeros(1, 7, 3, 5)),
    "input_size": lambda m: m(zeros(7, 3, 6)),
    "input_size_unbatched": lambda m: m(zeros(7, 6)),
    "input_size_packed": lambda m: m(packed(7, 3, 6)),
    "x_float32": lambda m: m(zeros(7, 3, 5, dtype=torch.float32)),
    "x_integer": lambda m: m(zeros(7, 3, 5, dtype=torch.long)),
    "hidden_size": lambda m: m(zeros(7, 3, 5), hx(m, 2, 3, 5)),
    "hidden_size_unbatched": lambda m: m(zeros(7, 5), hx(m, 2, 5)),
    "layers_of_hx": lambda m: m(zeros(7, 3, 5), hx(m, 1, 3, 4)),
    "lanes_of_hx": lambda m: m(zeros(7, 3, 5), hx(m, 2, 1, 4)),
    "lanes_of_hx_packed": lambda m: m(packed(7, 3, 5), hx(m, 2, 2, 4)),
    "hx_unbatched_for_batched": lambda m: m(zeros(7, 3, 5), hx(m, 2, 4)),
    "hx_batched_for_unbatched": lambda m: m(zeros(7, 5), hx(m, 2, 1, 4)),
    "hx_float32": lambda m: m(zeros(7, 3, 5), hx(m, 2, 3, 4, dtype=torch.float32)),
    "x_on_another_device": lambda m: m(zeros(7, 3, 5, device="meta")),
    "hx_on_another_device": lambda m: m(zeros(7, 3, 5), hx(m, 2, 3, 4, device="meta")),
    "no_steps": lambda m: m(zeros(0, 3, 5), hx(m, 2, 3, 4)),
    "nested_strided": lambda m: m(nested(torch.strided)),
    "sparse": lambda m: m(zeros(7, 3, 5).to_sparse()),
    "complex": lambda m: m(zeros(7, 3, 5, dtype=torch.complex128)),
    "bool": lambda m: m(zeros(7, 3, 5, dtype=torch.bool)),
    "weight_float32": lambda m: with_weight(m, "weight_hh_l0", zeros(m.weight_hh_l0.shape[0], 4, dtype=torch.float32)),
    "weight_sparse": lambda m: with_weight(m, "weight_hh_l0", m.weight_hh_l0.detach().to_sparse()),
    "weight_on_another_device": lambda m: with_weight(m, "weight_hh_l0", m.weight_hh_l0.detach().to("meta")),
    "weight_of_another_size": lambda m: with_weight(m, "weight_ih_l0", zeros(m.weight_ih_l0.shape[0], 6)),
}


@each_kind
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("policy", ["full", "truncated:3"])
def test_call_raises_as_torch_does(kind: str, name: str, policy: str) -> None:
    theirs = getattr(nn, kind)(5, 4, 2, dtype=torch.float64)
    mine = getattr(bptt.nn, kind)(5, 4, 2, dtype=torch.float64, gradient=policy)
    with pytest.raises((RuntimeError, ValueError), match=r".") as expected:
        CALLS[name](theirs)
    with pytest.raises(expected.type, match=r".") as actual:
        CALLS[name](mine)
    assert actual.type is expected.type


@pytest.mark.parametrize("which", ["h", "c"])
@pytest.mark.parametrize("size", [(2, 3, 5), (2, 2, 4), (1, 3, 4)])
def test_one_of_h_and_c_is_wrong(which: str, size: tuple[int, ...]) -> None:
    state = (zeros(*size), zeros(2, 3, 4)) if which == "h" else (zeros(2, 3, 4), zeros(*size))
    for home in (nn, bptt.nn):
        with pytest.raises(RuntimeError, match=rf"Expected hidden\[{'hc'.index(which)}\] size \(2, 3, 4\)"):
            home.LSTM(5, 4, 2, dtype=torch.float64)(zeros(7, 3, 5), state)


def test_projected_state_sizes() -> None:
    for home in (nn, bptt.nn):
        layer = home.LSTM(5, 4, 2, proj_size=3, dtype=torch.float64)
        with pytest.raises(RuntimeError, match=r"hidden\[0\] size \(2, 3, 3\)"):
            layer(zeros(7, 3, 5), (zeros(2, 3, 4), zeros(2, 3, 4)))
        with pytest.raises(RuntimeError, match=r"hidden\[1\] size \(2, 3, 4\)"):
            layer(zeros(7, 3, 5), (zeros(2, 3, 3), zeros(2, 3, 3)))


@each_kind
def test_packed_of_another_dtype(kind: str) -> None:
    # Two of torch's own messages: of the present version and of 2.8.
    with pytest.raises(ValueError, match=r"input .*torch\.float32"):
        getattr(bptt.nn, kind)(5, 4, 2, dtype=torch.float64)(packed(7, 3, 5, dtype=torch.float32))


@each_kind
def test_packed_with_an_unbatched_state(kind: str) -> None:
    layer = getattr(bptt.nn, kind)(5, 4, 2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"\(2, 3, 4\)"):
        layer(packed(7, 3, 5), hx(layer, 2, 4))


@each_kind
@pytest.mark.parametrize("x", [None, [[1.0]], 3.0])
def test_input_that_is_no_tensor(kind: str, x: object) -> None:
    with pytest.raises(TypeError, match="input must be a"):
        getattr(bptt.nn, kind)(5, 4)(x)


@each_kind
@pytest.mark.parametrize("count", [1, 2, 3])
def test_number_of_states(kind: str, count: int) -> None:
    """An LSTM takes the pair (h, c), the others one tensor, not a tuple of one."""
    layer = getattr(bptt.nn, kind)(5, 4, 2, dtype=torch.float64)
    state = tuple(zeros(2, 3, 4) for _ in range(count))
    if kind == "LSTM" and count == 2:
        layer(zeros(7, 3, 5), state)
        return
    with pytest.raises(RuntimeError, match="hx must be"):
        layer(zeros(7, 3, 5), state)


STATES: dict[str, tuple[Any, str]] = {
    "none": ((None, None), r"hx must hold tensors, or be None for zeros: got \(NoneType, NoneType\)"),
    "half": ((zeros(2, 3, 4), None), r"hx must hold tensors.*got \(Tensor, NoneType\)"),
    "arrays": ((zeros(2, 3, 4).numpy(),) * 2, r"hx must hold tensors.*got \(ndarray, ndarray\)"),
    "text": ("hc", r"hx must hold tensors.*got \(str, str\)"),
    "number": (1.0, r"hx must be a tuple \(h_0, c_0\), or None: got float"),
    "layer": (nn.Linear(1, 1), r"hx must be a tuple \(h_0, c_0\), or None: got Linear"),
}


@pytest.mark.parametrize("name", STATES)
def test_state_that_is_no_tensor(name: str) -> None:
    state, words = STATES[name]
    with pytest.raises(TypeError, match=words):
        bptt.nn.LSTM(5, 4, 2, dtype=torch.float64)(zeros(7, 3, 5), state)
    expected = "hx must be one tensor h_0"
    for kind in ("RNN", "GRU"):
        layer = getattr(bptt.nn, kind)(5, 4, 2, dtype=torch.float64)
        with pytest.raises((TypeError, RuntimeError), match=expected):
            layer(zeros(7, 3, 5), state)
        for one in ([None], [zeros(2, 3, 4)], (None,)):
            with pytest.raises(RuntimeError, match=expected):
                layer(zeros(7, 3, 5), one)


def test_a_list_of_states_is_taken_as_torch_does() -> None:
    layer = bptt.nn.LSTM(5, 4, 2, dtype=torch.float64)
    states = [torch.randn(2, 3, 4, dtype=torch.float64) for _ in range(2)]
    x = torch.randn(7, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(layer(x, states), layer(x, tuple(states)), rtol=0, atol=0)


@each_kind
@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l1", "bias_ih_l0", "bias_hh_l1"])
@pytest.mark.parametrize("kernel", ["auto", "eager"])
def test_a_weight_that_is_none(kind: str, name: str, kernel: str) -> None:
    layer = getattr(bptt.nn, kind)(5, 4, 2, kernel=kernel)
    setattr(layer, name, None)
    words = rf"{kind}: {name} must be a tensor: got None" + (r" \(.*bias=False" if name.startswith("bias") else "$")
    with pytest.raises(TypeError, match=words):
        layer(torch.zeros(7, 3, 5))
    delattr(layer, name)
    with pytest.raises(AttributeError, match=name):
        layer(torch.zeros(7, 3, 5))


@each_kind
def test_a_nested_batch_says_what_to_do(kind: str) -> None:
    layer, x = getattr(bptt.nn, kind)(5, 4, 2, dtype=torch.float64), nested(torch.strided)
    with pytest.raises(RuntimeError, match=r"input must be .*pack_sequence\(input\.unbind\(\), enforce_sorted=False\)"):
        layer(x)
    packed, _ = layer(torch.nn.utils.rnn.pack_sequence(x.unbind(), enforce_sorted=False))
    assert packed.data.shape == (10, 4)


def test_sparse_tensors_are_named() -> None:
    layer = bptt.nn.LSTM(5, 4, 2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"LSTM: input must be a dense tensor: got layout torch\.sparse_coo"):
        layer(zeros(7, 3, 5).to_sparse())
    with pytest.raises(RuntimeError, match=r"weights and states must be dense tensors: got layout torch\.sparse_coo"):
        layer(zeros(7, 3, 5), (zeros(2, 3, 4).to_sparse(), zeros(2, 3, 4)))


CONSTRUCTIONS: dict[str, dict[str, Any]] = {
    "hidden_size_zero": {"hidden_size": 0},
    "hidden_size_negative": {"hidden_size": -1},
    "hidden_size_float": {"hidden_size": 2.5},
    "input_size_zero": {"input_size": 0},
    "input_size_text": {"input_size": "5"},
    "num_layers_zero": {"num_layers": 0},
    "dropout_above_one": {"dropout": 1.5, "num_layers": 2},
    "dropout_bool": {"dropout": True, "num_layers": 2},
    "dropout_text": {"dropout": "x", "num_layers": 2},
    "proj_size_too_large": {"proj_size": 4},
    "proj_size_negative": {"proj_size": -1},
    "nonlinearity": {"nonlinearity": "gelu"},
    "bias": {"bias": "yes"},
    "batch_first": {"batch_first": 1},
    "unknown": {"nonsense": 1},
    "mode": {"mode": "GRU"},
}


TAKEN_BY_2_8 = {"input_size_zero", "bias", "batch_first"}
"""What torch 2.8 does not look at yet."""


def construction_error(home: Any, kind: str, arguments: dict[str, Any]) -> type[Exception] | None:
    try:
        getattr(home, kind)(**arguments)
    except (TypeError, ValueError) as error:
        return type(error)
    return None


@each_kind
@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_construction_raises_as_torch_does(kind: str, name: str) -> None:
    arguments = {"input_size": 5, "hidden_size": 4} | CONSTRUCTIONS[name]
    expected = construction_error(nn, kind, arguments)
    assert expected or (torch.__version__.startswith("2.8.") and name in TAKEN_BY_2_8)
    assert construction_error(bptt.nn, kind, arguments) is expected


@pytest.mark.parametrize("kind", ["RNN", "GRU"])
def test_projection_is_for_the_lstm(kind: str) -> None:
    for home in (nn, bptt.nn):
        with pytest.raises(ValueError, match=r"proj_size .*only"):
            getattr(home, kind)(5, 4, proj_size=2)


@each_kind
def test_dropout_of_one_layer_warns_as_torch_does(kind: str) -> None:
    for home in (nn, bptt.nn):
        with pytest.warns(UserWarning, match="num_layers greater than 1"):
            getattr(home, kind)(5, 4, dropout=0.5)
