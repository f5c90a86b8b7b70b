"""The network that a configuration asks for, tried before anything is written."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from ..engine import default_device
from .config import Config, bad_device
from .errors import InputError
from .model import LanguageModel

__all__ = ["build_model", "on_cpu"]


def on_cpu() -> AbstractContextManager[object]:
    """Inside `with`, what torch makes without naming a device lies on the CPU, whatever the default device is."""
    return nullcontext() if default_device().type == "cpu" else torch.device("cpu")


def build_model(config: Config, size: int) -> LanguageModel:
    """The network of a run over `size` tokens. Raises InputError for options that do not go together."""
    _try_device(config)
    try:
        with on_cpu():  # where the first weights are drawn, for any device
            model = LanguageModel(
                size,
                cell=config.cell,
                nonlinearity=config.nonlinearity,
                layers=config.layers,
                hidden=config.hidden,
                embedding=config.embedding,
                dropout=config.dropout,
                gradient=config.gradient,
                memory=config.memory,
                kernel=config.kernel,
            )
        model = model.to(device=config.device, dtype=getattr(torch, config.dtype)).eval()
    except (TypeError, RuntimeError) as error:  # sizes that no tensor has, or no memory
        sizes = ", ".join(f"{name}={getattr(config, name)}" for name in ("layers", "hidden", "embedding"))
        raise InputError(f"no network of {sizes} can be made: {str(error).splitlines()[0]}") from error
    except ValueError as error:
        raise InputError(str(error).splitlines()[0]) from error
    try:
        with torch.no_grad():  # a kernel that refuses: heard of before anything is written
            model(torch.zeros(1, 1, dtype=torch.int64, device=config.device))
    except (ValueError, RuntimeError) as error:
        raise InputError(str(error).splitlines()[0]) from error
    return model


def _try_device(config: Config) -> None:
    """Raise InputError for a device that cannot hold a number of the dtype and give it back (`meta` cannot)."""
    try:
        torch.zeros((), device=config.device, dtype=getattr(torch, config.dtype)).cpu()
    except (RuntimeError, AssertionError, ImportError, TypeError) as error:  # all are ways of torch to say no
        raise bad_device(config.device, error) from error
