"""Weights and states that do not fit together are refused before a pointer is followed."""

import pytest
import torch
from reference import as_hx, build, case, ours
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map_only

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


class Wrapped(Tensor):
    """A tensor whose values are another one's, as those that are sharded or quantised."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, of: Tensor) -> Tensor:
        return Tensor._make_wrapper_subclass(cls, of.shape, dtype=of.dtype)

    def __init__(self, of: Tensor) -> None:
        self.of = of

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(cls, lambda t: t.of, (args, kwargs or {}))
        return tree_map_only(Tensor, cls, func(*args, **kwargs))


def freed(p: Tensor) -> Tensor:
    p = p.clone()
    p.untyped_storage().resize_(0)
    return p


def fake(p: Tensor) -> Tensor:
    return FakeTensorMode().from_tensor(p)


WITHOUT_MEMORY = {"wrapped": Wrapped, "freed": freed, "fake": fake}


@pytest.mark.parametrize("cell", ["tanh", "gru", "lstm"])
@pytest.mark.parametrize("differentiated", [True, False])
@pytest.mark.parametrize("kind", WITHOUT_MEMORY)
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_tensors_without_memory(cell: str, differentiated: bool, kind: str) -> None:
    """Their address is 0, which the compiled walks take for a tensor that is not given."""
    for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0"):
        layer = ours(build(cell, dtype=torch.float32)).requires_grad_(False)
        layer._parameters[name] = torch.nn.Parameter(WITHOUT_MEMORY[kind](layer.get_parameter(name)), False)
        x = torch.zeros(5, 2, layer.input_size, requires_grad=differentiated)
        with pytest.raises(RuntimeError, match="must have memory that the compiled kernel can read"):
            layer(x)


@pytest.mark.parametrize("cell", ["tanh", "gru", "lstm"])
@pytest.mark.parametrize("differentiated", [True, False])
def test_zeros_that_are_not_written_anywhere(cell: str, differentiated: bool) -> None:
    """autograd's zero tensors have no memory either."""
    layer = ours(build(cell, num_layers=1)).requires_grad_(differentiated)
    plain = case(layer)
    x, hx = torch.zeros_like(plain.x), [torch.zeros_like(h) for h in plain.initial]
    expected = layer(x, as_hx(hx))[0]
    given, *states = [torch._efficientzerotensor(t.shape, dtype=t.dtype) for t in (x, *hx)]
    torch.testing.assert_close(layer(given, as_hx(states))[0], expected)
    if differentiated:
        none = torch._efficientzerotensor(expected.shape, dtype=x.dtype)
        grads = torch.autograd.grad(layer(x)[0], list(layer.parameters()), none)
        assert not any(grad.any() for grad in grads)
