"""torch's layers swapped for ours inside a model, and ours for torch's."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch.nn.utils.parametrize import type_before_parametrizations

from .. import policies
from ..memory import Checkpoints
from ._swap import label, obstacle, put_in_place, sharing, wrappers
from ._using import settings
from .layers import LAYERS, TORCH_MODES, Recurrent

__all__ = ["convert", "revert"]

LOG = logging.getLogger(__name__)

M = TypeVar("M", bound=torch.nn.Module)

Subclasses = Mapping[type[torch.nn.RNNBase], type[Recurrent]]

_DROP_IN: dict[type[torch.nn.RNNBase], type[Recurrent]] = {
    layer.torchs: layer for layer in LAYERS.values() if layer.torchs is not None
}
_OURS_ALONE = ("_gradient", "_memory", "_kernel", "_subclass")
"""Attributes that torch's layers lack; `_subclass`: the subclass of torch's layer that a layer was made from."""


def convert(
    model: M,
    gradient: str | policies.Policy | None = None,
    *,
    memory: str | Checkpoints | None = None,
    kernel: str | None = None,
    strict: bool = False,
    subclasses: Subclasses | None = None,
) -> M | Recurrent:
    """Swap every torch.nn.RNN, GRU and LSTM inside `model` for ours, in place, and set layers of ours likewise.

    gradient, memory, kernel: as in `bptt.nn.RNN`. None leaves a layer of ours as it is, and gives a swapped one the
    defaults: "full", "auto", "auto".
    strict: a model that holds neither torch's layers nor ours raises TypeError, instead of a warning.
    subclasses: {Theirs: Ours}, what takes the place of a subclass of torch's layers, whose forward must be torch's own:
        `bptt.nn.LSTM` for one of torch.nn.LSTM, or a subclass of it, which is made without running its __init__.

    Parameters, buffers, hooks and parametrizations (weight norm, pruning) are shared, so that an optimiser made before
    still holds the right ones. `revert` is the way back. Returns the model (the new layer, when the model is itself
    one).

    A UserWarning names what recurs and was left as it is, cells (torch.nn.LSTMCell; `bptt.scan` runs a loop over
    one) and layers that TorchScript has compiled, and says so where there was nothing to swap or set. The logger
    "bptt" tells at level INFO which layers were swapped, and how many.

    A policy is no part of a state_dict. Who builds the model again from its configuration converts it again: keep the
    text form there, `str(policy)`, and call `convert(model, gradient=config["gradient"])` before loading the weights.

    Raises ValueError for an unknown policy, memory or kernel, and TypeError for a model that is no module, for
    subclasses that are not named or whose forward is their own, and for layers that FSDP has sharded, that
    torch.compile was called on, or whose forward was replaced; nothing is swapped then.

    >>> import torch, bptt
    >>> model = torch.nn.ModuleDict({"rnn": torch.nn.GRU(3, 5)})
    >>> bptt.convert(model, gradient=bptt.Chunked(35))
    ModuleDict(
      (rnn): GRU(3, 5, gradient=chunked:35)
    )
    """
    _check_module(model)
    given = settings(gradient, memory, kernel)
    table = {**_DROP_IN, **_checked(subclasses)}
    wrapped = wrappers(model)
    new: dict[torch.nn.Module, Recurrent] = {}
    layers: dict[str, Recurrent] = {}
    left, refused = [], []
    for name, module in model.named_modules():
        if isinstance(module, Recurrent):
            layers[name] = module
        elif isinstance(module, torch.nn.RNNBase) and isinstance(module, tuple(_DROP_IN)):
            cls = type_before_parametrizations(module)
            why = obstacle(name, module, wrapped, "convert") or (None if cls in table else _unnamed(cls))
            if why is not None:
                refused.append(f"{label(name, module)}: {why}")
                continue
            layers[name] = new[module] = layer = sharing(module, table[cls])
            layer.gradient, layer.memory, layer.kernel = "full", "auto", "auto"
            if cls not in _DROP_IN:
                layer._subclass = cls
        elif (why := _no_drop_in(module)) is not None:
            left.append(f"{label(name, module)}: {why}")
    if refused:
        raise TypeError(f"convert cannot swap {'; '.join(refused)}")
    words = "".join(f"; left as it is: {what}" for what in left)
    if not layers:
        without = f"got {type(model).__name__} without one{words}"
        if strict:
            raise TypeError(f"model must hold an RNN, GRU or LSTM layer of torch.nn or bptt.nn: {without}")
        warnings.warn(f"convert found no RNN, GRU or LSTM layer to swap or set: {without}", UserWarning, stacklevel=2)
    elif left:
        warnings.warn(f"convert swapped {len(new)}, set {len(layers) - len(new)}{words}", UserWarning, stacklevel=2)
    for layer in layers.values():
        for setting, value in given.items():
            setattr(layer, setting, value)
    put_in_place(model, new)
    LOG.info("convert swapped %d of %d layers: %s", len(new), len(layers), ", ".join(map(repr, layers)))
    return new.get(model, model)


def revert(model: M, *, subclasses: Subclasses | None = None) -> M | torch.nn.RNNBase:
    """Put torch.nn.RNN, GRU and LSTM back in place of every layer of ours inside `model`: the inverse of `convert`.

    For what knows torch's layers only: TorchScript, ONNX, quantisation, deployment without this package.

    subclasses: {Theirs: Ours}, as in `convert`, for layers of a subclass of ours that were built as such. What
        `convert` made of Theirs becomes Theirs again in any case.

    Parameters, buffers, hooks and parametrizations are shared. The settings of ours are dropped: convert again, and set
    them again, to train under a policy. torch's layers take no `resets=`. Returns the model (the new layer, when the
    model is itself one); a model without a layer of ours is returned as it is.

    Raises ValueError for layers whose cell torch.nn lacks (an RNN of sigmoid or identity), naming all of them, and
    TypeError for a model that is no module, a subclass of ours that is not named, and layers that cannot be swapped
    as in `convert`; nothing is swapped then.

    >>> import torch, bptt
    >>> model = torch.nn.Sequential(bptt.nn.GRU(3, 5, gradient="chunked:35"))
    >>> bptt.revert(model)
    Sequential(
      (0): GRU(3, 5)
    )
    """
    _check_module(model)
    table = {ours: theirs for theirs, ours in (*_checked(subclasses).items(), *_DROP_IN.items())}
    wrapped = wrappers(model)
    classes: dict[torch.nn.Module, type[torch.nn.RNNBase]] = {}
    refused, lacking = [], []
    for name, module in model.named_modules():
        if not isinstance(module, Recurrent):
            continue
        cls = type_before_parametrizations(module)
        theirs = getattr(module, "_subclass", None) or table.get(cls)
        why = obstacle(name, module, wrapped, "revert")
        known = module.mode in TORCH_MODES
        if why is None and theirs is None and known:
            why = f"a subclass of ours: name torch's in its place, subclasses={{Theirs: {cls.__name__}}}"
        if why is not None:
            refused.append(f"{label(name, module)}: {why}")
        elif theirs is None or not known:
            own = getattr(module, "nonlinearity", None)
            lacking.append(
                f"{label(name, module)} has " + (f"nonlinearity={own!r}" if own else f"cell {module.cell().name}")
            )
        else:
            classes[module] = theirs
    if refused:
        raise TypeError(f"revert cannot swap {'; '.join([*refused, *lacking])}")
    if lacking:
        raise ValueError(
            "torch.nn has LSTM, GRU, and RNN with nonlinearity 'tanh' and 'relu' only: " + "; ".join(lacking)
        )
    new = {layer: _plain(layer, theirs) for layer, theirs in classes.items()}
    put_in_place(model, new)
    LOG.info("revert swapped %d layers", len(new))
    return new.get(model, model)


def _plain(layer: torch.nn.Module, cls: type[torch.nn.RNNBase]) -> torch.nn.RNNBase:
    """torch's layer with what a layer of ours holds."""
    made = sharing(layer, cls)
    for name in _OURS_ALONE:
        vars(made).pop(name, None)
    if all(name in made._parameters for name in made._flat_weights_names):
        made._init_flat_weights()  # torch calls its kernels with this list; of computed weights it makes it anew
    return made


