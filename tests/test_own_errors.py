"""What is refused of our own arguments, functions and kernels, by which error, and in which words."""

from typing import Any

import pytest
import torch
from reference import build, case, ours
from torch import nn
from variants import each_kind

import bptt

OWN: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "gradient_unknown": ({"gradient": "nonsense"}, ValueError, r"gradient must be .*got 'nonsense'"),
    "gradient_window": ({"gradient": "truncated:0"}, ValueError, r"window must be at least 1 .*got 0"),
    "gradient_type": ({"gradient": 35}, TypeError, r"gradient must be .*got 35"),
    "gradient_none": ({"gradient": None}, TypeError, r"gradient must be .*got None"),
    "memory_unknown": ({"memory": "x"}, ValueError, r"memory must be .*'auto', 'gates', 'states'.*got 'x'"),
    "memory_none": ({"memory": None}, ValueError, r"memory must be .*got None"),
    "kernel_unknown": ({"kernel": "gpu"}, ValueError, r"kernel must be .*'auto', 'cpu', 'fused', 'eager'.*got 'gpu'"),
    "kernel_none": ({"kernel": None}, ValueError, r"kernel must be .*got None"),
}


@each_kind
@pytest.mark.parametrize("name", OWN)
def test_own_argument(kind: str, name: str) -> None:
    arguments, error, words = OWN[name]
    with pytest.raises(error, match=words):
        getattr(bptt.nn, kind)(5, 4, **arguments)


@each_kind
@pytest.mark.parametrize("name", OWN)
def test_own_argument_assigned_later(kind: str, name: str) -> None:
    arguments, error, words = OWN[name]
    layer = getattr(bptt.nn, kind)(5, 4, gradient="chunked:3", memory="states", kernel="eager")
    ((attribute, value),) = arguments.items()
    before = repr(layer)
    with pytest.raises(error, match=words):
        setattr(layer, attribute, value)
    assert repr(layer) == before


@pytest.mark.parametrize("name", [name for name in OWN if not name.endswith("_none")])
def test_own_argument_of_convert(name: str) -> None:
    """Nothing is swapped where something is wrong."""
    arguments, error, words = OWN[name]
    model = nn.Sequential(nn.GRU(5, 4))
    with pytest.raises(error, match=words):
        bptt.convert(model, **arguments)
    assert type(model[0]) is nn.GRU


def test_own_arguments_are_by_keyword_only() -> None:
    with pytest.raises(TypeError, match="positional"):
        bptt.nn.GRU(5, 4, 1, True, False, 0.0, False, 0, None, None, "full")
    with pytest.raises(TypeError, match="positional"):
        bptt.nn.GRU(5, 4)(torch.zeros(7, 3, 5), None, torch.zeros(7, 3, dtype=torch.bool))


def test_convert_of_a_subclass() -> None:
    class Mine(nn.GRU):
        pass

    model = nn.Sequential(nn.LSTM(5, 4), Mine(4, 4))
    with pytest.raises(TypeError, match="Mine"):
        bptt.convert(model, gradient="full")
    assert type(model[0]) is nn.LSTM


BAD_RESETS: dict[str, Any] = {
    "lanes": torch.zeros(7, 2, dtype=torch.bool),
    "one_lane": torch.zeros(7, 1, dtype=torch.bool),
    "steps": torch.zeros(6, 3, dtype=torch.bool),
    "transposed": torch.zeros(3, 7, dtype=torch.bool),
    "one_dimension": torch.zeros(7, dtype=torch.bool),
    "three_dimensions": torch.zeros(7, 3, 1, dtype=torch.bool),
    "float": torch.zeros(7, 3),
    "integer": torch.zeros(7, 3, dtype=torch.long),
    "list": [[False] * 3] * 7,
    "number": True,
}


@each_kind
@pytest.mark.parametrize("name", BAD_RESETS)
def test_resets(kind: str, name: str) -> None:
    """Shapes are not broadcast, other dtypes not converted."""
    error = TypeError if name in ("float", "integer", "list", "number") else ValueError
    with pytest.raises(error, match=r"resets must .*\(7, 3\).*got"):
        getattr(bptt.nn, kind)(5, 4)(torch.zeros(7, 3, 5), resets=BAD_RESETS[name])


