"""Layers swapped inside a model: another class in the same place, and all that a layer holds shared."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch.nn.utils import parametrize

__all__ = ["label", "obstacle", "put_in_place", "sharing", "wrappers"]

L = TypeVar("L", bound=torch.nn.Module)

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
"""What torch writes to when a parameter, buffer or module is set: each layer has its own."""


def sharing(layer: torch.nn.Module, cls: type[L]) -> L:
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
    if any(getattr(hook, "with_module", False) for hook in hooks.values()):  # which are handed their module
        held["_load_state_dict_pre_hooks"] = type(hooks)((i, _rebound(hook, made)) for i, hook in hooks.items())
    vars(made).clear()
    vars(made).update(held)
    return made


def _rebound(hook: Any, layer: torch.nn.Module) -> Any:
    return type(hook)(hook.hook, layer) if getattr(hook, "with_module", False) else hook


def put_in_place(model: torch.nn.Module, new: Mapping[torch.nn.Module, torch.nn.Module]) -> None:
    """Each new layer wherever a module of the model holds the old one: as a module, or in a list, tuple or dict."""
    for parent in [*model.modules(), *new.values()]:
        for name, child in parent._modules.items():  # named_children would skip a second name of a shared layer
            if child is not None and child in new:
                setattr(parent, name, new[child])
        for value in vars(parent).values():
            if type(value) in (list, dict):
                for key, held in list(enumerate(value) if type(value) is list else value.items()):
                    if isinstance(held, torch.nn.Module) and held in new:
                        value[key] = new[held]
        for name, value in list(vars(parent).items()):
            if type(value) is tuple and any(isinstance(held, torch.nn.Module) and held in new for held in value):
                now = tuple(new.get(held, held) if isinstance(held, torch.nn.Module) else held for held in value)
                setattr(parent, name, now)


def wrappers(model: torch.nn.Module) -> tuple[list[str], list[str]]:
    """The names of modules that keep hold of what is inside them, beside torch's tables: sharded, compiled."""
    fsdp, dynamo = sys.modules.get("torch.distributed.fsdp"), sys.modules.get("torch._dynamo")
    sharded = (fsdp.FullyShardedDataParallel, fsdp.FSDPModule) if fsdp is not None else ()
    compiled = getattr(dynamo, "OptimizedModule", ())
    found = list(model.named_modules())
    return [n for n, m in found if isinstance(m, sharded)], [n for n, m in found if isinstance(m, compiled)]


def obstacle(name: str, layer: torch.nn.Module, wrapped: tuple[list[str], list[str]], verb: str) -> str | None:
    """Why a layer cannot be swapped whatever its class: what would go on calling the old one."""
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


def label(name: str, module: torch.nn.Module) -> str:
    """A module of a model in words, by its name there."""
    kind = getattr(module, "original_name", type(module).__name__)  # the class that TorchScript has compiled
    return f"{name!r} ({kind})" if name else f"the model itself ({kind})"