def _check_module(model: object) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module: got {type(model).__name__}")


def _checked(subclasses: Subclasses | None) -> Subclasses:
    """The mapping, if each class of ours can take the place of torch's."""
    if subclasses is None:
        return {}
    if not isinstance(subclasses, Mapping):
        raise TypeError(f"subclasses must be a mapping {{Theirs: Ours}}: got {type(subclasses).__name__}")
    for theirs, ours in subclasses.items():
        base = _torch_class(theirs)
        if base is None:
            raise TypeError(f"subclasses must map subclasses of torch.nn.RNN, GRU or LSTM: got {theirs!r}")
        if not (isinstance(ours, type) and issubclass(ours, _DROP_IN[base])):
            raise TypeError(
                f"subclasses must map {theirs.__name__} to bptt.nn.{base.__name__} or a subclass of it: got {ours!r}"
            )
        if changed := _changed(theirs, base):
            raise TypeError(f"subclasses must map what is called as torch's layer is: {theirs.__name__} {changed}")
    return subclasses


def _torch_class(cls: Any) -> type[torch.nn.RNNBase] | None:
    """Which of torch's layers a class is or extends."""
    return next((base for base in _DROP_IN if isinstance(cls, type) and issubclass(cls, base)), None)


def _changed(cls: type[torch.nn.RNNBase], base: type[torch.nn.RNNBase]) -> str | None:
    """What a subclass of torch's layer does otherwise when it is called, in words."""
    for name in ("forward", "__call__", "permute_hidden"):
        if getattr(cls, name) is not getattr(base, name):
            return f"has a {name} of its own, which ours would not run"
    return None


def _unnamed(cls: type[torch.nn.RNNBase]) -> str:
    """Why a subclass of torch's layer is not swapped, and what to do."""
    base = _torch_class(cls)
    assert base is not None  # looked up for torch's layers only
    changed = _changed(cls, base)
    if changed:
        return f"a subclass of torch.nn.{base.__name__} that {changed}: write it with bptt.nn.{base.__name__} inside"
    return (
        f"a subclass of torch.nn.{base.__name__}: name what takes its place, "
        f"subclasses={{{cls.__name__}: bptt.nn.{base.__name__}}}"
    )


def _no_drop_in(module: torch.nn.Module) -> str | None:
    """Why a module that recurs has no drop-in layer, and what to do; None for any other module."""
    if isinstance(module, torch.nn.RNNCellBase):
        return "a cell is one step of a loop of yours, which bptt.scan runs with a choice of gradient"
    if isinstance(module, torch.nn.RNNBase):
        return "a recurrent layer that is none of RNN, GRU and LSTM"
    scripted = getattr(module, "original_name", None) if isinstance(module, torch.jit.ScriptModule) else None
    if scripted in {theirs.__name__ for theirs in _DROP_IN}:
        return "compiled by TorchScript: convert before scripting"
    return None
