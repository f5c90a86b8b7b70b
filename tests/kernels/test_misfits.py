"""Weights and states that do not fit together are refused before a pointer is followed."""

import pytest
import torch
from reference import as_hx, build, case, ours
from torch import Tensor

import bptt
from bptt.kernels import cpu


def changed(layer: torch.nn.Module, name: str, value: Tensor) -> torch.nn.Module:
    """The layer with another tensor in the place of a parameter, unchecked by torch."""
    layer._parameters[name] = torch.nn.Parameter(value)
    return layer


WRONG = {
    "rows of weight_hh": ("weight_hh_l0", lambda p: p[:-1]),
    "columns of weight_hh": ("weight_hh_l0", lambda p: p[:, :-1]),
    "rows of weight_ih": ("weight_ih_l0", lambda p: p[:-1]),
    "columns of weight_ih": ("weight_ih_l0", lambda p: p[:, :-1]),
    "size of bias_ih": ("bias_ih_l0", lambda p: p[:-1]),
    "size of bias_hh": ("bias_hh_l0", lambda p: p[:-1]),
    "precision of weight_ih": ("weight_ih_l0", lambda p: p.float()),
    "precision of weight_hh": ("weight_hh_l0", lambda p: p.float()),
    "precision of bias_ih": ("bias_ih_l0", lambda p: p.float()),
    "precision of bias_hh": ("bias_hh_l0", lambda p: p.float()),
    "device of weight_ih": ("weight_ih_l0", lambda p: p.to("meta")),
    "device of weight_hh": ("weight_hh_l0", lambda p: p.to("meta")),
    "device of bias_hh": ("bias_hh_l0", lambda p: p.to("meta")),
}


@pytest.mark.parametrize("cell", ["tanh", "gru", "lstm"])
@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("small", [True, False])
def test_weights_that_do_not_fit(cell: str, what: str, small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch.nn and the eager kernel do; the compiled one would read what lies behind."""
    monkeypatch.setattr(cpu, "SMALL", 10**12 if small else 0)
    name, change = WRONG[what]
    layer = ours(build(cell), kernel="cpu")
    data = case(layer)
    with pytest.raises((RuntimeError, ValueError), match=r"."):
        changed(layer, name, change(layer.get_parameter(name).detach()))(data.x)


@pytest.mark.parametrize("what", ["rows", "columns", "precision"])
def test_projections_that_do_not_fit(what: str) -> None:
    layer = ours(build("lstm_proj"), kernel="cpu")
    p = layer.weight_hr_l0.detach()
    other = {"rows": p[:-1], "columns": p[:, :-1], "precision": p.float()}[what]
    with pytest.raises((RuntimeError, ValueError), match=r"."):
        changed(layer, "weight_hr_l0", other)(case(layer).x)


@pytest.mark.parametrize("cell", ["tanh", "gru", "lstm"])
@pytest.mark.parametrize("kernel", ["cpu", "auto"])
def test_initial_state_on_another_device(cell: str, kernel: str) -> None:
    layer = ours(build(cell), kernel=kernel)
    data = case(layer)
    with pytest.raises(RuntimeError, match=r"."):
        layer(data.x, as_hx(z.to("meta") for z in data.initial))


@pytest.mark.parametrize("kernel", ["cpu", "auto"])
def test_cotangents_on_another_device(kernel: str) -> None:
    layer = ours(build("gru"), kernel=kernel)
    data = case(layer)
    with pytest.raises((RuntimeError, ValueError), match=r"."):
        bptt.gradients(layer, data.x, data.dy.to("meta"))