def test_resets_layouts() -> None:
    with pytest.raises(ValueError, match=r"\(3, 7\).*got \(7, 3\)"):
        bptt.nn.GRU(5, 4, batch_first=True)(torch.zeros(3, 7, 5), resets=torch.zeros(7, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"\(7,\).*got \(7, 1\)"):
        bptt.nn.GRU(5, 4)(torch.zeros(7, 5), resets=torch.zeros(7, 1, dtype=torch.bool))


@each_kind
@pytest.mark.parametrize("which", ["dy", "dh_n"])
def test_cotangent_of_another_shape(kind: str, which: str) -> None:
    layer = ours(build({"RNN": "tanh", "GRU": "gru", "LSTM": "lstm"}[kind]))
    data = case(layer)
    dy, dh = data.dy, list(data.dfinal)
    if which == "dy":
        dy = dy[1:]
    else:
        dh[0] = dh[0][:, 1:]
    with pytest.raises(ValueError, match=rf"{which} must have the shape"):
        bptt.gradients(layer, data.x, dy, None, tuple(dh) if kind == "LSTM" else dh[0])


def test_gradients_of_an_unknown_policy() -> None:
    with pytest.raises(ValueError, match="gradient must be"):
        bptt.gradients(bptt.nn.GRU(5, 4), torch.zeros(7, 3, 5), torch.zeros(7, 3, 4), gradient="nonsense")


class Refusing:
    """A kernel that takes nothing."""

    name = "refusing"

    def refuses(self, request: Any) -> str:
        return f"it does not compute {request.cell.name} in {request.dtype}"


@each_kind
def test_named_kernel_that_cannot_says_why(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only "auto" may choose another; and then `explain` says that it did."""
    monkeypatch.setattr(bptt.kernels, "KERNELS", {"refusing": Refusing()})
    layer = getattr(bptt.nn, kind)(5, 4, kernel="refusing")
    x = torch.zeros(7, 3, 5)
    with pytest.raises(RuntimeError, match=r"'refusing' cannot .*it does not compute"):
        layer(x)
    with pytest.raises(RuntimeError, match=r"'refusing' cannot .*it does not compute"):
        bptt.explain(layer, x)
    automatic = getattr(bptt.nn, kind)(5, 4)
    with pytest.raises(RuntimeError, match=r"no kernel can .*it does not compute"):
        automatic(x)


def test_automatic_choice_explains_what_it_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bptt.kernels, "KERNELS", {"refusing": Refusing(), **bptt.kernels.KERNELS})
    text = bptt.explain(bptt.nn.GRU(5, 4), torch.zeros(7, 3, 5))
    assert text.startswith("kernel 'cpu'")
    assert "it does not compute gru in torch.float32" in text


NOT_OURS = {
    "gradients": lambda layer: bptt.gradients(layer, torch.zeros(7, 3, 5), torch.zeros(7, 3, 4)),
    "explain": lambda layer: bptt.explain(layer, torch.zeros(7, 3, 5)),
}


@pytest.mark.parametrize("call", NOT_OURS)
@pytest.mark.parametrize("layer", [nn.LSTM(5, 4), nn.Sequential(bptt.nn.LSTM(5, 4)), None])
def test_layer_that_is_not_ours(call: str, layer: object) -> None:
    with pytest.raises(TypeError, match=r"layer must be a bptt\.nn"):
        NOT_OURS[call](layer)


def test_convert_of_what_is_no_module() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module: got str"):
        bptt.convert("model")


@pytest.mark.parametrize("dy", [1.0, [1.0]])
def test_cotangent_that_is_no_tensor(dy: object) -> None:
    with pytest.raises(TypeError, match="dy must be a tensor"):
        bptt.gradients(bptt.nn.GRU(5, 4), torch.zeros(7, 3, 5), dy)


def test_cotangent_of_another_dtype() -> None:
    with pytest.raises(ValueError, match=r"dy must have the shape and dtype.*float32.*got.*float64"):
        bptt.gradients(bptt.nn.GRU(5, 4), torch.zeros(7, 3, 5), torch.zeros(7, 3, 4).double())


@each_kind
def test_complex_layers_are_refused(kind: str) -> None:
    """Rather than differentiated as if they were real."""
    layer = getattr(bptt.nn, kind)(5, 4, dtype=torch.complex64)
    with pytest.raises(RuntimeError, match=r"no kernel.*complex64"):
        layer(torch.zeros(7, 3, 5, dtype=torch.complex64))


def test_explain_of_another_feature_size() -> None:
    with pytest.raises(ValueError, match="x must have 5 features"):
        bptt.explain(bptt.nn.GRU(5, 4), torch.zeros(7, 3, 6))
