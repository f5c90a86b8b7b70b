"""Swapping torch's layers for ours inside a model."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch

from .. import kernels, policies
from ..memory import Checkpoints
from ..memory import parse as memory_parse
from ._layers import GRU, LSTM, RNN, Recurrent

__all__ = ["convert"]

M = TypeVar("M", bound=torch.nn.Module)

_DROP_IN: dict[type[torch.nn.Module], type[Recurrent]] = {torch.nn.RNN: RNN, torch.nn.GRU: GRU, torch.nn.LSTM: LSTM}


def convert(
    model: M,
    gradient: str | policies.Policy | None = None,
    *,
    memory: str | Checkpoints | None = None,
    kernel: str | None = None,
) -> M | Recurrent:
    """Swap every torch.nn.RNN, GRU and LSTM inside `model` for ours, in place, and set layers of ours likewise.

    gradient, memory, kernel: as in `bptt.nn.RNN`. None leaves a layer of ours as it is, and gives a swapped one the
    defaults: "full", "auto", "auto".

    Parameters, buffers and hooks are shared, so that an optimiser made before still holds the right ones. Returns the
    model (the new layer, when the model is itself one).

    Raises ValueError for an unknown policy, memory or kernel, and TypeError for a model that is no module, a subclass
    of torch's layers (what it changed would be lost) or a parametrized one (convert first, then parametrize); nothing
    is swapped then.

    >>> import torch, bptt
    >>> model = torch.nn.ModuleDict({"rnn": torch.nn.GRU(3, 5)})
    >>> bptt.convert(model, gradient=bptt.Chunked(35))
    ModuleDict(
      (rnn): GRU(3, 5, gradient=chunked:35)
    )
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module: got {type(model).__name__}")
    settings = {
        "gradient": None if gradient is None else policies.parse(gradient),
        "memory": None if memory is None else memory_parse(memory),
        "kernel": None if kernel is None else kernels.check(kernel),
    }
    new: dict[torch.nn.Module, Recurrent] = {}
    for name, module in model.named_modules():
        if type(module) in _DROP_IN:
            new[module] = _drop_in(module)
        elif isinstance(module, tuple(_DROP_IN)):
            raise TypeError(
                f"convert swaps torch.nn.RNN, GRU and LSTM themselves: {name or 'the model'!r} is a "
                f"{type(module).__name__}, a subclass; convert before parametrizing, or swap it by hand"
            )
        elif isinstance(module, Recurrent):
            new[module] = module
    for layer in new.values():
        for setting, value in settings.items():
            if value is not None:
                setattr(layer, setting, value)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():  # named_children would skip a second name of a shared layer
            if child in new and new[child] is not child:
                setattr(parent, name, new[child])
    return new.get(model, model)


def _drop_in(module: torch.nn.Module) -> Recurrent:
    """Our layer with all that torch's layer holds."""
    layer = _DROP_IN[type(module)].__new__(_DROP_IN[type(module)])
    containers = (dict, list, set)
    layer.__dict__.update({k: copy.copy(v) if isinstance(v, containers) else v for k, v in module.__dict__.items()})
    layer.gradient, layer.memory, layer.kernel = "full", "auto", "auto"
    return layer
