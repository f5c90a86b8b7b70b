"""`convert` and `revert`: the swap of torch's layers for ours inside a model, and back, sharing all that they hold."""

from __future__ import annotations

import copy
import logging
import sys
import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch.nn.utils import parametrize

from .. import policies
from ..memory import Checkpoints
from ._settings import checked_kernel, checked_memory
from ._using import check_module, settings
from .layers import LAYERS, TORCH_MODES, DropInLayer
from .recurrent import Recurrent

__all__ = ["convert", "revert"]

LOG = logging.getLogger(__name__)

M = TypeVar("M", bound=torch.nn.Module)

Subclasses = Mapping[type[torch.nn.RNNBase], type[DropInLayer]]

_DROP_IN: dict[type[torch.nn.RNNBase], type[DropInLayer]] = {
    layer.torchs: layer for layer in LAYERS.values() if layer.torchs is not None
}
_OURS_ALONE = ("_gradient", "_memory", "_kernel", "_subclass")
"""Attributes that torch's layers lack. `_subclass` is the subclass of torch's layer that a layer was made from."""
_TABLES = (
    "_parameters",
    "_buffers",
    "_non_persistent_buffers_set",
    "_modules",
    "_flat_weights",
    "_flat_weight_refs",
    "_flat_weights_names",
    "_all_weights",
)
"""The tables that torch writes to when a parameter, buffer or module is set: each layer has its own."""


def convert(
    model: M,
    gradient: str | policies.Policy | None = None,
    *,
    memory: str | Checkpoints | None = None,
    kernel: str | None = None,
    strict: bool = False,
    subclasses: Subclasses | None = None,
) -> M | DropInLayer:
    """Swap every torch.nn.RNN, GRU and LSTM inside `model` for ours, in place; give layers of ours the same settings.

    gradient, memory, kernel: as in `bptt.nn.RNN`. None leaves a layer of ours as it is, and gives a swapped one the
    defaults: "full", "auto", "auto".
    strict: a model that holds neither torch's layers nor ours raises TypeError, instead of a warning.
    subclasses: {Theirs: Ours}, where Ours takes the place of Theirs, a subclass of torch's layers with torch's forward:
        `bptt.nn.LSTM` for one of torch.nn.LSTM, or a subclass of it, which is made without running its __init__.

    Parameters, buffers, hooks and parametrizations (weight norm, pruning) are shared, so that an optimiser made before
    still holds the right ones. `revert` is the inverse. Returns the model (the new layer, when the model is itself
    one).

    A UserWarning names the recurrent modules that were left as they are, cells outside of a `bptt.nn.Recurrent`
    (torch.nn.LSTMCell; that layer or `bptt.scan` runs a loop over one) and layers that TorchScript has compiled, and
    says so where there was nothing to swap or set. The logger "bptt" reports at level INFO which layers were swapped,
    and how many.

    A policy is not part of a state_dict. A program that builds the model again from a configuration must convert it
    again: keep the text form, `str(policy)`, in the configuration, and call
    `convert(model, gradient=config["gradient"])` before loading the weights.

    Raises ValueError for an unknown policy, memory or kernel, and TypeError for a model that is not a module, for
    subclasses that are not named or whose forward is their own, and for layers that FSDP has sharded, that
    torch.compile was called on, or whose forward was replaced; nothing is swapped then.

    >>> import torch, bptt
    >>> model = torch.nn.ModuleDict({"rnn": torch.nn.GRU(3, 5)})
    >>> bptt.convert(model, gradient=bptt.Chunked(35))
    ModuleDict(
      (rnn): GRU(3, 5, gradient=chunked:35)
    )
    """
    check_module(model)
    given = settings(gradient, memory, kernel)
    of_cells = {name: m for name, m in model.named_modules() if isinstance(m, Recurrent)}
    if of_cells and memory is not None:
        checked_memory(memory)
    if of_cells and kernel is not None:
        checked_kernel(kernel)
    inside = {module for layer in of_cells.values() for module in layer.modules()}
    table = {**_DROP_IN, **_checked(subclasses)}
    wrapped = _wrappers(model)
    new: dict[torch.nn.Module, DropInLayer] = {}
    layers: dict[str, DropInLayer] = {}
    left, refused = [], []
    for name, module in model.named_modules():
        if isinstance(module, DropInLayer):
            layers[name] = module
        elif isinstance(module, torch.nn.RNNBase) and isinstance(module, tuple(_DROP_IN)):
            cls = parametrize.type_before_parametrizations(module)
            why = _obstacle(name, module, wrapped, "convert") or (None if cls in table else _unnamed(cls))
            if why is not None:
                refused.append(f"{_label(name, module)}: {why}")
                continue
            layers[name] = new[module] = layer = _sharing(module, table[cls])
            layer.gradient, layer.memory, layer.kernel = "full", "auto", "auto"
            if cls not in _DROP_IN:
                layer._subclass = cls
        elif module not in inside and (why := _no_drop_in(module)) is not None:
            left.append(f"{_label(name, module)}: {why}")
    if refused:
        raise TypeError(f"convert cannot swap {'; '.join(refused)}")
    words = "".join(f"; left as it is: {what}" for what in left)
    if not layers and not of_cells:
        without = f"got {type(model).__name__} without one{words}"
        if strict:
            raise TypeError(f"model must hold an RNN, GRU or LSTM layer of torch.nn or bptt.nn: {without}")
        warnings.warn(f"convert found no RNN, GRU or LSTM layer to swap or set: {without}", UserWarning, stacklevel=2)
    elif left:
        count = len(layers) - len(new) + len(of_cells)
        warnings.warn(f"convert swapped {len(new)}, set {count}{words}", UserWarning, stacklevel=2)
    for setting, value in given.items():
        for ours in (*layers.values(), *of_cells.values()):
            setattr(ours, setting, value)
    _put_in_place(model, new)
    LOG.info("convert swapped %d of %d layers: %s", len(new), len(layers), ", ".join(map(repr, layers)))
    return new.get(model, model)


