"""Measurements leave a layer's mode alone: they never write `training`, not even for a moment, and draw nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor

import bptt
from bptt.flow import record, survey, watch
from bptt.report import write

X = torch.randn(12, 2, 3, generator=torch.Generator().manual_seed(0))

MEASURES: dict[str, Callable[[Any, Any, Any], Any]] = {
    "survey": lambda *of: survey(*of, policies=["full", "chunked:3", "randomized:0.5"]),
    "compare": lambda *of: bptt.flow.compare(*of, policies=["truncated:3", "randomized:0.9"], draws=2),
    "adapted": lambda *of: bptt.flow.adapted(*of, policy=bptt.Adaptive(0.5, 8)),
    **{
        name: getattr(bptt.flow, name)
        for name in ("lag_map", "shares", "jacobians", "products", "lyapunov", "gates", "cell_path", "record")
    },
}


class Model(torch.nn.Module):
    """A recurrent layer between others, with a hook and a parametrized weight."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer, self.head = layer, torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(4, 2))
        self.seen: list[bool] = []
        layer.register_forward_hook(lambda module, args, output: self.seen.append(module.training))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0])


@contextmanager
def modes_held(model: torch.nn.Module) -> Iterator[None]:
    """Inside `with`, whatever writes or removes `training` of a module in the model raises, in any thread."""
    held = set(map(id, model.modules()))

    def refuse(owner: type[torch.nn.Module], name: str) -> None:
        original = getattr(owner, name)

        def guarded(self: torch.nn.Module, key: str, *value: Any) -> None:
            assert not (key == "training" and id(self) in held), f"{name} of {type(self).__name__}.training"
            original(self, key, *value)

        patch.setattr(owner, name, guarded)

    with pytest.MonkeyPatch.context() as patch:
        refuse(torch.nn.Module, "__setattr__")
        refuse(torch.nn.Module, "__delattr__")
        patch.setattr(torch.nn.Module, "train", lambda self, mode=True: pytest.fail("train() was called"))
        patch.setattr(torch.nn.Module, "eval", lambda self: pytest.fail("eval() was called"))
        yield


def layer_of(library: Any, training: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    return library.LSTM(3, 4, 2, dropout=0.5).train(training)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("library", [bptt.nn, torch.nn], ids=["ours", "torch's"])
@pytest.mark.parametrize("name", MEASURES)
def test_no_measurement_touches_a_mode(name: str, library: Any, training: bool):
    layer = layer_of(library, training)
    model = Model(layer).train(training)
    drawn = torch.get_rng_state()
    with modes_held(layer):
        MEASURES[name](layer, X, None)  # noise stands in for a loss: nothing is run, nothing drawn
    assert torch.equal(torch.get_rng_state(), drawn)
    with modes_held(model):
        MEASURES[name](model, X, lambda y: y.square().mean())
    assert model.seen == [training]  # the call itself ran as the model runs
    assert [module.training for module in model.modules()] == [training] * len(list(model.modules()))


def test_the_mode_stays_when_a_measurement_fails():
    layer = layer_of(bptt.nn, True)
    layer.kernel = "cpu"
    recording = record(layer, X)
    with modes_held(layer), pytest.raises(RuntimeError, match="cannot run this layer"):
        bptt.flow.lag_map(recording.to(torch.float16))
    assert layer.training


def test_parametrized_weights_are_measured_in_their_mode():
    layer = torch.nn.utils.parametrizations.weight_norm(layer_of(bptt.nn, True), "weight_hh_l0")
    with modes_held(layer):
        assert survey(layer, X, lambda y: y.sum(), policies=["full"]).dropout == 0.5


def test_a_thread_that_trains_draws_its_dropout_while_another_measures():
    """With the mode flipped now and then, some of its steps would go without."""
    layer = layer_of(bptt.nn, True)
    recording, stop, zeros = record(layer, X), [False], []

    def measure() -> None:
        while not stop[0]:
            recording.net(bptt.Full())

    thread = Thread(target=measure)
    thread.start()
    try:
        for _ in range(300):
            zeros.append(layer.training)
            layer(X[:1])
    finally:
        stop[0] = True
        thread.join()
    assert all(zeros)


def test_the_doctor_examines_in_the_mode_of_the_step():
    layer = layer_of(bptt.nn, True)
    with watch(layer) as doctor, modes_held(layer):
        layer(X)[0].sum().backward()
        assert doctor.check() is None
        doctor.examine()


@pytest.mark.parametrize(("training", "layers", "said"), [(True, 2, 0.5), (False, 2, 0.0), (True, 1, 0.0)])
def test_a_survey_says_which_dropout_it_left_out(training: bool, layers: int, said: float, tmp_path: Any):
    torch.manual_seed(0)
    layer = bptt.nn.GRU(3, 4, layers).train(training)
    layer.dropout = 0.5  # of one layer torch would warn of it
    found = survey(layer, X, policies=["full"])
    assert found.dropout == record(layer, X).dropout == said
    text = "without the dropout of 0.5 between the layers"
    assert (text in str(found.verdict)) == (said > 0)
    page = write(tmp_path / "report.html", found)
    assert (text in page.read_text(encoding="utf-8")) == (said > 0)
    quiet = survey(layer.eval(), X, policies=["full"])
    torch.testing.assert_close(found.lags.norm, quiet.lags.norm, rtol=0, atol=0)  # and so it did
