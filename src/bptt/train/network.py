"""The network that a configuration asks for, tried before anything is written."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..engine import default_device
from ..nn import plan
from .config import Config, bad_device
from .errors import InputError
from .model import Network
from .tasks import Task, task_of

__all__ = ["build_model", "check_budget", "on_cpu", "trial"]


def on_cpu() -> AbstractContextManager[object]:
    """Inside `with`, what torch makes without naming a device lies on the CPU, whatever the default device is."""
    return nullcontext() if default_device().type == "cpu" else torch.device("cpu")


def build_model(config: Config, stored: Any) -> Network:
    """The network of a run whose data left `stored`. Raises InputError for options that do not go together."""
    _try_device(config)
    task = task_of(config)
    try:
        with on_cpu():  # where the first weights are drawn, for any device
            model = task.network(config, stored)
        model = model.to(device=config.device, dtype=getattr(torch, config.dtype)).eval()
    except (TypeError, RuntimeError) as error:  # sizes that no tensor has, or no memory
        names = ("layers", "hidden", "embedding")
        sizes = ", ".join(f"{name}={getattr(config, name)}" for name in names if getattr(config, name) is not None)
        raise InputError(f"no network of {sizes} can be made: {str(error).splitlines()[0]}") from error
    except ValueError as error:
        raise InputError(str(error).splitlines()[0]) from error
    try:
        with torch.no_grad():  # a kernel that refuses: heard of before anything is written
            model(*trial(task, stored, model))
    except (ValueError, RuntimeError) as error:
        raise InputError(str(error).splitlines()[0]) from error
    return model


def check_budget(config: Config, task: Task, model: Network) -> None:
    """Raise InputError for a budget of bytes that is too small for a batch."""
    seen: list[Tensor] = []  # what the recurrent layers read
    hook = model.recurrent.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    try:
        with torch.no_grad():
            model(*trial(task, task.stored, model))
        plan(model.recurrent, task.longest(config), config.batch, x=seen[0])
    except (ValueError, NotImplementedError) as error:
        raise InputError(f"memory={config.memory}: {error}") from None
    finally:
        hook.remove()


def trial(task: type[Task] | Task, stored: Any, model: Network) -> tuple[Any, ...]:
    """Arguments for the model's shortest call, on its device and in its dtype."""
    like = next(model.parameters())
    return tuple(t.to(like) if t.is_floating_point() else t.to(like.device) for t in task.trial(stored))


def _try_device(config: Config) -> None:
    """Raise InputError for a device that cannot hold a number of the dtype and give it back (`meta` cannot)."""
    try:
        torch.zeros((), device=config.device, dtype=getattr(torch, config.dtype)).cpu()
    except (RuntimeError, AssertionError, ImportError, TypeError) as error:  # all are ways of torch to say no
        raise bad_device(config.device, error) from error
