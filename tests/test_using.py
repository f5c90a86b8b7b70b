"""`using`: other settings for a while."""

import threading
from typing import Any

import pytest
from reference import build, case, measure
from torch import nn
from variants import Agree

import bptt
from bptt import Checkpoints


def test_using_sets_and_restores() -> None:
    model = nn.ModuleDict({"a": bptt.nn.LSTM(5, 4, gradient="truncated:7"), "b": nn.Sequential(bptt.nn.GRU(5, 4))})
    model["again"] = model["a"]
    before = repr(model)
    with bptt.using(model, gradient="chunked:2", memory=Checkpoints(steps=3), kernel="eager") as inside:
        assert inside is model
        for layer in (model["a"], model["b"][0]):
            assert (str(layer.gradient), str(layer.memory), layer.kernel) == (
                "chunked:2",
                "checkpoints:steps=3",
                "eager",
            )
    assert repr(model) == before


def test_using_leaves_what_is_not_given() -> None:
    layer = bptt.nn.GRU(5, 4, gradient="truncated:7", memory="gates")
    with bptt.using(layer, bptt.Full()):
        layer.memory = "states"
        assert str(layer.gradient) == "full"
    assert (str(layer.gradient), layer.memory) == ("truncated:7", "states")


def test_using_nested_and_after_an_exception() -> None:
    layer = bptt.nn.GRU(5, 4, gradient="truncated:7")
    with pytest.raises(KeyError), bptt.using(layer, "chunked:2"):  # noqa: PT012
        with bptt.using(layer, "full"):
            assert str(layer.gradient) == "full"
        assert str(layer.gradient) == "chunked:2"
        with bptt.using(layer, "full"):
            raise KeyError
    assert str(layer.gradient) == "truncated:7"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [({"gradient": "nonsense"}, ValueError), ({"gradient": 3}, TypeError), ({"memory": "x"}, ValueError),
     ({"gradient": "full", "kernel": "gpu"}, ValueError)],
)  # fmt: skip
def test_using_checks_before_it_sets(arguments: dict[str, Any], error: type[Exception]) -> None:
    layer = bptt.nn.GRU(5, 4, gradient="truncated:7")
    with pytest.raises(error, match="must be"), bptt.using(layer, **arguments):
        pass
    assert str(layer.gradient) == "truncated:7"


def test_using_needs_a_layer_of_ours() -> None:
    for model in (nn.GRU(5, 4), nn.Linear(5, 4)):
        with (
            pytest.raises(TypeError, match=r"model must hold a bptt\.nn layer: got \w+ without one"),
            bptt.using(model),
        ):
            pass
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module: got NoneType"), bptt.using(None):
        pass


def test_using_gives_the_gradient_of_the_other_policy(agree: Agree) -> None:
    layer = bptt.convert(build("lstm", num_layers=2), "chunked:2")
    data = case(layer)
    with bptt.using(layer, "full"):
        full = measure(layer, data).values()
    agree(full, measure(bptt.convert(layer, "full"), data).values(), tolerance=0)


def test_using_is_of_the_layers_not_of_a_thread() -> None:
    """As its documentation says."""
    layer = bptt.nn.GRU(5, 4, gradient="truncated:7")
    seen: list[str] = []
    with bptt.using(layer, "full"):
        thread = threading.Thread(target=lambda: seen.append(str(layer.gradient)))
        thread.start()
        thread.join()
    assert seen == ["full"]
