"""`using`: other settings of a model's layers inside a `with` block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch

from .. import kernels, policies
from ..memory import Checkpoints, parse
from .layers import DropInLayer
from .recurrent import Recurrent

__all__ = ["check_module", "settings", "using"]

M = TypeVar("M", bound=torch.nn.Module)


@contextmanager
def using(
    model: M,
    gradient: str | policies.Policy | None = None,
    *,
    memory: str | Checkpoints | None = None,
    kernel: str | None = None,
) -> Iterator[M]:
    """Give every layer of `bptt.nn` in a model another policy, memory or kernel, inside a `with` block.

    model: a layer of `bptt.nn`, or a model with some inside. gradient, memory, kernel: as in `bptt.nn.RNN`, or as in
    `bptt.nn.Recurrent` for a layer of any cell; None leaves each layer its own.

    Afterwards each layer has its former settings again, also after an exception, and `with` blocks may be nested. A
    policy is read when a layer is called: a backward pass inside the block, of a call made before it, has the policy of
    that call. Settings belong to the layers, not to a thread: other threads that call the same layers meanwhile use
    these settings too, so give each such thread a copy of the model (`copy.deepcopy`).

    Yields the model. Raises ValueError or TypeError for a policy, memory or kernel that is unknown, or that one of the
    layers does not have, and TypeError for a model without a layer of `bptt.nn`; nothing is set then.

    >>> import torch, bptt
    >>> rnn = bptt.nn.GRU(3, 5, gradient="chunked:4")
    >>> with bptt.using(rnn, gradient="full"):
    ...     rnn
    GRU(3, 5, gradient=full)
    >>> rnn
    GRU(3, 5, gradient=chunked:4)
    """
    values: dict[str, Any] = {"gradient": gradient, "memory": memory, "kernel": kernel}
    check_module(model)
    layers = [module for module in model.modules() if isinstance(module, (DropInLayer, Recurrent))]
    if not layers:
        raise TypeError(
            f"model must hold a bptt.nn layer: got {type(model).__name__} without one (bptt.convert swaps torch's)"
        )
    with ExitStack() as before:
        for layer in layers:
            for name in (name for name, value in values.items() if value is not None):
                before.callback(setattr, layer, name, getattr(layer, name))
                setattr(layer, name, values[name])
        yield model


def check_module(model: object) -> None:
    """Raise TypeError for a model that is not a module."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module: got {type(model).__name__}")


def settings(
    gradient: str | policies.Policy | None, memory: str | Checkpoints | None, kernel: str | None
) -> dict[str, Any]:
    """The settings that a caller gives for layers, by name, after a check."""
    given: dict[str, Any] = {}
    if gradient is not None:
        given["gradient"] = policies.parse(gradient)
    if memory is not None:
        given["memory"] = parse(memory)
    if kernel is not None:
        given["kernel"] = kernels.check(kernel)
    return given