def revert(model: M, *, subclasses: Subclasses | None = None) -> M | torch.nn.RNNBase:
    """Put torch.nn.RNN, GRU and LSTM back in place of every layer of ours inside `model`: the inverse of `convert`.

    Use it for tools that know only torch's layers: TorchScript, quantisation, deployment without this package.

    subclasses: {Theirs: Ours}, as in `convert`, for layers of a subclass of ours that were built as such. A
        layer that `convert` made from Theirs becomes Theirs again in any case.

    Parameters, buffers, hooks and parametrizations are shared. The settings of ours are dropped: convert again, and set
    them again, to train under a policy. torch's layers take no `resets=`. Returns the model (the new layer, when the
    model is itself one); a model without a layer of ours is returned as it is.

    Raises ValueError for layers whose cell torch.nn lacks (an RNN of sigmoid or identity), naming all of them, and
    TypeError for a model that is not a module, a subclass of ours that is not named, and layers that cannot be swapped
    as in `convert`; nothing is swapped then.

    >>> import torch, bptt
    >>> model = torch.nn.Sequential(bptt.nn.GRU(3, 5, gradient="chunked:35"))
    >>> bptt.revert(model)
    Sequential(
      (0): GRU(3, 5)
    )
    """
    check_module(model)
    table = {ours: theirs for theirs, ours in (*_checked(subclasses).items(), *_DROP_IN.items())}
    wrapped = _wrappers(model)
    classes: dict[torch.nn.Module, type[torch.nn.RNNBase]] = {}
    refused, lacking = [], []
    for name, module in model.named_modules():
        if not isinstance(module, DropInLayer):
            continue
        cls = parametrize.type_before_parametrizations(module)
        theirs = getattr(module, "_subclass", None) or table.get(cls)
        why = _obstacle(name, module, wrapped, "revert")
        known = module.mode in TORCH_MODES
        if why is None and theirs is None and known:
            why = f"a subclass of ours: name torch's in its place, subclasses={{Theirs: {cls.__name__}}}"
        if why is not None:
            refused.append(f"{_label(name, module)}: {why}")
        elif theirs is None or not known:
            own = getattr(module, "nonlinearity", None)
            lacking.append(
                f"{_label(name, module)} has " + (f"nonlinearity={own!r}" if own else f"cell {module.cell().name}")
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
    _put_in_place(model, new)
    LOG.info("revert swapped %d layers", len(new))
    return new.get(model, model)


def _plain(layer: torch.nn.Module, cls: type[torch.nn.RNNBase]) -> torch.nn.RNNBase:
    """torch's layer, which holds the same as a layer of ours."""
    made = _sharing(layer, cls)
    for name in _OURS_ALONE:
        vars(made).pop(name, None)
    if all(name in made._parameters for name in made._flat_weights_names):
        made._init_flat_weights()  # torch calls its kernels with this list; of computed weights it makes a new one
    return made


def _checked(subclasses: Subclasses | None) -> Subclasses:
    """The mapping, if each class of ours can take the place of torch's class."""
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
    """The layer of torch that a class is or extends; None for any other class."""
    return next((base for base in _DROP_IN if isinstance(cls, type) and issubclass(cls, base)), None)


def _changed(cls: type[torch.nn.RNNBase], base: type[torch.nn.RNNBase]) -> str | None:
    """How a call of a subclass differs from a call of torch's layer, in words; None where it does not."""
    for name in ("forward", "__call__", "permute_hidden"):
        if getattr(cls, name) is not getattr(base, name):
            return f"has a {name} of its own, which ours would not run"
    return None


def _unnamed(cls: type[torch.nn.RNNBase]) -> str:
    """Why a subclass of torch's layer is not swapped, and what to do."""
    base = _torch_class(cls)
    assert base is not None  # looked up for torch's layers only
    if changed := _changed(cls, base):
        return f"a subclass of torch.nn.{base.__name__} that {changed}: write it with bptt.nn.{base.__name__} inside"
    return (
        f"a subclass of torch.nn.{base.__name__}: name what takes its place, "
        f"subclasses={{{cls.__name__}: bptt.nn.{base.__name__}}}"
    )


def _no_drop_in(module: torch.nn.Module) -> str | None:
    """Why a module that recurs has no drop-in layer, and what to do; None for any other module."""
    if isinstance(module, torch.nn.RNNCellBase):
        return (
            "a cell is one step of a loop of yours, which bptt.nn.Recurrent or bptt.scan runs with a choice of gradient"
        )
    if isinstance(module, torch.nn.RNNBase):
        return "a recurrent layer that is none of RNN, GRU and LSTM"
    scripted = getattr(module, "original_name", None) if isinstance(module, torch.jit.ScriptModule) else None
    if scripted in {theirs.__name__ for theirs in _DROP_IN}:
        return "compiled by TorchScript: convert before scripting"
    return None


def _sharing(layer: torch.nn.Module, cls: type[M]) -> M:
    """A layer of class `cls` with the parameters, buffers, hooks, parametrizations and attributes of `layer`.

    Hooks are the same tables, so that a handle from before removes them from the new layer as well.
    """
    made = cls.__new__(cls)
    held = {name: copy.copy(value) if name in _TABLES else value for name, value in vars(layer).items()}
    if parametrize.is_parametrized(layer):
        # Its properties live in a class of torch's making, one for each layer: stand-ins have such a class made.
        torch.nn.Module.__init__(made)
        for name in layer.parametrizations:  # type: ignore[union-attr]  # a ModuleDict: is_parametrized
            made.register_buffer(name, torch.empty(0, device="cpu"))
            parametrize.register_parametrization(made, name, torch.nn.Identity(), unsafe=True)
        parametrizations = copy.copy(held["_modules"]["parametrizations"])
        parametrizations._modules = dict(parametrizations._modules)
        held["_modules"]["parametrizations"] = parametrizations
    hooks = held["_load_state_dict_pre_hooks"]
    handed = {i: type(hook)(hook.hook, made) for i, hook in hooks.items() if getattr(hook, "with_module", False)}
    if handed:  # hooks that are given their module
        held["_load_state_dict_pre_hooks"] = type(hooks)({**hooks, **handed})
    vars(made).clear()
    vars(made).update(held)
    return made


def _put_in_place(model: torch.nn.Module, new: Mapping[torch.nn.Module, torch.nn.Module]) -> None:
    """Put each new layer wherever a module of the model holds the old one: as a module, or in a list, tuple or dict."""
    for parent in [*model.modules(), *new.values()]:
        for name, child in parent._modules.items():  # named_children would skip a second name of a shared layer
            if child is not None and child in new:
                setattr(parent, name, new[child])
        for name, value in list(vars(parent).items()):
            if type(value) in (list, dict):
                for key, held in list(enumerate(value) if type(value) is list else value.items()):
                    if isinstance(held, torch.nn.Module) and held in new:
                        value[key] = new[held]
            elif type(value) is tuple and any(isinstance(held, torch.nn.Module) and held in new for held in value):
                now = tuple(new.get(held, held) if isinstance(held, torch.nn.Module) else held for held in value)
                setattr(parent, name, now)


def _wrappers(model: torch.nn.Module) -> tuple[list[str], list[str]]:
    """The names of the sharded and of the compiled modules, which hold on to the layers inside them."""
    fsdp, dynamo = sys.modules.get("torch.distributed.fsdp"), sys.modules.get("torch._dynamo")
    sharded = (fsdp.FullyShardedDataParallel, fsdp.FSDPModule) if fsdp is not None else ()
    compiled = getattr(dynamo, "OptimizedModule", ())
    found = list(model.named_modules())
    return [n for n, m in found if isinstance(m, sharded)], [n for n, m in found if isinstance(m, compiled)]


def _obstacle(name: str, layer: torch.nn.Module, wrapped: tuple[list[str], list[str]], verb: str) -> str | None:
    """Why a layer cannot be swapped, in words: what would go on calling the old layer. None where nothing would."""
    sharded, compiled = wrapped
    if any(name == outer or name.startswith(f"{outer}." if outer else "") for outer in sharded):
        return f"it is sharded by FSDP, which keeps hold of the old layer: {verb} before sharding"
    if any(name == (f"{outer}._orig_mod" if outer else "_orig_mod") for outer in compiled):
        return f"it is itself compiled by torch.compile, which keeps hold of the old layer: {verb} before compiling"
    if "forward" in vars(layer):
        return (
            "its forward was replaced on the layer itself (as accelerate's hooks do), which would go on calling the "
            f"old layer: undo that, {verb}, do it again"
        )
    return None


def _label(name: str, module: torch.nn.Module) -> str:
    """The words for a module in an error: its name in the model, and its class."""
    kind = getattr(module, "original_name", type(module).__name__)  # the class that TorchScript has compiled
    return f"{name!r} ({kind})" if name else f"the model itself ({kind})"
